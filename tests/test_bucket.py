"""Buckets anywhere: fetched and uploaded whole or not at all, resumed, refused in one line, and moved once."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bucket_server import BucketServer, bucket_server

from minitron import bucket, prepare, references, sources, stage, transfers
from minitron.config import EvaluateConfig, PrepareConfig, PruneConfig, parse
from minitron.errors import ConfigError, RunError
from minitron.storage import content_hash

FILES = {"words.txt": b"three", "part/one.bin": bytes(70_000), "part/two.bin": os.urandom(150_000)}
SIZE = sum(map(len, FILES.values()))


def work(config: PrepareConfig, directory: Path, tracker: Any) -> dict[str, Any]:
    """A small stage: writes FILES."""
    for name, content in FILES.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    return {"metrics": {"files": len(FILES)}}


def never(config: PrepareConfig, directory: Path, tracker: Any) -> dict[str, Any]:
    raise AssertionError("it should have been reused")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[BucketServer]:
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transfers, "RETRY", transfers.RETRY.with_timeout(1.0).with_delay(0.05, 0.1, 1.5))
    bucket.pinned.cache_clear()
    with bucket_server(monkeypatch) as state:
        yield state


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Any]:
    (tmp_path / "corpus.txt").write_text("one two three")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    values = {"output": tmp_path / "out", "corpus": str(tmp_path / "corpus.txt"), "teacher": str(tmp_path / "teacher")}
    return lambda **changes: parse("prepare", values | changes)


def on_other_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Any, target: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)


# A corpus


def test_a_corpus_is_its_snapshot(server: BucketServer, inputs: dict[str, Path], tmp_path: Path) -> None:
    text = next(inputs["corpus"].glob("*.jsonl")).read_text()
    lines = text.splitlines(keepends=True)
    server.put("text/a.jsonl", "".join(lines[:200]))
    server.put("text/b.jsonl", "".join(lines[200:]))

    def run(output: str, corpus: str = "gs://bucket/text") -> dict[str, Any]:
        bucket.pinned.cache_clear()  # another process
        values = {"corpus": corpus, "teacher": str(inputs["teacher"]), "validation_fraction": 0.1, "test_fraction": 0.1}
        return prepare.run(PrepareConfig(output=tmp_path / output, workspace=tmp_path / "ws", **values))

    record = run("one")
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    objects = [f"{name}#{server.generation(f'text/{name}')}" for name in ("a.jsonl", "b.jsonl")]
    assert manifest["corpus_objects"] == objects
    assert record["inputs"]["corpus"] == {"address": "gs://bucket/text", "sha256": manifest["corpus_sha256"]}
    fetched = server.downloaded
    assert fetched == len(text.encode())
    assert run("two")["key"] == record["key"] and server.downloaded == fetched, "decided without a download"
    local = prepare.run(
        PrepareConfig(
            output=tmp_path / "local", corpus=str(inputs["corpus"]), teacher=str(inputs["teacher"]),
            validation_fraction=0.1, test_fraction=0.1,
        )
    )  # fmt: skip
    assert local["metrics"]["documents"] == record["metrics"]["documents"]
    server.put("text/b.jsonl", "".join(lines[200:-1]))
    assert run("three")["key"] != record["key"]
    assert run("four", "gs://bucket/text/a.jsonl")["key"] != record["key"], "one object is a corpus, too"
    with pytest.raises(ConfigError, match="gs://bucket/nothing: no objects there; give gs://bucket/path"):
        run("five", "gs://bucket/nothing")


# Download


def snapshot(server: BucketServer, count: int = 3, size: int = 50_000) -> str:
    for number in range(count):
        server.put(f"model/part-{number}", bytes([number]) * size)
    return bucket.snapshot("gs://bucket/model")


def test_large_objects_come_in_chunks(server: BucketServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "CHUNK", 10_000)
    asked: list[str] = []
    identity = snapshot(server)
    server.before = lambda method, name: asked.append(name)
    transfers.download(identity, tmp_path / "model")
    assert [path.read_bytes() for path in sorted((tmp_path / "model").iterdir())] == [
        bytes([n]) * 50_000 for n in range(3)
    ]
    assert asked.count("model/part-0") == 5


def test_an_object_that_changes_while_it_is_fetched_is_found(server: BucketServer, tmp_path: Path) -> None:
    identity = snapshot(server)

    def change(method: str, name: str) -> None:
        if name == "model/part-1":
            server.before = lambda method, name: None
            server.put("model/part-1", b"other")

    server.before = change
    with pytest.raises(
        RunError, match=r"^gs://bucket/model: an object there changed while it was fetched; run it again$"
    ):
        transfers.download(identity, tmp_path / "model")
    assert not (tmp_path / "model" / "part-1").exists()
    with pytest.raises(RunError, match="changed while it was fetched"):
        transfers.download(identity, tmp_path / "model")


def test_damage_on_the_way_is_found(server: BucketServer, tmp_path: Path) -> None:
    identity = snapshot(server, 1)
    server.damaging = True
    with pytest.raises(RunError, match=r"part-0 did not come as its size and CRC32C say; run it again|not fetched"):
        transfers.download(identity, tmp_path / "model")
    assert not (tmp_path / "model" / "part-0").exists()
    server.damaging = False
    transfers.download(identity, tmp_path / "model")
    assert (tmp_path / "model" / "part-0").read_bytes() == bytes(50_000)


def test_a_cut_connection_is_tried_again(server: BucketServer, tmp_path: Path) -> None:
    identity = snapshot(server)
    cuts = iter([True, True, False, True])
    server.cut = lambda method, name: name.startswith("model/") and next(cuts, False)
    transfers.download(identity, tmp_path / "model")
    assert content_hash(tmp_path / "model")


def test_a_killed_download_goes_on(server: BucketServer, tmp_path: Path) -> None:
    identity = snapshot(server, 6)
    program = (
        "from pathlib import Path\nfrom minitron import transfers\ntransfers._BATCH_FILES = 1\n"
        f"transfers.download({identity!r}, Path({str(tmp_path / 'model')!r}))\n"
    )
    server.delay = 0.2
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    for _ in range(600):
        if len(list((tmp_path / "model").glob("part-?"))) >= 2:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = len(list((tmp_path / "model").glob("part-?")))
    assert 2 <= there < 6
    server.delay, server.downloaded = 0, 0
    transfers.download(identity, tmp_path / "model")
    assert server.downloaded == (6 - there) * 50_000 and len(list((tmp_path / "model").iterdir())) == 6


@pytest.mark.parametrize("place", ["gs://nobucket/x", "gs://nobucket"])
def test_a_missing_bucket_is_one_line(server: BucketServer, place: str) -> None:
    with pytest.raises(
        RunError, match=rf"^{place}: not fetched \(.*\); check the bucket's name and the right to read it$"
    ):
        bucket.objects(place)


def test_without_credentials_it_says_which(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    with pytest.raises(
        ConfigError, match=r"gs://bucket/x: not fetched \(.*\); name a service account's key in GOOGLE_"
    ):
        bucket.objects("gs://bucket/x")


# A result in a bucket


def test_an_output_in_a_bucket_has_its_record_last(
    server: BucketServer, make: Callable[..., Any], tmp_path: Path
) -> None:
    config = make(output="gs://bucket/results/one")
    record = stage.run(config, work)
    assert sorted(server.names("results/one")) == sorted(f"results/one/{name}" for name in [*FILES, "stage.json"])
    assert server.stored[-1] == "results/one/stage.json" and server.stored[0] == "results/one/stage.json.partial"
    assert record["objects"] == {name: server.generation(f"results/one/{name}") for name in FILES}
    found = sources.resolve("gs://bucket/results/one", make(workspace=tmp_path / "other"))
    assert content_hash(found) == record["output_sha256"]
    stored = list(server.stored)
    assert stage.run(config, never)["key"] == record["key"] and server.stored == stored
    with pytest.raises(ConfigError, match="gs://bucket/results: exists and is not a stage's result"):
        stage.run(make(output="gs://bucket/results"), never)


def test_a_half_uploaded_directory_is_never_read_and_goes_on(
    server: BucketServer, make: Callable[..., Any], tmp_path: Path
) -> None:
    server.cut = lambda method, name: method != "GET" and name.endswith("two.bin")
    config = make(output="gs://bucket/out")
    with pytest.raises(
        RunError, match=r"^gs://bucket/out: not uploaded \(.*run it again: what is there complete is kept$"
    ):
        stage.run(config, work)
    assert "out/stage.json" not in server.names("out")
    with pytest.raises(RunError, match="gs://bucket/out: its upload is not complete; wait for it, or run the stage"):
        sources.resolve("gs://bucket/out", make(workspace=tmp_path / "other"))
    server.cut, server.uploaded = lambda method, name: False, 0
    record = stage.run(config, never)
    assert record["metrics"] == {"files": 3} and "out/stage.json" in server.names("out")
    assert server.uploaded < len(FILES["part/two.bin"]) + 10_000, "the others were there"


def test_a_killed_upload_goes_on(server: BucketServer, make: Callable[..., Any], tmp_path: Path) -> None:
    server.delay = 0.3
    program = (
        "import sys\nsys.path.insert(0, 'tests')\n"
        "from minitron import stage, transfers\nfrom minitron.config import parse\n"
        "from test_bucket import work\ntransfers.WORKERS = 1\n"
        f"stage.run(parse('prepare', {make(output='gs://bucket/out').model_dump(mode='json')!r}), work)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL
    )
    for _ in range(1500):
        if [name for name in server.stored if name.endswith(".bin")]:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "out/stage.json" not in server.names("out") and "out/stage.json.partial" in server.names("out")
    server.delay, server.uploaded = 0, 0
    stage.run(make(output="gs://bucket/out"), never)
    assert server.uploaded < SIZE and "out/stage.json" in server.names("out")


def test_another_upload_of_the_same_result_is_taken(
    server: BucketServer, make: Callable[..., Any], tmp_path: Path
) -> None:
    """Two machines finish at once: the second finds the first one's record when it wants to write its own."""
    config = make(output="gs://bucket/out")
    (other := make(output=tmp_path / "other")) and stage.run(other, work)

    def overtake(method: str, name: str) -> None:
        if method == "POST" and name == "out/stage.json":
            server.before = lambda method, name: None
            record = json.loads((tmp_path / "other" / "stage.json").read_text())
            objects = {name: server.generation(f"out/{name}") for name in FILES}
            server.put("out/stage.json", json.dumps(record | {"objects": objects, "winner": True}))

    server.before = overtake
    assert stage.run(config, work)["winner"] is True


