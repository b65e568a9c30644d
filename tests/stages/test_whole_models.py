"""A model comes out of every stage with every file and key that it had, changed only where it was cut."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from minitron.config.stages import FinetuneConfig, PruneConfig
from minitron.engines.nemo import engine as nemo
from minitron.models.surgery import Shape
from minitron.stages import finetune
from minitron.storage.hashing import content_hash

TRAINING: dict[str, Any] = {
    "sequence_length": 32,
    "micro_batch_size": 2,
    "global_batch_size": 2,
    "max_steps": 2,
    "validation_interval": 2,
    "validation_sequences": 4,
    "learning_rate": 1e-3,
}


def make_snapshot(model: Path, root: Path) -> Path:
    """Lay a model out as huggingface_hub's cache does: a directory of relative links to blobs named by their hash."""
    blobs, snapshot = root / "blobs", root / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in model.iterdir():
        name = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blobs / name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", name))
    return snapshot


def assert_real_files(directory: Path, model: Path) -> None:
    """Check that a directory has the files of a model, and no links."""
    files = {path.name: path for path in directory.iterdir() if path.name not in ("stage.json", "checkpoints")}
    assert files.keys() == {path.name for path in model.iterdir()}
    for name, path in files.items():
        assert path.is_file() and not path.is_symlink() and path.read_bytes() == (model / name).read_bytes()


@pytest.fixture(scope="module")
def snapshot(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_snapshot(teacher, tmp_path_factory.mktemp("hub") / "models--org--name")


@pytest.mark.parametrize("change", [{"enabled": False}, {"learning_rate": 3.0, "min_learning_rate": 3.0}])
def test_a_hub_model_that_is_passed_on_comes_out_as_real_files(
    snapshot: Path, teacher: Path, dataset: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Fine-tuning that is switched off, and one that makes the model worse."""
    output = tmp_path / "out"
    record = finetune.run(FinetuneConfig(teacher=str(snapshot), dataset=dataset, output=output, **TRAINING | change))
    assert record["metrics"]["corrected"] == 0
    assert record["inputs"]["teacher"]["sha256"] == record["output_sha256"] == content_hash(teacher)
    shutil.copytree(output, moved := tmp_path / "elsewhere" / "moved")
    assert_real_files(moved, teacher)


def test_engine_nemo_passes_a_hub_model_on_as_real_files(
    snapshot: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a size to cut it needs no NeMo, which is not installed here."""
    monkeypatch.setattr(nemo, "check_installed", lambda: None)
    config = PruneConfig(output=tmp_path / "unused", teacher=snapshot, dataset=tmp_path, engine="nemo")
    shape = Shape(**{name: json.loads((teacher / "config.json").read_text())[name] for name in Shape.__annotations__})
    (tmp_path / "out").mkdir()
    nemo.prune(config, shape, None, tmp_path / "out")
    assert_real_files(tmp_path / "out", teacher)
