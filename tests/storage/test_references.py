"""Both routes of a result: by reference in a volume on another file system, and by a bucket and a cache."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minitron.config.parse import parse
from minitron.config.stages import EvaluateConfig, FinetuneConfig, PrepareConfig, PruneConfig, StageConfig
from minitron.errors import ConfigError, RunError
from minitron.runtime import stage
from minitron.stages import finetune, prepare
from minitron.storage import references
from minitron.storage.bucket import pin_objects
from minitron.storage.hashing import content_hash
from minitron.storage.layout import RECORD, REFERENCE
from tests.servers.gcs import World

MADE = 50_000


def work(config: StageConfig, directory: Path, tracker: Any) -> dict[str, Any]:
    """A stage that writes 50 kB, and says where its inputs were."""
    content = str(getattr(config, "seed", 0)).encode() * MADE
    (directory / "model.safetensors").write_bytes(content[:MADE])
    return {"metrics": {}, "seen": str(getattr(config, "dataset", ""))}


@pytest.fixture
def volume() -> Iterator[Path]:
    """A directory on another file system than the tests', as a mounted claim is."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def make(tmp_path: Path, teacher: Path, inputs: dict[str, Path]) -> Callable[..., Any]:
    """Return a function that makes a stage's configuration over real inputs."""

    def configuration(name: str, workspace: Any, output: Any, **values: Any) -> Any:
        known = {"corpus": str(inputs["corpus"]), "teacher": str(teacher)}
        fields = {"prepare": ("corpus", "teacher"), "finetune": ("teacher",), "prune": ("teacher",)}.get(name, ())
        given = {field: known[field] for field in fields} | values
        return parse(name, {"workspace": workspace, "output": output} | given)

    return configuration


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def find_files(record: dict[str, Any]) -> str:
    """Return the name of the directory in the bucket that a record of prepare names."""
    return f"ws/prepare/{record['key'][:16]}/{record['directory']}"


def test_a_volume_on_another_file_system_is_referred_to(make: Callable[..., Any], volume: Path, tmp_path: Path) -> None:
    record = stage.run(make("prepare", volume, tmp_path / "out"), work)
    home = volume / "prepare" / record["key"][:16]
    assert names(tmp_path / "out") == {REFERENCE, RECORD}
    assert json.loads((tmp_path / "out" / REFERENCE).read_text()) == {
        "address": str(home),
        "sha256": record["output_sha256"],
        "key": record["key"],
    }
    assert json.loads((tmp_path / "out" / RECORD).read_text()) == record
    assert references.follow_reference(tmp_path / "out") == home
    again = stage.run(make("prepare", volume, tmp_path / "out"), work)
    assert again == record, "a reference is no foreign directory"


def test_a_referenced_input_counts_as_the_real_one(make: Callable[..., Any], volume: Path, tmp_path: Path) -> None:
    first = stage.run(make("prepare", volume, tmp_path / "out"), work)
    real = volume / "prepare" / first["key"][:16]
    record = stage.run(make("prune", volume, tmp_path / "pruned", dataset=tmp_path / "out"), work)
    assert record["inputs"]["dataset"] == {"address": str(tmp_path / "out"), "sha256": content_hash(real)}
    assert record["config"]["dataset"] == str(tmp_path / "out") and record["seen"] == str(real)
    direct = stage.run(make("prune", None, tmp_path / "direct", dataset=real), work)
    assert direct["key"] == record["key"]


