"""Publish directories: the content grows in a partial directory, under a lock, and one rename publishes it.

    OUTPUT.partial/key            the lock of the process that works there; the file's content is the key of the work
    OUTPUT.partial/checkpoints/   a killed stage resumes from here
    OUTPUT.partial/result/        the growing content; it is finished when it has its record, `stage.json`
    OUTPUT.partial/replaced/      the earlier OUTPUT, between the two renames that replace it

Complete content is deleted only after its replacement is in place. So after a kill or a failed write at any moment, the
next process to take the lock still finds the finished result and the earlier OUTPUT.
"""

import errno
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from minitron.errors import ConfigError, RunError
from minitron.storage.files import NO_LINKS, delete_path, disk_errors, link_file, link_or_copy
from minitron.storage.hashing import content_hash, list_files
from minitron.storage.layout import CHECKPOINTS, RECORD, REFERENCE, RESULT, partial_path, read_record

KEY = "key"
"""File in the partial directory with the key of the work; the working process holds its lock."""

REPLACED = "replaced"
"""Directory in the partial directory: the earlier content, until the new one is in its place."""

_NO_RENAMES = (
    "a flat bucket under Cloud Storage FUSE cannot rename directories: use a bucket with a hierarchical namespace, or "
    "give gs://BUCKET/PATH as workspace"
)
_MOUNTED = "a mount point or a directory of the image cannot be renamed: give a directory inside it"
_RENAME_REMEDIES = {
    errno.EMFILE: _NO_RENAMES,  # more files than its rename-dir-limit, which is 0
    errno.ENOTSUP: _NO_RENAMES,
    errno.ENOSYS: _NO_RENAMES,
    errno.EBUSY: _MOUNTED,
    errno.EXDEV: _MOUNTED,  # overlayfs, for a directory in a lower layer
}


class InUse(RunError):
    """Another process is working in a partial directory."""


def checkpoints_path(directory: Path) -> Path:
    """Return the directory of a stage's checkpoints, beside the directory in which its result grows."""
    return directory.parent / CHECKPOINTS


def last_good_path(directory: Path) -> Path:
    """Return the directory for the last good state of failed work, beside the result.

    It is a model, but never a result, because it has no record. No later attempt deletes it, whatever its settings.
    """
    partial = directory.parent
    return partial.with_name(f"{partial.name.removesuffix('.partial')}.last-good")


@contextmanager
def lock_output(output: Path, wait: bool = False) -> Iterator[Path]:
    """Hold the lock of a directory; yield its partial directory. Work that a killed process left is completed first.

    Raises:
        InUse: another process holds the lock, and `wait` is not set.
    """
    partial = partial_path(output)
    with _open_locked(partial, wait):
        _complete_leftovers(partial, output)
        try:
            yield partial
        finally:
            with suppress(OSError):  # the next attempt uses or deletes the rest
                if {path.name for path in partial.iterdir()} == {KEY}:
                    (partial / KEY).unlink()
                    partial.rmdir()


def delete_leftovers(output: Path) -> None:
    """Delete what a killed process left beside a complete directory, unless another process is working there."""
    if partial_path(output).exists():
        with suppress(OSError, RunError), lock_output(output):
            pass


def _open_locked(partial: Path, wait: bool) -> TextIO:
    """Return an open file; this process holds its lock until it closes the file."""
    for attempt in count():
        try:
            partial.mkdir(parents=True, exist_ok=True)
            stream = (partial / KEY).open("a+")
        except (FileNotFoundError, FileExistsError):
            if attempt < 100:
                continue  # its owner has just deleted the directory
            raise
        try:
            _lock_file(stream, partial, wait)
            if _is_same_file(stream, partial / KEY):
                return stream
        except BaseException:
            stream.close()
            raise
        stream.close()  # its owner has deleted the file
    raise AssertionError


def _lock_file(stream: TextIO, partial: Path, wait: bool) -> None:
    """Lock a file, if the file system has locks. `fcntl.lockf` would lose the lock when any reader closes the file."""
    for is_last in (False, True):
        try:
            return fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return
            if is_last and not wait:
                message = f"{partial}: another process is working there; wait for it, or give another output"
                raise InUse(message) from error
            time.sleep(0.02)  # `is_locked` holds it for a moment
    print(f"{partial}: another process is working there; waiting for it", flush=True)
    fcntl.flock(stream, fcntl.LOCK_EX)


def is_locked(output: Path) -> bool:
    """Say whether a process is working on a directory."""
    with suppress(FileNotFoundError), (partial_path(output) / KEY).open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EAGAIN, errno.EACCES)
    return False


