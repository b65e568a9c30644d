"""How a stage's result comes into being: work in progress apart, complete in one rename, found again by its key.

A result is a directory with a record, `stage.json`, that names its key and its content's hash. It grows in
`<directory>.partial`, which outlives a kill.
"""

import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from minitron.errors import ConfigError, RunError
from minitron.storage.files import NO_LINKS, delete, disk_errors, link_or_copy, partial_path, replaced
from minitron.storage.hashing import content_hash
from minitron.storage.layout import read_record

KEY = "key"
"""File in work in progress that says what the work is for; the process at work holds its lock."""

CHECKPOINTS = "checkpoints"
"""Subdirectory of work in progress that a killed stage resumes from; it is not part of the result."""


@contextmanager
def partial_directory(home: Path, key: str) -> Iterator[Path]:
    """Give the directory of work in progress, with the checkpoints that a killed attempt at the same key left there.

    It is deleted when the work fails, unless there are checkpoints to resume from.

    Raises:
        RunError: another process is at work there.
    """
    directory = partial_path(home)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / KEY).open("a+") as stream:
        _lock(stream, directory)
        stream.seek(0)
        kept = {KEY, CHECKPOINTS} if stream.read() == key else {KEY}
        for path in directory.iterdir():
            if path.name not in kept:
                delete(path)
        stream.truncate(0)
        stream.write(key)
        stream.flush()
        try:
            yield directory
        except BaseException as error:
            if isinstance(error, ConfigError) or not (directory / CHECKPOINTS).exists():
                shutil.rmtree(directory, ignore_errors=True)
            raise


def download_then_publish(home: Path, identity: str, fetch: Callable[[Path], None]) -> None:
    """Let a directory come to be in one rename.

    Args:
        home: the directory.
        identity: what it will hold; what a killed attempt at the same left is kept.
        fetch: fills the directory that it is given, and goes on with what is there.
    """
    with disk_errors(home), partial_directory(home, identity) as directory:
        arriving = directory / CHECKPOINTS  # it outlives a kill
        arriving.mkdir(exist_ok=True)
        fetch(arriving)
        for path in list(arriving.iterdir()):
            path.rename(directory / path.name)
        publish(directory, home)


def _lock(stream: TextIO, directory: Path) -> None:
    """Hold a lock that ends with this process, where the file system has locks."""
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise RunError(
                f"{directory}: another process is at work there; wait for it, or give another output"
            ) from error


def publish(directory: Path, home: Path) -> None:
    """Turn finished work into the result: from its record on, a kill loses nothing of it."""
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
    (directory / KEY).unlink(missing_ok=True)
    shutil.rmtree(home, ignore_errors=True)
    directory.rename(home)


def finished(home: Path, key: str) -> dict[str, Any] | None:
    """Return the record of the result with this key, if it is there; publish it first if a kill came between."""
    if _has_record(partial_path(home), key):
        publish(partial_path(home), home)
    return read_record(home) if _is_intact(home, key) else None


def _has_record(directory: Path, key: str) -> bool:
    record = read_record(directory)
    return record is not None and record["key"] == key


def _is_intact(directory: Path, key: str) -> bool:
    """Say whether a result with this key is there and still is what its record says."""
    if not _has_record(directory, key):
        return False
    intact = content_hash(directory) == (read_record(directory) or {})["output_sha256"]
    if not intact:
        print(f"warning: {directory}: damaged or changed since it was written; it is made again", file=sys.stderr)
    return intact


def publish_links(home: Path, output: Path, key: str) -> bool:
    """Make `output` equal to `home` by hard links; False where the file system does not allow them."""
    try:
        _publish_equal(home, output, key, os.link)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return False
    return True


def publish_copy(home: Path, output: Path, key: str) -> None:
    """Make `output` equal to `home`: by hard links where the file system allows, else by copies."""
    _publish_equal(home, output, key, link_or_copy)


def _publish_equal(home: Path, output: Path, key: str, put: Callable[[Path, Path], Any]) -> None:
    if _is_intact(output, key) and read_record(output) == read_record(home):
        return
    with replaced(output) as staging:
        for source in sorted(path for path in home.rglob("*") if path.is_file()):
            target = staging / source.relative_to(home)
            target.parent.mkdir(parents=True, exist_ok=True)
            put(source, target)
