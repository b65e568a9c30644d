"""Files and directories that are whole or not there: written apart, renamed at the end, one line for a full disk."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitron.errors import MinitronError, RunError

NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
"""What linking meets: another file system, or one that has no hard links."""

_DISK_FULL = ("No space left on device", "unexpected pos")
"""What safetensors and torch.save, which raise no OSError, say when the disk is full."""


def partial_path(directory: Path) -> Path:
    """Return where a directory's content grows before it is complete."""
    return directory.with_name(directory.name + ".partial")


@contextmanager
def replaced(output: Path) -> Iterator[Path]:
    """Give an empty directory that takes the place of `output` in one rename when the block ends."""
    staging = partial_path(output)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    shutil.rmtree(output, ignore_errors=True)
    staging.rename(output)


def delete(path: Path) -> None:
    """Delete a file, a link, or a directory with its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Hard-link a file, or copy it where the file system does not allow that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that the file is never seen half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, default=_plain))
    temporary.replace(path)


def _plain(value: Any) -> Any:
    """Return a NumPy or torch number as a Python number, and anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a full or protected disk causes, in whatever library, into one line.

    Raises:
        RunError: the disk is full or may not be written.
    """
    try:
        yield
    except MinitronError:
        raise
    except Exception as error:
        if _is_disk_full(error):
            raise RunError(f"{path}: disk full ({_free(path):.0f} MB free); free space and run it again") from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            named = error.filename2 or error.filename or path
            raise RunError(f"{named}: {error.strerror}; give this user the right, or another directory") from error
        raise


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in _DISK_FULL)


def _free(path: Path) -> float:
    """Return the free megabytes of the disk that a path, which need not exist, is on."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free / 2**20
