"""Hash the content of files and directories: equal hashes mean that a result can be reused."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from minitron.errors import ConfigError, RunError
from minitron.storage.layout import RECORD, read_record


def content_hash(path: Path, leave_out: tuple[str, ...] = ()) -> str:
    """Return the sha256 of a file, or of a directory's names and contents without stage.json and `leave_out`.

    A link counts as what it leads to: a directory of links has the hash of the same files without links.

    Raises:
        ConfigError: a link leads to nothing.
    """
    if path.is_file():
        return _file_hash(path)
    digest = hashlib.sha256()
    for file in list_files(path, leave_out):
        name = file.relative_to(path)
        if str(name) != RECORD:
            digest.update(f"{name}\0{_file_hash(file)}\n".encode())
    return digest.hexdigest()


def list_files(directory: Path, leave_out: tuple[str, ...] = ()) -> list[Path]:
    """Return the files at any depth, sorted; those behind links count as if they were here.

    Args:
        directory: where to look.
        leave_out: names in the directory itself that are passed over.

    Raises:
        ConfigError: a link leads to nothing.
    """
    files = []
    for path in walk_files(directory):
        if path.relative_to(directory).parts[0] in leave_out:
            continue
        if path.is_file():
            files.append(path)
        elif path.is_symlink() and not path.exists():
            raise ConfigError(f"{path}: a link to {path.readlink()}, and nothing is there; get the file, or remove it")
    return sorted(files)


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