def test_a_foreign_write_in_between_is_found(server: BucketServer, make: Callable[..., Any]) -> None:
    def disturb(method: str, name: str) -> None:
        if method == "POST" and name == "out/stage.json":
            return
        if method == "GET" and "out/words.txt" in server.stored:
            server.before = lambda method, name: None
            server.put("out/words.txt", b"other")

    server.before = disturb
    with pytest.raises(RunError, match="gs://bucket/out: another process writes there; wait for it"):
        stage.run(make(output="gs://bucket/out"), work)
    assert "out/stage.json" not in server.names("out")


def test_a_bucket_that_may_only_be_read_is_one_line(server: BucketServer, make: Callable[..., Any]) -> None:
    server.read_only = True
    with pytest.raises(
        RunError, match=r"gs://bucket/out: not uploaded \(.*403.*\); give this account the role Storage"
    ):
        stage.run(make(output="gs://bucket/out"), work)
    with pytest.raises(RunError, match="not written"):
        bucket.check_writable("gs://bucket/out")
    server.read_only = False
    bucket.check_writable("gs://bucket/out")
    assert not server.names("out")
    stage.run(make(output="gs://bucket/out"), never)


# By reference


def test_from_another_file_system_a_result_is_referred_to(
    make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_other_file_system(monkeypatch)
    record = stage.run(make(workspace=tmp_path / "ws"), work)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"reference.json", "stage.json"}
    home = tmp_path / "ws" / "prepare" / record["key"][:16]
    assert json.loads((tmp_path / "out" / "reference.json").read_text())["address"] == str(home)
    consumer = PruneConfig(output=tmp_path / "p", dataset=tmp_path / "out", teacher=tmp_path / "teacher", caching=False)

    def read(config: PruneConfig, directory: Path, tracker: Any) -> dict[str, Any]:
        assert (config.dataset / "part/two.bin").read_bytes() == FILES["part/two.bin"]
        return {"metrics": {}}

    found = stage.run(consumer, read)
    assert found["inputs"]["dataset"]["sha256"] == record["output_sha256"]
    assert stage.run(make(workspace=tmp_path / "ws"), never)["key"] == record["key"]
    home.rename(tmp_path / "gone")
    with pytest.raises(RunError, match=rf"out: refers to {home}, where there is no result: mount the volume"):
        stage.run(consumer, read)