def test_a_small_result_is_copied(make: Callable[..., Any], volume: Path, tmp_path: Path, dataset: Path) -> None:
    models = dict.fromkeys(("teacher_before", "teacher", "pruned", "student"), dataset)
    config = make("evaluate", volume, tmp_path / "out", dataset=dataset, **{n: str(p) for n, p in models.items()})
    assert isinstance(config, EvaluateConfig)
    stage.run(config, work)
    assert names(tmp_path / "out") == {"model.safetensors", RECORD}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            "gone",
            r"out: refers to .*, which holds no result; mount the volume that it was written to, or run the stage",
        ),
        ("remade", r"out: refers to content \w{12}, but .* now holds 0+; run the stage that writes it again"),
        ("changed", r"content hash \w{12} is not the \w{12} its stage.json records"),
        ("torn", r"reference.json: not a reference to a result; delete the directory and run its stage again"),
    ],
)
def test_a_reference_to_nothing_says_so(
    make: Callable[..., Any], volume: Path, tmp_path: Path, damage: str, message: str
) -> None:
    record = stage.run(make("prepare", volume, tmp_path / "out"), work)
    home = volume / "prepare" / record["key"][:16]
    match damage:
        case "gone":
            shutil.rmtree(home)
        case "remade":
            (home / RECORD).write_text(json.dumps(record | {"output_sha256": "0" * 64}))
        case "changed":
            (home / "model.safetensors").write_text("x")
        case _:
            (tmp_path / "out" / REFERENCE).write_text("{")
    with pytest.raises(RunError, match=message):
        stage.run(make("prune", volume, tmp_path / "pruned", dataset=tmp_path / "out"), work)
    assert not (tmp_path / "pruned").exists()


def test_on_the_same_file_system_it_is_linked(make: Callable[..., Any], tmp_path: Path) -> None:
    record = stage.run(make("prepare", tmp_path / "workspace", tmp_path / "out"), work)
    home = tmp_path / "workspace" / "prepare" / record["key"][:16]
    assert (home / "model.safetensors").stat().st_ino == (tmp_path / "out" / "model.safetensors").stat().st_ino


