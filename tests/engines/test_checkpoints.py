"""What is damaged, cut off or missing is no checkpoint; what a resume needs is never deleted."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from minitron.engines import checkpoints
from minitron.engines.checkpoints import (
    MARKER,
    Checkpoint,
    ResumePoint,
    find_best,
    find_resume_point,
    mark_complete,
    publish_checkpoint,
    read_checkpoint,
)
from minitron.engines.hf.writer import StateWriter
from minitron.engines.progress import HISTORY
from tests.faults import injector


def write(directory: Path, name: str) -> Path:
    path = directory / name
    (path / "weights").mkdir(parents=True)
    (path / "weights" / "shard").write_bytes(os.urandom(1000))
    (path / "settings.json").write_text(name)
    return path


def save(directory: Path, step: int, best: int) -> Path:
    """Publish a checkpoint as the engines do."""
    path = write(directory, f"checkpoint-{step}")
    publish_checkpoint(path, {"best": best})
    return path


def save_best(directory: Path, step: int, loss: float) -> Path:
    path = write(directory, f"best-{step}")
    publish_checkpoint(path, {"loss": loss})
    return path


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["weights/shard", "settings.json", MARKER])
@pytest.mark.parametrize("damage", [cut_off, flip_bit, empty, Path.unlink])
def test_no_damage_is_overlooked(
    tmp_path: Path, name: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "model")
    mark_complete(path, {"loss": 1.0})
    assert read_checkpoint(path) == Checkpoint(path, {"loss": 1.0})
    damage(path / name)
    assert read_checkpoint(path) is None
    reason = {"weights/shard": "weights/shard", "settings.json": "settings.json", MARKER: "writing was interrupted"}[
        name
    ]
    assert capsys.readouterr().err.startswith(f"warning: {path}: {reason}")


def test_a_damaged_marker_says_nothing(tmp_path: Path) -> None:
    """Its numbers decide where a training goes on, and which state is the best."""
    path = save(tmp_path, 12, best=7)
    content = (path / MARKER).read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 7
        (path / MARKER).write_bytes(changed)
        marker = checkpoints._read_marker(path)
        assert marker is None or marker["note"] == {"best": 7}, position


def test_what_a_checkpoint_supersedes_goes_and_what_a_resume_needs_stays(tmp_path: Path) -> None:
    best_2, checkpoint_3 = save_best(tmp_path, 2, 3.0), save(tmp_path, 3, best=2)
    save_best(tmp_path, 4, 2.5)
    best_5 = save_best(tmp_path, 5, 2.0)
    assert names(tmp_path) == ["best-2", "best-5", "checkpoint-3"]
    assert find_best(tmp_path) == Checkpoint(best_5, {"loss": 2.0})
    write(tmp_path, "checkpoint-6")  # cut off
    expected = ResumePoint(Checkpoint(checkpoint_3, {"best": 2}), Checkpoint(best_2, {"loss": 3.0}))
    assert find_resume_point(tmp_path) == expected and expected.checkpoint.step == 3
    assert names(tmp_path) == ["best-2", "checkpoint-3"], "step 5 is done again, and its state with it"
    save_best(tmp_path, 5, 2.0)
    save(tmp_path, 6, best=5)
    assert names(tmp_path) == ["best-5", "checkpoint-6"]


def test_the_checkpoint_before_is_used_while_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill comes between the marker of the new one and the deletion of the one before."""
    save_best(tmp_path, 2, 3.0)
    before = save(tmp_path, 3, best=2)
    with monkeypatch.context() as kill:
        kill.setattr(checkpoints, "_delete_checkpoint", lambda path: None)
        save_best(tmp_path, 5, 2.0)
        newest = save(tmp_path, 6, best=5)
    flip_bit(newest / "weights" / "shard")
    point = find_resume_point(tmp_path)
    assert point and point.checkpoint.path == before and point.best.step == 2
    assert names(tmp_path) == ["best-2", "checkpoint-3"]


def test_a_checkpoint_whose_best_state_is_lost_is_not_used(tmp_path: Path) -> None:
    """The result would be a worse state without a word."""
    best = save_best(tmp_path, 2, 3.0)
    save(tmp_path, 30, best=2)
    cut_off(best / "settings.json")
    assert find_resume_point(tmp_path) is None
    assert not names(tmp_path)


def test_a_half_deleted_checkpoint_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 3, best=2)
    with monkeypatch.context() as kill, pytest.raises(KeyboardInterrupt):
        kill.setattr(checkpoints.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        checkpoints._delete_checkpoint(path)
    assert (path / "weights" / "shard").exists() and read_checkpoint(path) is None


def start_writer(directory: Path) -> tuple[StateWriter, dict[str, torch.Tensor]]:
    """Return a writer to DIRECTORY/work, and the state that it saves: a weight of ones, and its moment of zeros."""
    for name in ("initial", "work"):
        (directory / name).mkdir()
    (directory / "initial" / "config.json").write_text("{}")
    (directory / "work" / HISTORY).write_text("step 1")
    state = {"weight": torch.ones(1 << 20), "weight.exp_avg": torch.zeros(1 << 20)}
    writer = StateWriter(directory / "initial", directory / "work", {"weight": state["weight"]}, state)
    return writer, state


def test_a_state_is_written_as_it_was_however_the_training_goes_on(tmp_path: Path) -> None:
    writer, state = start_writer(tmp_path)
    with writer:
        writer.save(1, {"loss": 2.0}, {"best": 1})
        (tmp_path / "work" / HISTORY).write_text("step 2")
        for tensor in state.values():
            tensor.fill_(7)
        writer.save(2, {"loss": 1.0}, None)
    checkpoint, read = tmp_path / "work" / "checkpoint-1", {name: torch.empty(1 << 20) for name in state}
    dcp.load(read, checkpoint_id=checkpoint, no_dist=True)
    assert (checkpoint / HISTORY).read_text() == "step 1"
    assert read["weight"].eq(1).all() and read["weight.exp_avg"].eq(0).all()
    assert names(tmp_path / "work") == ["best-1", "best-2", "checkpoint-1", HISTORY]
    for step, value in ((1, 1), (2, 7)):
        assert load_file(tmp_path / "work" / f"best-{step}" / "model.safetensors")["weight"].eq(value).all()


@pytest.mark.parametrize("file", ["best-1/model.safetensors", "checkpoint-1/__0_0.distcp", f"checkpoint-1/{MARKER}"])
def test_a_state_that_cannot_be_written_ends_the_training(tmp_path: Path, file: str) -> None:
    """At the next step, and with the reason; what was complete before stays."""
    writer, _ = start_writer(tmp_path)
    with injector.armed(tmp_path / "work") as sites, writer:
        writer.save(1, {"loss": 2.0}, {"best": 1})
    (number,) = [count for count, site in enumerate(sites, 1) if site.path.endswith(file)]
    (tmp_path / "again").mkdir()
    writer, _ = start_writer(tmp_path / "again")
    full_disk = injector.armed(tmp_path / "again" / "work", number, errno.ENOSPC)
    with full_disk, pytest.raises(OSError, match="No space"), writer:
        writer.save(1, {"loss": 2.0}, {"best": 1})
        while True:
            writer.save(2, None, None)
    assert read_checkpoint(tmp_path / "again" / "work" / "checkpoint-1") is None
