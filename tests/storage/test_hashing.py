"""A large file is read once per change, however often its hash is asked for."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minitron.storage import hashing
from minitron.storage.hashing import NOTES, content_hash, keep_notes

CONTENT = bytes(range(256)) * 400


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Path]]:
    """Keep notes, and return the list of the files that were read whole."""
    files: list[Path] = []
    read_hash = hashing._read_hash

    def read_and_note(path: Path) -> str:
        files.append(path)
        return read_hash(path)

    monkeypatch.setattr(hashing, "_read_hash", read_and_note)
    with keep_notes(tmp_path / "workspace"):
        yield files


def test_a_file_is_read_once_also_under_another_name(weights: Path, read: list[Path], tmp_path: Path) -> None:
    expected = content_hash(weights)
    weights.parent.rename(tmp_path / "published")
    published = tmp_path / "published" / weights.name
    os.link(published, tmp_path / "linked")
    (tmp_path / "snapshot").symlink_to(published)
    assert {content_hash(path) for path in (published, tmp_path / "linked", tmp_path / "snapshot")} == {expected}
    assert read == [weights]


def _rewrite(path: Path) -> None:
    path.write_bytes(CONTENT[::-1])


def _replace_by_a_file_of_the_same_time(path: Path) -> None:
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.with_name("new").write_bytes(CONTENT[:-1] + b"x")
    os.utime(path.with_name("new"), ns=times)
    path.with_name("new").replace(path)


def _rewrite_and_restore_the_time(path: Path) -> None:
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=times)


@pytest.mark.parametrize("change", [_rewrite, _replace_by_a_file_of_the_same_time, _rewrite_and_restore_the_time])
def test_a_file_that_was_changed_is_read_again_at_once(
    weights: Path, read: list[Path], change: Callable[[Path], None]
) -> None:
    """The samples find the last one here; a bit between them, and the time set back, they would not."""
    before = content_hash(weights)
    change(weights)
    after = content_hash(weights)
    assert after != before and read == [weights] * 2
    assert content_hash(weights) == after and read == [weights] * 2


def test_a_file_that_changes_right_after_it_was_read_is_read_again(weights: Path, read: list[Path]) -> None:
    """Within a tick of the file system's clock its time would be the same: the note waits until the tick is over."""
    hashes = set()
    for number in range(20):
        weights.write_bytes(CONTENT[:-1] + bytes([number]))
        hashes.add(content_hash(weights))
    assert len(hashes) == len(read) == 20


def test_a_copy_is_read_and_noted(weights: Path, read: list[Path], tmp_path: Path) -> None:
    shutil.copytree(weights.parent, tmp_path / "copy")  # with the times
    hashes = {content_hash(directory) for directory in (weights.parent, tmp_path / "copy", tmp_path / "copy")}
    assert len(hashes) == 1 and read == [weights, tmp_path / "copy" / weights.name]


def test_a_file_that_changes_while_it_is_read_is_not_noted(
    weights: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_hash = hashing._read_hash

    def read_and_change(path: Path) -> str:
        found = read_hash(path)
        path.write_bytes(CONTENT[::-1])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(hashing, "_read_hash", read_and_change)
        before = content_hash(weights)
    assert content_hash(weights) != before and len(read) == 2


@pytest.mark.parametrize("fault", ["read-only", "damaged"])
def test_notes_that_cannot_be_used_cost_a_reading_and_no_error(
    weights: Path, read: list[Path], tmp_path: Path, fault: str
) -> None:
    notes = tmp_path / "workspace" / NOTES
    if fault == "read-only":  # these tests run as root, who may write everywhere
        notes.parent.mkdir()
        notes.write_text("no directory")
    first = content_hash(weights)
    for note in notes.glob("*"):
        note.write_text("[]")
    assert content_hash(weights) == first and len(read) == 2


def test_a_time_in_the_future_is_not_waited_for(weights: Path, read: list[Path]) -> None:
    os.utime(weights, (time.time() + 3600,) * 2)
    started = time.monotonic()
    assert content_hash(weights) == content_hash(weights) and len(read) == 2
    assert time.monotonic() - started < 2