def test_a_workspace_in_a_bucket_keeps_results_for_every_machine(
    make: Callable[..., Any], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = stage.run(make("prepare", "gs://bucket/ws", tmp_path / "out"), work)
    place = find_files(record)
    files = [f"{place}/model.safetensors", f"{place}/{RECORD}"]
    assert world.names("ws/prepare") == [*files, f"ws/prepare/{record['key'][:16]}/{RECORD}"]
    assert json.loads((tmp_path / "out" / REFERENCE).read_text())["address"] == f"gs://bucket/{place}"
    assert names(tmp_path / "out") == {REFERENCE, RECORD}
    world.log.clear()
    pruned = stage.run(make("prune", "gs://bucket/ws", tmp_path / "pruned", dataset=tmp_path / "out"), work)
    assert not [name for name in world.fetched() if "safetensors" in name], "this machine has it in its cache"
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache-of-another-machine"))
    world.log.clear()
    for name, values in (("prepare", {}), ("prune", {"dataset": tmp_path / "out"})):
        found = stage.run(make(name, "gs://bucket/ws", tmp_path / "again", **values), lambda *_: 1 / 0)  # type: ignore
        assert found["key"] in (record["key"], pruned["key"])
        shutil.rmtree(tmp_path / "again")
    assert not [name for name in world.fetched() if "safetensors" in name], "reuse is decided without a download"
    third = stage.run(make("prune", "gs://bucket/ws", tmp_path / "third", dataset=tmp_path / "out", seed=7), work)
    assert world.fetched().count(f"{place}/model.safetensors") == 1
    assert content_hash(Path(third["seen"])) == record["output_sha256"]
    assert third["config"]["workspace"] == "gs://bucket/ws"


def test_without_caching_it_is_made_and_uploaded_again(make: Callable[..., Any], world: World, tmp_path: Path) -> None:
    first = stage.run(make("prepare", "gs://bucket/ws", tmp_path / "out"), work)
    second = stage.run(make("prepare", "gs://bucket/ws", tmp_path / "out", caching=False), work)
    assert second["started"] > first["started"] and second["output_sha256"] == first["output_sha256"]


def test_a_result_damaged_in_the_bucket_is_made_again(make: Callable[..., Any], world: World, tmp_path: Path) -> None:
    first = stage.run(make("prepare", "gs://bucket/ws", tmp_path / "out"), work)
    world.put(f"{find_files(first)}/model.safetensors", b"damaged")
    second = stage.run(make("prepare", "gs://bucket/ws", tmp_path / "out"), work)
    assert second["started"] > first["started"]
    assert world.storage.get_file("bucket", f"{find_files(second)}/model.safetensors") == b"1234" * 12_500


def test_a_result_that_was_made_and_not_uploaded_is_uploaded(
    make: Callable[..., Any], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make("prepare", "gs://bucket/ws", tmp_path / "out")
    world.fault = lambda request: 403 if request.uploaded else None
    with pytest.raises(RunError, match=r"gs://bucket/ws/prepare/\w{16}/\w{16}-0: not uploaded \(403"):
        stage.run(config, work)
    assert not (tmp_path / "out").exists()
    world.fault = lambda request: None
    record = stage.run(config, lambda *_: 1 / 0)  # type: ignore
    assert f"ws/prepare/{record['key'][:16]}/{RECORD}" in world.names()
    assert references.follow_reference(tmp_path / "out").is_relative_to(tmp_path / "cache")


def test_an_output_in_a_bucket_is_the_result(make: Callable[..., Any], world: World, tmp_path: Path) -> None:
    for workspace in (None, tmp_path / "workspace"):
        output = f"gs://bucket/out/{workspace is None}"
        record = stage.run(make("prepare", workspace, output), work)
        assert stage.run(make("prepare", workspace, output), lambda *_: 1 / 0) == record  # type: ignore
        assert record["config"]["output"] == output
        pruned = stage.run(make("prune", None, tmp_path / f"{workspace is None}", dataset=output), work)
        entry = pruned["inputs"]["dataset"]
        assert (entry["address"], entry["sha256"]) == (output, record["output_sha256"])
        assert entry["snapshot"].startswith(f"{output}/")
        assert content_hash(Path(pruned["seen"])) == record["output_sha256"]
    with pytest.raises(ConfigError, match="output gs://bucket/out/True: holds a result of prepare, not of prune"):
        stage.run(make("prune", None, "gs://bucket/out/True", dataset="gs://bucket/out/False"), work)
    world.put("mine/thesis.txt", b"years of work")
    with pytest.raises(ConfigError, match="output gs://bucket/mine: exists, and is not a stage's result"):
        stage.run(make("prepare", None, "gs://bucket/mine"), work)
    assert world.names("mine") == ["mine/thesis.txt"]


def test_an_output_in_a_bucket_refers_to_the_workspaces_result(
    make: Callable[..., Any], world: World, tmp_path: Path
) -> None:
    record = stage.run(make("prepare", "gs://bucket/ws", "gs://bucket/out"), work)
    assert [Path(name).name for name in world.names("out")] == [REFERENCE, RECORD, RECORD]
    assert stage.run(make("prepare", "gs://bucket/ws", "gs://bucket/out"), work) == record
    assert len(world.names("out")) == 3, "an equal reference is not written again"
    record = stage.run(make("prepare", "gs://bucket/ws", "gs://bucket/out", caching=False), work)
    pruned = stage.run(make("prune", "gs://bucket/ws", "gs://bucket/pruned", dataset="gs://bucket/out"), work)
    entry = pruned["inputs"]["dataset"]
    assert (entry["address"], entry["sha256"]) == ("gs://bucket/out", record["output_sha256"])
    assert entry["snapshot"].startswith("gs://bucket/out/")
    assert content_hash(Path(pruned["seen"])) == record["output_sha256"]


def test_a_changed_result_in_the_bucket_is_not_taken_for_the_one_referred_to(
    make: Callable[..., Any], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = stage.run(make("prepare", "gs://bucket/ws", tmp_path / "out"), work)
    world.put(f"{find_files(record)}/model.safetensors", b"changed")
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(
        RunError,
        match=r"gs://bucket/ws/prepare/\w+/\w+-0: holds content \w{12}, but the reference is to \w{12}; run the stage",
    ):
        stage.run(make("prune", "gs://bucket/ws", tmp_path / "pruned", dataset=tmp_path / "out"), work)
    assert not list((tmp_path / "elsewhere").rglob("model.safetensors"))


def test_a_base_model_that_is_passed_on_lies_on_the_disk_once(
    make: Callable[..., Any], world: World, tmp_path: Path, teacher: Path, dataset: Path
) -> None:
    for path in teacher.iterdir():
        world.put(f"models/llama/{path.name}", path)
    for workspace in (tmp_path / "workspace", "gs://bucket/ws"):
        values = {"teacher": "gs://bucket/models/llama", "dataset": dataset, "enabled": False}
        config = make("finetune", workspace, tmp_path / f"out-{isinstance(workspace, str)}", **values)
        assert isinstance(config, FinetuneConfig)
        world.log.clear()
        finetune.run(config)
        there = tmp_path / ("cache" if isinstance(workspace, str) else "workspace")
        weights = list(there.rglob("model.safetensors"))
        assert len(weights) == 2 and len({path.stat().st_ino for path in weights}) == 1, weights
        assert world.fetched().count("models/llama/model.safetensors") == 1


@pytest.mark.parametrize("address", ["gs://bucket/corpus", "gs://bucket/corpus/tiny.jsonl"])
def test_a_corpus_in_a_bucket_is_its_snapshot(
    make: Callable[..., Any], world: World, tmp_path: Path, inputs: dict[str, Path], address: str
) -> None:
    world.put("corpus/tiny.jsonl", inputs["corpus"] / "tiny.jsonl")
    shares = {"validation_fraction": 0.1, "test_fraction": 0.1}
    config = make("prepare", tmp_path / "workspace", tmp_path / "out", corpus=address, **shares)
    assert isinstance(config, PrepareConfig)
    record = prepare.run(config)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    generation = world.generation("bucket", "corpus/tiny.jsonl")
    assert manifest["corpus_objects"] == [f"tiny.jsonl#{generation}"]
    assert record["inputs"]["corpus"] == {"address": address, "sha256": manifest["corpus_sha256"]}
    local = prepare.run(make("prepare", None, tmp_path / "local", corpus=str(inputs["corpus"]), **shares))
    assert local["metrics"]["train_tokens"] == record["metrics"]["train_tokens"]
    world.log.clear()
    pin_objects.cache_clear()
    assert prepare.run(config) == record and not world.fetched(), "reuse is decided without a download"
    world.put("corpus/tiny.jsonl", (inputs["corpus"] / "tiny.jsonl").read_bytes())
    pin_objects.cache_clear()
    assert prepare.run(config)["key"] != record["key"]


def test_a_corpus_that_changes_while_it_is_fetched_is_refused(
    make: Callable[..., Any], world: World, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    world.put("corpus/tiny.jsonl", inputs["corpus"] / "tiny.jsonl")
    config = make("prepare", tmp_path / "workspace", tmp_path / "out", corpus="gs://bucket/corpus")
    pin_objects("gs://bucket/corpus")
    world.put("corpus/tiny.jsonl", b'{"text": "changed"}\n')
    with pytest.raises(RunError, match="gs://bucket/corpus: an object changed during the download; run it"):
        prepare.run(config)
    assert not (tmp_path / "out").exists()


def test_a_movable_address_means_one_model_on_every_machine(
    make: Callable[..., Any], world: World, tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minitron.runtime import model_sources

    for path in teacher.iterdir():
        world.put(f"models/llama/{path.name}", path)
    config = make("prune", "gs://bucket/ws", tmp_path / "out", dataset=teacher, pipeline_run_id="run-1")
    assert isinstance(config, PruneConfig)
    first = model_sources.local_model("gs://bucket/models/llama", config)
    world.put("models/llama/extra.json", b"{}")
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache-of-another-machine"))
    with pytest.raises(RunError, match="an object changed during the download"):
        model_sources.local_model("gs://bucket/models/llama", config)
    other = model_sources.local_model(
        "gs://bucket/models/llama", config.model_copy(update={"pipeline_run_id": "run-2"})
    )
    assert content_hash(other) != content_hash(first)