def test_a_small_result_is_copied_as_kubeflow_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Any]
) -> None:
    on_other_file_system(monkeypatch)
    models = dict.fromkeys(("dataset", "teacher", "pruned", "student"), tmp_path / "teacher")
    make()
    config = EvaluateConfig(
        output=tmp_path / "e", workspace=tmp_path / "ws", teacher_before=str(tmp_path / "teacher"), **models
    )
    stage.run(config, work)
    assert (tmp_path / "e" / "words.txt").read_bytes() == b"three" and not (tmp_path / "e" / "reference.json").exists()


def test_a_damaged_reference_is_named(tmp_path: Path) -> None:
    (tmp_path / "reference.json").write_text('{"address": 1}')
    with pytest.raises(RunError, match=r"reference.json: not a reference to a result; delete the directory"):
        references.read(tmp_path)


def test_a_workspace_in_a_bucket_is_shared_by_machines_that_fetch_once(
    server: BucketServer, make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = stage.run(make(workspace="gs://bucket/ws"), work)
    address = f"gs://bucket/ws/prepare/{record['key'][:16]}"
    assert json.loads((tmp_path / "out" / "reference.json").read_text())["address"] == address
    assert SIZE <= server.uploaded < SIZE * 1.1 + 10_000

    def read(config: PruneConfig, directory: Path, tracker: Any) -> dict[str, Any]:
        assert (config.dataset / "part/two.bin").read_bytes() == FILES["part/two.bin"]
        return {"metrics": {}}

    def consume(output: str) -> dict[str, Any]:
        values = {"dataset": tmp_path / "out", "teacher": tmp_path / "teacher", "caching": False}
        return stage.run(PruneConfig(output=tmp_path / output, **values), read)

    server.downloaded = 0
    assert consume("here")["inputs"]["dataset"]["sha256"] == record["output_sha256"]
    assert server.downloaded < 10_000, "the machine that made it has it"
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "other machine"))
    assert stage.run(make(workspace="gs://bucket/ws", output=tmp_path / "again"), never)["key"] == record["key"]
    consume("there")
    consume("there too")
    assert SIZE <= server.downloaded < SIZE * 1.1 + 20_000, "once"


