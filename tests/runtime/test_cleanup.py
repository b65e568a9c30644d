"""`minitron gc`: what nobody needs goes, and nothing else, from real results, in directories and in a bucket."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from google.cloud.storage import Blob
from typer.testing import CliRunner

from minitron.cli.app import app
from minitron.config.parse import parse
from minitron.runtime import cleanup, stage
from minitron.storage import bucket_results
from minitron.storage.layout import RECORD, partial_path, read_record
from minitron.tracking.client import connect, find_or_create_experiment
from tests.servers.gcs import World
from tests.servers.mlflow_server import register_version

DAY = 86400


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a real result in the workspace, with another key for another seed, 40 days old."""
    (tmp_path / "corpus.txt").write_text("one two three")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    values = {"corpus": str(tmp_path / "corpus.txt"), "teacher": str(tmp_path / "teacher"), "output": tmp_path / "out"}

    def result(seed: int = 0, days: float = 40, **changes: Any) -> Path:
        def work(config: Any, directory: Path, tracker: Any) -> dict[str, Any]:
            (directory / "words.txt").write_text(f"three, seed {seed}")
            return {"metrics": {"words": 3}}

        record = stage.run(parse("prepare", values | {"workspace": tmp_path / "ws", "seed": seed} | changes), work)
        shutil.rmtree(tmp_path / "out")  # else its links share the bytes
        return set_age(tmp_path / "ws" / "prepare" / record["key"][:16], days)

    return result


def set_age(path: Path, days: float) -> Path:
    used = time.time() - days * DAY
    for entry in (*path.rglob("*"), path):
        os.utime(entry, (used, used))
    return path


def collect(place: Path | str, *arguments: str) -> tuple[dict[str, str], str]:
    """Run `minitron gc`; return the lines of its table by what they are about, and its last line."""
    done = CliRunner().invoke(app, ["gc", str(place), *arguments])
    *lines, last = done.output.splitlines()
    return {line.split()[1]: line for line in lines[1:]}, last


def test_only_what_nobody_needs_goes(make: Callable[..., Path], mlflow_file: str, tmp_path: Path) -> None:
    registered, unneeded, read, young = make(1), make(2), make(3), make(4, days=20)
    lineage = {"register": {"inputs": {"student": {"sha256": "s"}}}, "prepare": read_record(registered)}
    tags = {"lineage": "", "student_sha256": "s"}
    register_version(mlflow_file, tmp_path.name, None, tags, lineage=json.dumps({"stages": lineage}))
    client = connect(mlflow_file)
    (version,) = client.search_model_versions(f"name = '{tmp_path.name}'")
    client.set_model_version_tag(tmp_path.name, version.version, "lineage", f"runs:/{version.run_id}/lineage.json")
    run = client.create_run(find_or_create_experiment(client, tmp_path.name), tags={"input.dataset": sha256(read)})
    options = ["--tracking-uri", mlflow_file]
    lines, last = collect(tmp_path / "ws", *options)
    assert last == f"1 of 4 may be deleted, {size(unneeded)}; --delete deletes them"
    assert "not needed, unused for 40 d" in lines[f"prepare/{unneeded.name}"]
    assert f"models:/{tmp_path.name}/1 was made from it" in lines[f"prepare/{registered.name}"]
    assert f"MLflow run {run.info.run_id} is running" in lines[f"prepare/{read.name}"]
    assert "used in the last 30 d" in lines[f"prepare/{young.name}"] and unneeded.is_dir()
    freed = size(unneeded)
    assert collect(tmp_path / "ws", *options, "--delete")[1] == f"deleted: 1 of 1, {freed} freed"
    assert sorted((tmp_path / "ws" / "prepare").iterdir()) == sorted([registered, read, young])
    client.set_terminated(run.info.run_id)
    assert collect(tmp_path / "ws", *options, "--delete", "--older-than", "2w")[1].startswith("deleted: 2 of 2")
    assert list((tmp_path / "ws" / "prepare").iterdir()) == [registered]
    client.log_text(version.run_id, "no lineage", "lineage.json")
    assert "error: runs:/" in collect(tmp_path / "ws", *options, "--delete")[1] and registered.is_dir()
    client.delete_model_version(tmp_path.name, version.version)
    assert collect(tmp_path / "ws", *options, "--delete")[1].startswith("deleted: 1 of 1")


def sha256(result: Path) -> str:
    return (read_record(result) or {})["output_sha256"]


def size(result: Path) -> str:
    total = sum(path.stat().st_size for path in result.iterdir())
    return f"{total / 1000:.1f} kB" if total >= 1000 else f"{total} bytes"


