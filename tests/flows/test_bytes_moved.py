"""How many bytes a whole run moves, by either route: the artifacts once, and nearly nothing through Kubeflow's own."""

import json
import os
import runpy
import shutil
import tempfile
from pathlib import Path
from typing import Any

from minitron.config.stages import LARGE, STAGES
from minitron.storage.layout import RECORD, REFERENCE
from tests.constants import REPOSITORY
from tests.servers import forks
from tests.servers.gcs import World

BENCHMARKS = REPOSITORY / "benchmarks"
COUNTING = f"import runpy; runpy.run_path({str(BENCHMARKS / 'counter' / 'sitecustomize.py')!r})\n{forks.COMMAND}"
measure = runpy.run_path(str(BENCHMARKS / "hashing.py"))["measure"]

SMALL = 60_000
"""Bytes: more than a reference and a record take."""


def run(directory: Path, workspace: str, cache: Path, *arguments: str) -> dict[str, Path]:
    """Run the preset tiny; return the directories of Kubeflow's artifacts."""
    command = [COUNTING, "run", "compress", "--preset", "tiny", "--work-dir", str(directory)]
    command += ["--set", f"workspace={workspace}", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= {"MINITRON_CACHE": str(cache), "HASHED": str(directory / "hashed")}
    shutil.rmtree(directory / "results", ignore_errors=True)
    (directory / "hashed").unlink(missing_ok=True)
    done = forks.run_python("-c", *command, environment=environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert json.loads((directory / "summary.json").read_text())["student"]["parameters"] > 0
    return {path.parent.parent.name: path.parent for path in directory.glob(f"results/*/*/*/{RECORD}")}


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def check_artifacts(artifacts: dict[str, Path]) -> None:
    """What goes through Kubeflow's artifacts: references to what is large, copies of what is small."""
    assert artifacts.keys() == STAGES.keys()
    for stage in LARGE:
        assert {path.name for path in artifacts[stage].iterdir()} == {REFERENCE, RECORD}
        assert size(artifacts[stage]) < SMALL, stage
    assert (artifacts["evaluate"] / "report.html").is_file() and (artifacts["register"] / "registered.json").is_file()


def test_in_a_volume_results_lie_once(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        volume = Path(name)

        def run_and_check() -> Path:
            check_artifacts(run(tmp_path / "run", name, tmp_path / "cache"))
            return tmp_path / "run" / "hashed"

        claim = measure(run_and_check, volume)
        assert claim["models"] == 4 and 0.99 <= claim["of_the_first"] <= 1.1, "once where it is made"
        assert claim["claim"] == "bytes_hashed_over_models" and claim["value"] <= 0.1, "nothing that is known"
        weights = list(volume.rglob("model*.safetensors"))
        assert len(weights) == 4, "the sample, corrected, pruned and distilled"
        assert not list((tmp_path / "run").rglob("results/**/*.safetensors")) and not (tmp_path / "cache").exists()


def test_through_a_bucket_results_move_once(world: World, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    artifacts_of_first = run(tmp_path / "run", "gs://bucket/ws", cache)
    check_artifacts(artifacts_of_first)
    artifacts = {name: _size_in_bucket(world, f"ws/{name}/") for name in STAGES}
    total = sum(artifacts.values())
    assert all(artifacts.values()) and len(list(cache.glob("results/*"))) == len(STAGES)
    through_kubeflow = {name: size(path) for name, path in artifacts_of_first.items()}
    print(f"artifacts {artifacts}, uploaded {world.uploaded}, through Kubeflow {through_kubeflow}")
    assert world.uploaded <= total * 1.05, (world.uploaded, total)
    fetched = [name for name in world.fetched() if not name.endswith(RECORD)]
    assert not fetched, "this machine made them all"

    world.log.clear()
    artifacts_again = run(tmp_path / "run", "gs://bucket/ws", tmp_path / "cache-of-another-machine")
    check_artifacts(artifacts_again)
    assert world.uploaded == 0
    large = {name for name in world.fetched() if name.split("/")[1] in LARGE and not name.endswith(RECORD)}
    assert not large, "reuse is decided without a download"

    world.log.clear()
    third = tmp_path / "cache-of-a-third-machine"
    run(tmp_path / "run", "gs://bucket/ws", third, "--set", "evaluate.evaluation_sequences=8")
    counts: dict[str, int] = {}
    for name in world.fetched():
        if not name.endswith(RECORD):
            counts[name] = counts.get(name, 0) + 1
    assert counts and set(counts.values()) == {1}, "what evaluate reads is fetched once"
    assert {name.split("/")[1] for name in counts} == set(LARGE)
    print(f"a third machine downloaded {world.downloaded} of {sum(artifacts[name] for name in LARGE)}")
    assert world.downloaded <= 1.05 * sum(artifacts[name] for name in LARGE)


def _size_in_bucket(world: World, prefix: str) -> int:
    objects: dict[str, Any] = world.storage.objects["bucket"]
    return sum(int(entry["size"]) for name, entry in objects.items() if name.startswith(prefix))
