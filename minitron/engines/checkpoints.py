"""Checkpoints with a marker of completeness, for both engines.

A checkpoint is a directory of the work in progress, such as `checkpoint-300` or `best-250`. Its marker `complete.json`
is written last, when all other files are on the disk. It lists their names, sizes and CRC32C, and has a note of the
engine. A kill leaves a directory without a marker; a directory that differs from its marker is damaged. Neither is
used.

The name ends with the step, so that no checkpoint replaces another. Superseded ones are deleted once the new marker is
written.
"""

import json
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from minitron.storage.files import write_atomically
from minitron.storage.hashing import file_crc32c, list_files
from minitron.storage.staging import sync_files

MARKER = "complete.json"

CHECKPOINT, BEST = "checkpoint", "best"
"""Prefixes of the names: a state to resume from, and the best state."""

_THREADS = 8
"""Each computes the checksums of 9 GB/s in memory, or waits for the disk."""


class Checkpoint(NamedTuple):
    """A complete checkpoint."""

    path: Path
    note: dict[str, Any]

    @property
    def step(self) -> int:
        """The step in its name."""
        return _parse_step(self.path)


class ResumePoint(NamedTuple):
    """The state from which a training resumes: its last checkpoint, and the best state up to that step."""

    checkpoint: Checkpoint
    best: Checkpoint


def publish_checkpoint(path: Path, note: dict[str, Any]) -> None:
    """Complete a checkpoint or a best state, and delete those that it supersedes.

    Three are kept: the last checkpoint, the best state up to its step (for a resume), and the best state since.

    Args:
        path: the directory `NAME-STEP`, with all its files.
        note: JSON. A checkpoint's note has `best`, the step of the best state.
    """
    mark_complete(path, note)
    checkpoints, states = (list(_list_marked(path.parent, name)) for name in (CHECKPOINT, BEST))
    kept = {entry.path for entry in checkpoints[:1] + states[:1]}
    kept |= {_best_path(entry) for entry in checkpoints[:1]}
    for entry in checkpoints + states:
        if entry.path not in kept:
            _delete_checkpoint(entry.path)


def mark_complete(path: Path, note: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Sync a directory's files to the disk, then write its marker."""
    files = [file for file in list_files(path) if file != path / MARKER]
    sync_files(path)
    facts = zip(files, _sum_up_files(files), strict=True)
    entries = {str(file.relative_to(path)): [file.stat().st_size, checksum] for file, checksum in facts}
    content = {"note": dict(note), "files": entries}
    write_atomically(path / MARKER, {"content": content, "crc32": _sum_up(content)})


def find_resume_point(directory: Path) -> ResumePoint | None:
    """Return the newest intact checkpoint with its best state, None if there is none; delete all others.

    Later steps are repeated, so that a resumed training equals one that was never killed.
    """
    point = next(_find_whole_points(directory), None)
    kept = {point.checkpoint.path, point.best.path} if point else set()
    for path in [*_list_paths(directory, CHECKPOINT), *_list_paths(directory, BEST)]:
        if path not in kept:
            _delete_checkpoint(path)
    return point


def find_best(directory: Path) -> Checkpoint | None:
    """Return the newest intact best state, None if there is none."""
    return next(filter(None, map(read_checkpoint, _list_paths(directory, BEST))), None)


def read_checkpoint(path: Path) -> Checkpoint | None:
    """Return a checkpoint if it is intact; else print the reason in one line, and return None."""
    marker = _read_marker(path)
    reason = "writing was interrupted" if marker is None else _find_damage(path, marker["files"])
    if marker is not None and reason is None:
        return Checkpoint(path, marker["note"])
    if path.exists():
        print(f"warning: {path}: {reason}; not used", file=sys.stderr, flush=True)
    return None


def _find_whole_points(directory: Path) -> Iterator[ResumePoint]:
    for path in _list_paths(directory, CHECKPOINT):
        if (checkpoint := read_checkpoint(path)) and (best := read_checkpoint(_best_path(checkpoint))):
            yield ResumePoint(checkpoint, best)


def _best_path(checkpoint: Checkpoint) -> Path:
    return checkpoint.path.with_name(f"{BEST}-{checkpoint.note['best']}")


def _list_paths(directory: Path, name: str) -> list[Path]:
    """Return the directories NAME-STEP, the newest first."""
    return sorted(directory.glob(f"{name}-*[0-9]"), key=_parse_step, reverse=True)


def _list_marked(directory: Path, name: str) -> Iterator[Checkpoint]:
    """Yield the directories that have a marker, the newest first; the files are not read."""
    for path in _list_paths(directory, name):
        if marker := _read_marker(path):
            yield Checkpoint(path, marker["note"])


def _parse_step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _read_marker(path: Path) -> dict[str, Any] | None:
    """Return the content of a directory's marker, None if it is missing or damaged."""
    try:
        marker = json.loads((path / MARKER).read_text())
        return marker["content"] if _sum_up(marker["content"]) == marker["crc32"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _find_damage(path: Path, files: dict[str, list[Any]]) -> str | None:
    """Describe how the files differ from the marker; None if they do not."""
    if wrong := [name for name, (size, _) in files.items() if _get_size(path / name) != size]:
        return f"{wrong[0]} has the wrong size"
    sums = _sum_up_files([path / name for name in files])
    wrong = [name for (name, (_, expected)), found in zip(files.items(), sums, strict=True) if found != expected]
    return f"{wrong[0]} is damaged" if wrong else None


def _get_size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _sum_up_files(files: list[Path]) -> list[str]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(file_crc32c, files))


def _sum_up(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint, its marker first: after a kill, nothing looks complete."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
