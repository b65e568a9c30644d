"""Write files atomically, link, copy and delete them.

Errors of a full or protected disk become one line.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitron.config.metrics import find_not_finite
from minitron.errors import MinitronError, RunError
from minitron.storage.layout import RECORD

NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
"""Errors of a hard link across file systems, or on a file system that has none."""

_DISK_FULL = ("No space left on device", "unexpected pos")
"""Texts of safetensors and torch.save for a full disk; they raise no OSError."""


def delete_path(path: Path) -> None:
    """Delete a file, a link, or a directory with its content, if it is there.

    A result's record goes first: a directory that has one is complete, also after a kill.
    """
    if path.is_dir() and not path.is_symlink():
        (path / RECORD).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_file(source: str | Path, target: str | Path) -> None:
    """Hard-link a file. Of a link its target is linked: a relative link leads nowhere from another directory."""
    os.link(Path(source).resolve(strict=True), target)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Hard-link a file, or copy it if the file system does not allow links."""
    try:
        link_file(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that no reader sees half of the file.

    Raises:
        RunError: a number is infinite or not a number, for which JSON has no word.
    """
    try:
        text = json.dumps(content, indent=2, default=_to_json_value, allow_nan=False)
    except ValueError as error:
        reason = find_not_finite(content) or error
        raise RunError(f"{path}: not written, because {reason}; find out where that number comes from") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _to_json_value(value: Any) -> Any:
    """Return a NumPy or torch number as a Python number, and anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a full or protected disk, in any library, into one line.

    Raises:
        RunError: the disk is full, or this user may not write to it.
    """
    try:
        yield
    except MinitronError:
        raise
    except Exception as error:
        if _is_disk_full(error):
            raise RunError(
                f"{path}: disk full ({_free_megabytes(path):.0f} MB free); free space and run it again"
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            named = error.filename2 or error.filename or path
            raise RunError(f"{named}: {error.strerror}; give this user the right, or another directory") from error
        raise


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(text in str(error) for text in _DISK_FULL)


def _free_megabytes(path: Path) -> float:
    """Return the free space of a path's disk in MB; the path need not exist."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free / 2**20
