"""Hash the content of files and directories: equal hashes mean that a result can be reused.

A large file is read once per change, not once per reader: a note keeps its hash while a stage runs. The note's name is
the file's size, modification time and inode, which a rename and a hard link keep. The note is valid if samples of the
content are unchanged. So a copy is read again, and so is a file that was written or replaced. Damage between the
samples that changes neither size, time nor inode (by a failing disk, say) is not detected.
"""

import base64
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import google_crc32c

from minitron.errors import ConfigError, RunError
from minitron.storage.files import write_atomically
from minitron.storage.layout import RECORD, read_record

NOTES = "hashes"
"""Folder of the notes, in the workspace or the cache. You may delete any note: its file is read again."""

_NOTED_SIZE = 64 * 1024
"""Smallest size in bytes of a file with a note; reading a smaller file is as fast as reading its note."""

_SAMPLES, _SAMPLE_SIZE = 16, 256
"""Number of evenly spread samples of a file, and bytes of each. Two models of the same shape differ in them."""

_CLOCK_TICK, _COARSE_CLOCK_TICK = 20_000_000, 2_000_000_000
"""Nanoseconds after which a change certainly gets another modification time. Linux's clock for files ticks every 10 ms
or faster; some file systems store only whole seconds, or even seconds."""

_notes: ContextVar[Path | None] = ContextVar("notes", default=None)


@contextmanager
def keep_notes(directory: Path) -> Iterator[None]:
    """Note the hashes of large files in a directory that outlives the task, while the block runs."""
    token = _notes.set(directory / NOTES)
    try:
        yield
    finally:
        _notes.reset(token)


def identify_content(directory: Path) -> str:
    """Return the hash of a directory's content; of a result its record has it, and the stage has compared the two."""
    record = read_record(directory)
    return record["output_sha256"] if record else content_hash(directory)


def content_hash(path: Path) -> str:
    """Return the sha256 of a file, or of a directory's names and contents without stage.json.

    A link counts as its target: a directory of links has the hash of the same files without links.

    Raises:
        ConfigError: a link is broken.
    """
    if path.is_file():
        return hash_file(path)
    digest = hashlib.sha256()
    for file in list_files(path):
        name = file.relative_to(path)
        if str(name) != RECORD:
            digest.update(f"{name}\0{hash_file(file)}\n".encode())
    return digest.hexdigest()


def list_files(directory: Path) -> list[Path]:
    """Return the files at any depth, sorted; those behind links count as if they were here.

    Raises:
        ConfigError: a link is broken.
    """
    files = []
    for path in walk_files(directory):
        if path.is_file():
            files.append(path)
        elif path.is_symlink() and not path.exists():
            raise ConfigError(f"{path}: broken link to {path.readlink()}; restore its target, or remove the link")
    return sorted(files)


def walk_files(directory: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield everything below a directory except directories; links to directories are followed.

    A link back to a directory above it is yielded itself: following it would never end.

    Args:
        directory: a directory, or a link to one.
        above: the real paths of the directories above it.

    Raises:
        OSError: this user may not read a directory.
    """
    real = os.path.realpath(directory)
    if real in above:
        yield directory
        return
    for entry in sorted(directory.iterdir()):
        if entry.is_dir():
            yield from walk_files(entry, (*above, real))
        else:
            yield entry


def verified_hash(path: Path) -> str:
    """Return the content hash of an input after checking it against the record of the stage that wrote it.

    Raises:
        RunError: the content has changed since the stage wrote it, or is gone.
    """
    for _ in range(50):
        record = read_record(path)
        try:
            actual = content_hash(path)
        except FileNotFoundError:  # another process is replacing the result
            time.sleep(0.1)
            continue
        if record is None or record["output_sha256"] == actual:
            return actual
        if read_record(path) == record:
            raise RunError(
                f"{path}: content hash {actual[:12]} is not the {record['output_sha256'][:12]} its {RECORD} records: "
                "a file is damaged or was changed; delete the directory and run the stage that writes it again"
            )
    raise RunError(f"{path}: files vanish during reading; wait for the process that changes them, then run it again")


def file_crc32c(path: Path) -> str:
    """Return the CRC32C of a file as Google Cloud Storage writes it. It finds damage six times as fast as a sha256."""
    checksum = google_crc32c.Checksum()
    with path.open("rb") as stream:
        for _ in checksum.consume(stream, 1 << 20):
            pass
    return base64.b64encode(checksum.digest()).decode()


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, from its note if there is a valid one."""
    directory, state = _notes.get(), _read_state(path)
    if directory is None or state[0] < _NOTED_SIZE:
        return _read_hash(path)
    note, samples = directory / "-".join(map(str, (*state, "sha256.json"))), _hash_samples(path, state[0])
    if (known := _read_note(note)).get("samples") == samples:
        return known["sha256"]
    is_settled = _wait_for_clock(state[1])
    sha256 = _read_hash(path)
    if is_settled and state == _read_state(path):
        with suppress(OSError):  # a read-only workspace: the next reader reads the file again
            write_atomically(note, {"sha256": sha256, "samples": samples, "file": str(path)})
    return sha256


def _read_state(path: Path) -> tuple[int, int, int]:
    """Return a file's size, its modification time in nanoseconds, and its inode."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _read_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hash_samples(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        for number in range(_SAMPLES):
            stream.seek((size - _SAMPLE_SIZE) * number // (_SAMPLES - 1))  # the first and the last bytes, too
            digest.update(stream.read(_SAMPLE_SIZE))
    return digest.hexdigest()


def _read_note(note: Path) -> dict[str, Any]:
    try:
        content = json.loads(note.read_text())
    except (OSError, ValueError):  # not there, or damaged
        return {}
    return content if isinstance(content, dict) and "sha256" in content else {}


def _wait_for_clock(changed: int) -> bool:
    """Wait until a later change would give the file another time; return False if that takes longer than a tick.

    Otherwise a change right after the file was read would go unnoticed.
    """
    tick = _CLOCK_TICK if changed % 1_000_000_000 else _COARSE_CLOCK_TICK
    wait = changed + tick - time.time_ns()
    if wait > tick:  # a time in the future: another machine's clock
        return False
    time.sleep(max(0, wait) / 1e9)
    return True