def test_without_mlflow_no_result_goes(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    result = make()
    lines, last = collect(tmp_path / "ws")
    assert "unknown whether a registered version was made from it" in lines[f"prepare/{result.name}"]
    assert last.startswith("0 of 1 may be deleted")
    _, last = collect(tmp_path / "ws", "--delete")
    assert last == "error: --delete: the inputs of registered versions are not known; give --tracking-uri"


def test_a_result_that_is_used_again_is_young(make: Callable[..., Path], mlflow_file: str) -> None:
    result = make(5)
    (item,) = cleanup.list_items(result.parents[1])
    rules = cleanup.Rules(30 * DAY, {})
    assert rules.judge(item)[0]
    make(5, days=0)
    assert not cleanup.delete_item(item) and result.is_dir()  # it was listed before it was used
    (item,) = cleanup.list_items(result.parents[1])
    assert rules.judge(item) == (False, "used in the last 30 d")
    assert cleanup.Rules(0, {}).judge(item) == (False, "used in the last 1 h")


def test_the_results_of_one_pipeline_run_go_whatever_their_age(
    make: Callable[..., Path], mlflow_file: str, tmp_path: Path
) -> None:
    one, other = make(6, days=1, pipeline_run_id="run-1"), make(7, pipeline_run_id="run-2")
    collect(tmp_path / "ws", "--tracking-uri", mlflow_file, "--pipeline-run", "run-1", "--delete")
    assert not one.exists() and other.is_dir()


def test_leftovers_go_by_age_and_what_others_need_stays(
    make: Callable[..., Path], mlflow_file: str, tmp_path: Path
) -> None:
    workspace = make().parents[1]
    dead, locked = partial_path(workspace / "distill" / "dead"), partial_path(workspace / "distill" / "locked")
    good, model = workspace / "distill" / "dead.last-good", workspace / "models" / "one"
    for directory in (dead / "checkpoints", locked / "checkpoints", good, model, workspace / "distill" / "mine"):
        directory.mkdir(parents=True)
        (directory / "weights").write_bytes(b"1234")
    note = model.with_name("one.json")
    note.write_text('{"identity": "gs://bucket/model#digest", "sha256": "abc"}')
    files = [
        dead / "key",
        locked / "key",
        note,
        workspace / "failure.json",
        workspace / "unsent" / "server" / "1.jsonl",
    ]
    files += [workspace / "models" / "resolved" / "1.json", workspace / "hashes" / "1-2-3-sha256.json"]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    set_age(workspace, 40)
    with (locked / "key").open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        lines, last = collect(workspace, "--tracking-uri", mlflow_file, "--delete")
    assert last.startswith("deleted: 7 of 7")
    assert "a process works there" in lines["distill/locked.partial"]
    assert "not sent yet; the next stage sends them" in lines["unsent/server/1.jsonl"]
    assert {path.name for path in (workspace / "distill").iterdir()} == {"locked.partial", "mine"}
    assert not list((workspace / "prepare").iterdir()) and not list((workspace / "models").glob("one*"))
    assert (workspace / "unsent" / "server" / "1.jsonl").is_file() and not (workspace / "failure.json").exists()


def test_a_result_in_a_bucket_goes_with_its_record_first(
    world: World, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, mlflow_file: str
) -> None:
    """The emulator's clock is the test's: objects are 40 days old, but for those of a record that is written again."""
    result, address = make(8), "gs://bucket/ws/prepare/0123456789abcdef"
    replaced = bucket_results.commit_result(result, address, replace=False)
    (result / "words.txt").write_text("other words")
    record = json.loads((result / RECORD).read_text()) | {"output_sha256": "other"}
    (result / RECORD).write_text(json.dumps(record))
    named = bucket_results.commit_result(result, address, replace=True)
    world.put("ws/prepare/foreign", b"mine")
    ages: dict[str, float] = {}
    updated = Blob.updated.fget
    monkeypatch.setattr(Blob, "updated", property(lambda blob: updated(blob) - timedelta(ages.get(blob.name, 40))))
    options = ["--tracking-uri", mlflow_file, "--delete"]
    generation = world.generation("bucket", "ws/prepare/0123456789abcdef/stage.json")
    bucket_results.mark_used(address, named)
    assert world.generation("bucket", "ws/prepare/0123456789abcdef/stage.json") != generation
    ages["ws/prepare/0123456789abcdef/stage.json"] = 0
    _, last = collect("gs://bucket/ws", *options)
    assert last.startswith("deleted: 1 of 1") and not world.names(
        f"ws/prepare/0123456789abcdef/{replaced['directory']}"
    )
    assert bucket_results.read_record_at(address) == named
    ages.clear()
    world.log.clear()
    assert collect("gs://bucket/ws", *options)[1].startswith("deleted: 1 of 1")
    deleted = [request.path.partition("/o/")[2] for request in world.log if request.method == "DELETE"]
    directory = f"ws/prepare/0123456789abcdef/{named['directory']}"
    assert deleted[:2] == ["ws/prepare/0123456789abcdef/stage.json", f"{directory}/stage.json"]
    assert world.names() == ["ws/prepare/foreign"]
