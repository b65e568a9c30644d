"""Hash the content of files and directories: equal hashes mean that a result can be reused."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from minitron.errors import RunError
from minitron.storage.layout import AWAITED, RECORD, read_record


def content_hash(path: Path, leave_out: tuple[str, ...] = ()) -> str:
    """Return the sha256 of a file, or of a directory's names and contents without stage.json and `leave_out`.

    A linked directory counts with its content.
    """
    if path.is_file():
        return _file_hash(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in walk_files(path) if file.is_file()):
        name = file.relative_to(path)
        if name.parts[0] not in leave_out and str(name) not in (RECORD, AWAITED):
            digest.update(f"{name}\0{_file_hash(file)}\n".encode())
    return digest.hexdigest()


def walk_files(directory: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield all that lies below a directory and is no directory; linked directories are followed.

    A link back to a directory above it is yielded itself: to follow it would never end.

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
        RunError: the content has changed since the stage wrote it.
    """
    actual = content_hash(path)
    if record := read_record(path):
        recorded = record["output_sha256"]
        if recorded != actual:
            raise RunError(
                f"{path}: content hash {actual[:12]} is not the {recorded[:12]} its {RECORD} records: "
                "a file is damaged or was changed; delete the directory and run the stage that writes it again"
            )
    return actual


def _file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