# What passes in a whole run


def _run(tmp_path: Path, workspace: str) -> Path:
    command = [sys.executable, "-c", "from minitron.cli import main; main()", "run", "compress", "--preset", "tiny"]
    command += ["--work-dir", str(tmp_path / "run"), "--set", f"workspace={workspace}"]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    (results,) = (tmp_path / "run" / "results").iterdir()
    return results


def _size(directory: Path, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in directory.rglob(pattern) if path.is_file())


MODELS = "*.safetensors"


def test_on_a_volume_a_run_moves_no_model(tmp_path: Path) -> None:
    """The workspace is on another file system, as on a cluster."""
    volume = Path("/dev/shm") / f"minitron-test-{os.getpid()}"
    try:
        results = _run(tmp_path, str(volume))
        stages = [path for stage in ("finetune", "prune", "distill") for path in (volume / stage).iterdir()]
        assert _size(results, MODELS) == _size(results, "*.bin") == 0 and len(stages) == 3
        assert all((results / "distill" / "distilled" / name).is_file() for name in ("reference.json", "stage.json"))
        assert _size(volume, MODELS) == sum(_size(path, MODELS) for path in stages), "one copy of each"
        assert _size(results) < 0.5 * _size(volume)
    finally:
        subprocess.run(["rm", "-rf", str(volume)], check=True)


def test_through_a_bucket_a_run_moves_every_model_once(server: BucketServer, tmp_path: Path) -> None:
    results = _run(tmp_path, "gs://bucket/ws")
    assert _size(results, MODELS) == 0
    names = [name for name in server.names("ws") if not name.startswith("ws/resolved/")]
    sizes = {stage: sum(1 for name in names if name.startswith(f"ws/{stage}/")) for stage in ("finetune", "distill")}
    assert all(sizes.values())
    client = server.client(f"http://127.0.0.1:{server.emulator}")
    artifacts = sum(blob.size for blob in client.list_blobs("bucket", prefix="ws"))
    assert artifacts > 500_000
    assert server.uploaded <= 1.05 * artifacts + 20_000
    assert server.downloaded <= 0.05 * artifacts + 100_000, "every stage ran on the machine that has it"
