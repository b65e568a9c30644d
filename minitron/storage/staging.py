"""Publish a stage's result: it grows in a partial directory, becomes complete in one rename, and is found by its key.

A result is a directory with a record, `stage.json`, that names its key and its content's hash. It grows in
`<directory>.partial`, which outlives a kill.
"""

import errno
import fcntl
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from minitron.errors import ConfigError, RunError
from minitron.storage.files import (
    NO_LINKS,
    delete_path,
    disk_errors,
    link_file,
    link_or_copy,
    partial_path,
    replace_directory,
)
from minitron.storage.hashing import content_hash, list_files
from minitron.storage.layout import read_record

KEY = "key"
"""File in the partial directory that names the key of the work; the working process holds its lock."""

CHECKPOINTS = "checkpoints"
"""Subdirectory of the partial directory from which a killed stage resumes; it is not part of the result."""


@contextmanager
def partial_directory(output: Path, key: str) -> Iterator[Path]:
    """Yield the directory of the work in progress, with the checkpoints of a killed attempt at the same key.

    It is deleted when the work fails, unless there are checkpoints to resume from.

    Raises:
        RunError: another process is at work there.
    """
    directory = partial_path(output)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / KEY).open("a+") as stream:
        _lock_file(stream, directory)
        stream.seek(0)
        reusable = {KEY, CHECKPOINTS} if stream.read() == key else {KEY}
        for path in directory.iterdir():
            if path.name not in reusable:
                delete_path(path)
        stream.truncate(0)
        stream.write(key)
        stream.flush()
        try:
            yield directory
        except BaseException as error:
            if isinstance(error, ConfigError) or not (directory / CHECKPOINTS).exists():
                shutil.rmtree(directory, ignore_errors=True)
            raise


def last_good_path(directory: Path) -> Path:
    """Return the directory for the last good state of a failed work in progress, beside the result.

    It is a model, but never a result: it has no record. No later attempt deletes it, whatever its settings.
    """
    return directory.with_name(f"{directory.name.removesuffix('.partial')}.last-good")


def download_then_publish(output: Path, identity: str, fetch: Callable[[Path], None]) -> None:
    """Fill a directory and publish it in one rename.

    Args:
        output: the directory.
        identity: the content; a download of the same content that was killed is resumed.
        fetch: fills the directory that it gets; files may be there from a killed attempt.
    """
    with disk_errors(output), partial_directory(output, identity) as directory:
        downloads = directory / CHECKPOINTS  # it outlives a kill
        downloads.mkdir(exist_ok=True)
        fetch(downloads)
        for path in list(downloads.iterdir()):
            path.rename(directory / path.name)
        publish_result(directory, output)


def _lock_file(stream: TextIO, directory: Path) -> None:
    """Lock a file until this process ends, if the file system has locks."""
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise RunError(
                f"{directory}: another process is at work there; wait for it, or give another output"
            ) from error


def publish_result(directory: Path, output: Path) -> None:
    """Rename finished work to the result. The work has its record already, so a kill here loses nothing."""
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
    (directory / KEY).unlink(missing_ok=True)
    shutil.rmtree(output, ignore_errors=True)
    directory.rename(output)


def find_finished(output: Path, key: str) -> dict[str, Any] | None:
    """Return the record of the finished result with this key, or None; publish it first if a kill prevented that."""
    if _has_record(partial_path(output), key):
        publish_result(partial_path(output), output)
    return read_record(output) if _is_intact(output, key) else None


def _has_record(directory: Path, key: str) -> bool:
    record = read_record(directory)
    return record is not None and record["key"] == key


def _is_intact(directory: Path, key: str) -> bool:
    """Say whether a directory holds a result with this key whose content matches its record."""
    if not _has_record(directory, key):
        return False
    intact = content_hash(directory) == (read_record(directory) or {})["output_sha256"]
    if not intact:
        print(f"warning: {directory}: damaged or changed since it was written; it is made again", file=sys.stderr)
    return intact


def publish_links(result: Path, output: Path, key: str) -> bool:
    """Make `output` equal to `result` by hard links; return False if the file system does not allow them."""
    try:
        _publish_equal(result, output, key, link_file)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return False
    return True


def publish_copy(result: Path, output: Path, key: str) -> None:
    """Make `output` equal to `result`: by hard links if the file system allows, else by copies."""
    _publish_equal(result, output, key, link_or_copy)


def _publish_equal(result: Path, output: Path, key: str, put_file: Callable[[Path, Path], Any]) -> None:
    if _is_intact(output, key) and read_record(output) == read_record(result):
        return
    with replace_directory(output) as staging:
        for source in list_files(result):
            target = staging / source.relative_to(result)
            target.parent.mkdir(parents=True, exist_ok=True)
            put_file(source, target)