def _is_same_file(stream: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _complete_leftovers(partial: Path, output: Path) -> None:
    """Complete what a killed process left: publish its finished result, or put the earlier one back."""
    if read_intact(partial / RESULT):
        publish_directory(partial / RESULT, output)
    elif (partial / REPLACED).exists() and not output.exists():
        (partial / REPLACED).rename(output)
    delete_path(partial / REPLACED)
    if not (partial / KEY).read_text():  # the work was published, or takes no time to redo
        for name in (CHECKPOINTS, RESULT):
            delete_path(partial / name)


def publish_directory(directory: Path, output: Path) -> None:
    """Rename a finished directory to `output`, whose lock the caller holds; then delete what it replaces.

    Raises:
        RunError: the file system cannot rename directories. Nothing has changed.
    """
    partial = partial_path(output)
    try:
        if output.exists():
            _rename_directory(output, partial / REPLACED)
        _rename_directory(directory, output)
    except BaseException:
        if (partial / REPLACED).exists() and not output.exists():
            (partial / REPLACED).rename(output)
        raise
    with suppress(OSError):  # the content is published; the next process deletes the rest
        (partial / KEY).write_text("")
    for name in (REPLACED, CHECKPOINTS):
        with suppress(OSError):
            delete_path(partial / name)


def _rename_directory(directory: Path, target: Path) -> None:
    try:
        directory.rename(target)
    except OSError as error:
        if error.errno not in _RENAME_REMEDIES:
            raise
        remedy = _RENAME_REMEDIES[error.errno]
        raise RunError(f"{directory}: cannot be renamed to {target} ({error.strerror}); {remedy}") from error


def claim_partial(partial: Path, key: str) -> None:
    """Write the key of the work; delete checkpoints of another key. The caller holds the lock."""
    if (partial / KEY).read_text() != key:
        (partial / KEY).write_text("")  # after a kill during the deletion, the checkpoints belong to no key
        delete_path(partial / CHECKPOINTS)
        (partial / KEY).write_text(key)


@contextmanager
def new_result(partial: Path, key: str = "") -> Iterator[Path]:
    """Yield an empty directory in which a result grows. The caller holds the lock.

    Beside it are the checkpoints of earlier attempts at this key only. If the work fails, they are kept, unless it
    fails with a ConfigError. A finished result that could not be published is kept, too.

    Raises:
        RunError: the file system cannot rename directories: the result could not be published.
    """
    claim_partial(partial, key)
    directory, probe = partial / RESULT, partial / "probe"
    for path in (directory, probe):
        delete_path(path)
    try:
        probe.mkdir()
        (probe / "file").touch()  # a flat bucket under Cloud Storage FUSE renames empty directories
        _rename_directory(probe, directory)
        (directory / "file").unlink()
        yield directory
    except BaseException as error:
        if read_record(directory) is None:
            useless = {probe, directory} | ({partial / CHECKPOINTS} if isinstance(error, ConfigError) else set())
            for path in useless:
                shutil.rmtree(path, ignore_errors=True)
        raise


@contextmanager
def replace_directory(output: Path) -> Iterator[Path]:
    """Yield an empty directory that replaces `output` in one rename when the block ends."""
    with lock_output(output, wait=True) as partial, new_result(partial) as directory:
        yield directory
        publish_directory(directory, output)


def download_then_publish(
    output: Path, identity: str, fetch: Callable[[Path], None], is_complete: Callable[[], bool]
) -> None:
    """Fill a directory and publish it in one rename, unless it is complete. Wait if another process is downloading it.

    Args:
        output: the directory.
        identity: identifies the content; a killed download of the same content is resumed.
        fetch: fills the given directory, which may have files of a killed attempt.
        is_complete: says whether the directory already has the content.
    """
    if is_complete():
        return delete_leftovers(output)
    with disk_errors(output), lock_output(output, wait=True) as partial:
        if is_complete():
            return
        claim_partial(partial, identity)
        downloads = partial / CHECKPOINTS  # kept after a kill
        downloads.mkdir(exist_ok=True)
        fetch(downloads)
        sync_files(downloads)
        publish_directory(downloads, output)


def sync_files(directory: Path) -> None:
    """Write the content of all files to the disk, so that it survives a power loss.

    A result is synced before its record declares it complete, and before the checkpoints are deleted.
    """
    for path in list_files(directory):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def read_intact(directory: Path, key: str | None = None, warn: bool = False) -> dict[str, Any] | None:
    """Return the record of the result in a directory if the content matches the record, else None.

    Args:
        directory: a directory that may have a result.
        key: the key that the result must have; None: any.
        warn: print a warning if there is such a result with other content.
    """
    record = read_record(directory)
    if record is None or key not in (None, record["key"]) or (directory / REFERENCE).exists():
        return None
    with suppress(FileNotFoundError):  # another process is replacing it
        if content_hash(directory) == record["output_sha256"]:
            return record
        if warn and record == read_record(directory):
            print(f"warning: {directory}: damaged or changed since it was written; making it again", file=sys.stderr)
    return None


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
    """Make `output` equal to `result`: by hard links if the file system allows them, else by copies."""
    _publish_equal(result, output, key, link_or_copy)


def _publish_equal(result: Path, output: Path, key: str, put_file: Callable[[Path, Path], Any]) -> None:
    if (record := read_intact(output, key)) and record == read_record(result):
        return delete_leftovers(output)
    with replace_directory(output) as directory:
        for source in sorted(list_files(result), key=lambda path: path == result / RECORD):  # the record comes last
            target = directory / source.relative_to(result)
            target.parent.mkdir(parents=True, exist_ok=True)
            put_file(source, target)
