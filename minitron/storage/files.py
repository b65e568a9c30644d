"""Write files atomically; link, copy and delete files.

Errors of a disk that is full, broken or read-only become one line.
"""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minitron.config.metrics import find_not_finite
from minitron.errors import MinitronError, RunError
from minitron.storage.layout import CHECKPOINTS, RECORD, RESULT, partial_path

NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
"""Errors of a hard link across file systems, or on a file system without hard links."""


def delete_path(path: Path) -> None:
    """Delete a file, a link, or a directory with its content, if it is there.

    A result's record goes first: a directory with a record is complete, even after a kill.
    """
    if path.is_dir() and not path.is_symlink():
        (path / RECORD).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def mark_used(path: Path) -> None:
    """Set the time of a directory to now: it tells `minitron gc` when the directory was last used."""
    with suppress(OSError):  # a volume that is mounted read-only
        path.touch()


def link_file(source: str | Path, target: str | Path) -> None:
    """Hard-link a file; for a symbolic link, its target: a relative link breaks in another directory."""
    os.link(Path(source).resolve(strict=True), target)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Hard-link a file, or copy it if the file system does not allow links."""
    try:
        link_file(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that no reader sees a partial file.

    Raises:
        RunError: a number is infinite or NaN, which JSON cannot represent.
    """
    text = format_json(content, path)
    with write_beside(path) as temporary:
        temporary.write_text(text)


@contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """Yield a path beside a file: what is written there becomes the file at the end, in one rename, or is deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")  # another process may write the same file
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())  # else a node that loses power may have the rename, but not the content
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def format_json(content: dict[str, Any], path: Path) -> str:
    """Return the JSON of what will be written to a path.

    Raises:
        RunError: a number is infinite or NaN, which JSON cannot represent.
    """
    try:
        return json.dumps(content, indent=2, default=_to_json_value, allow_nan=False)
    except ValueError as error:
        reason = find_not_finite(content) or error
        raise RunError(f"{path}: not written, because {reason}; find out where that number comes from") from error


def _to_json_value(value: Any) -> Any:
    """Return a NumPy or torch number as a Python number, and anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


@contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Turn the errors of a disk that is full, broken or read-only, in any library, into one line.

    Args:
        output: the directory that is written; the line says whether work for it is kept.

    Raises:
        RunError: a file could not be written or read.
    """
    try:
        yield
    except MinitronError:
        raise
    except Exception as error:
        if (reason := _explain_disk_error(error, output)) is None:
            raise
        raise RunError(f"{reason}{_name_kept_work(output)}") from error


def check_free_space(directory: Path, needed: int) -> None:
    """Refuse work whose result does not fit on the disk, before it begins.

    Args:
        directory: where the result will grow.
        needed: its size in bytes.

    Raises:
        RunError: the disk has less free space.
    """
    if (free := _free_megabytes(directory)) * 2**20 < needed:
        raise RunError(
            f"{directory}: the result takes {needed / 2**20:.0f} MB, but the disk has {free:.0f} MB free; free some "
            "space, then run it again"
        )


def _explain_disk_error(error: Exception, output: Path) -> str | None:
    """Return what failed and the remedy; None if it is not a disk error."""
    number = _find_errno(error)
    path = getattr(error, "filename2", None) or getattr(error, "filename", None) or output
    match number:
        case errno.ENOSPC | errno.EDQUOT:
            return f"{output}: disk full ({_free_megabytes(output):.0f} MB free); free some space, then run it again"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"{path}: {os.strerror(number)}; give this user permission, or give another directory"
        case errno.EIO | errno.ESTALE:
            return f"{path}: {os.strerror(number)}; check the disk or its server, then run it again"
    return None


def _find_errno(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    if named := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
        return int(named[1])
    return errno.ENOSPC if "unexpected pos" in str(error) else None  # torch.save, which does not say why


def _name_kept_work(output: Path) -> str:
    partial = partial_path(output)
    kept = (partial / CHECKPOINTS).exists() or (partial / RESULT / RECORD).exists()
    return f"; it will resume from {partial}" if kept else ""


def _free_megabytes(path: Path) -> float:
    """Return the free space of a path's disk in MB; the path need not exist."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free / 2**20
