"""List the files of a corpus. Each is read, left out and named, or refused by name.

- A file of a supported kind is read: .txt, .jsonl, .ndjson, .json, each also .gz, .bz2, .xz or .zst, and .parquet.
- A linked file or directory is read like any other; a link back to a directory above it is left out.
- Hidden files and directories, companions of data (README, LICENSE, checksums, ...) and empty files are left out.
- Everything else is refused: other kinds, broken links, pointers of Git LFS and git-annex, binary files named .txt.

If you give a file, not a directory, only its suffix matters.

Splits are found as in the library `datasets`: a name with the word `train`, `validation` or `test`, or a synonym,
belongs to that split. A directory's name comes before a file's.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from minitron.data.tokenizer import LFS_POINTER
from minitron.errors import ConfigError
from minitron.storage.hashing import walk_files
from minitron.storage.hub import resolve_local_path

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The split that a name stands for, as in data_files.py of `datasets`."""

_KINDS = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
_SUPPORTED = ".txt, .jsonl, .ndjson or .json (each also .gz, .bz2, .xz or .zst) or .parquet"
_COMPANION = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|authors)(\.(md|txt|rst|html|cff|bib))?"
    r"|(readme|licen[cs]e)[-_][\w-]+(\.md)?"
    r"|dataset_infos?\.json|dataset_dict\.json|config\.json|stage\.json"
    r"|_success|.*_\$folder\$|(md5|sha1|sha256|sha512)sums?(\.txt)?|.*\.(md5|sha1|sha256|sha512|crc|crc32c)",
    re.IGNORECASE,
)
_SPLIT = re.compile(rf"(?<![^-._ 0-9])({'|'.join(SPLIT_NAMES)})(?![^-._ 0-9])")
_POINTERS = {
    LFS_POINTER: ("Git LFS", "git lfs pull"),
    b"/annex/objects/": ("git-annex", "git annex get"),
}
_HEAD = 8000
"""Bytes that are searched for a NUL, the mark of a binary file; git searches as many."""
_NAMED = 5
"""Files that a message names; the others are counted."""


@dataclass(frozen=True)
class CorpusFiles:
    """The files of a corpus in the order of their names.

    Attributes:
        files: the files to read, each with the split that its name gives.
        left_out: reasons for not reading a file, by its path in the corpus.
    """

    files: dict[Path, str | None] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def list_corpus_files(address: str) -> CorpusFiles:
    """Return the files of a local corpus.

    Raises:
        ConfigError: the address does not exist, or a file can be neither read nor left out.
    """
    path = resolve_local_path(address)
    entries = {path.name: path}
    if path.is_dir():
        entries = {entry.relative_to(path).as_posix(): entry for entry in walk_files(path)}
    links_back = {name: "link back" for name, entry in entries.items() if entry.is_dir()}
    entries = {name: entry for name, entry in entries.items() if name not in links_back}
    for name, entry in entries.items():
        if not (_hidden_part(name) or entry.is_file()):
            _refuse_irregular(entry)
    if path.is_dir():
        data, left_out = sort_names(address, entries)
    elif file_kind(path.name) in _KINDS:
        data, left_out = [path.name], {}
    else:
        raise _nothing_to_read(address, [path.name])
    for name in data:
        _check_content(entries[name])
    empty = {name: "empty" for name in data if not entries[name].stat().st_size}
    return CorpusFiles({entries[name]: name_split(name) for name in data}, links_back | left_out | empty)


def sort_names(address: str, names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Return the names of the files to read in a directory or a bucket, and the others with the reason.

    Raises:
        ConfigError: a file can be neither read nor left out, or there is nothing to read.
    """
    data, left_out, others = [], {}, []
    for name in names:
        if hidden := _hidden_part(name):
            left_out[hidden] = "hidden"
        elif _COMPANION.fullmatch(PurePosixPath(name).name):
            left_out[name] = "companion"
        elif file_kind(name) in _KINDS:
            data.append(name)
        else:
            others.append(name)
    if not data:
        raise _nothing_to_read(address, others or list(left_out))
    if others:
        raise ConfigError(
            f"{address}: {len(others)} of {len(data) + len(others)} files have an unsupported format "
            f"({shorten(others)}); give {_SUPPORTED}, or move them out of the corpus"
        )
    return data, left_out


def file_kind(name: str) -> str:
    """Return the suffix of a file without its compression; a compressed .parquet is not supported."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes = [suffix for suffix in suffixes[:-1] if suffix != ".parquet"]
    return suffixes[-1] if suffixes else ""


def name_split(name: str) -> str | None:
    """Return the split that a path in a corpus names; None if it names none, or two at once."""
    for part in PurePosixPath(name).parts:
        splits = {SPLIT_NAMES[word] for word in _SPLIT.findall(part)}
        if len(splits) == 1:
            return splits.pop()
    return None


def shorten(names: list[str]) -> str:
    """Return the first names, and the number of the others."""
    others = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {others} more" if others > 0 else "")


def _hidden_part(name: str) -> str | None:
    """Return a path up to its first hidden directory or file; None if nothing in it is hidden."""
    parts = PurePosixPath(name).parts
    hidden = next((number for number, part in enumerate(parts, 1) if part.startswith(".")), None)
    return "/".join(parts[:hidden]) if hidden else None


def _nothing_to_read(address: str, names: list[str]) -> ConfigError:
    found = shorten(names) or "nothing"
    return ConfigError(f"{address}: no file in a supported format (found: {found}); give {_SUPPORTED}")


def _refuse_irregular(path: Path) -> None:
    if path.is_symlink():
        raise ConfigError(f"{path}: broken link to {path.readlink()}; repair it, or move it out of the corpus")
    raise ConfigError(f"{path}: neither a file nor a directory; move it out of the corpus")


def _check_content(path: Path) -> None:
    """Refuse a pointer to a file that was not fetched, and a binary file with the suffix .txt.

    Raises:
        ConfigError: it is either.
    """
    with path.open("rb") as stream:
        head = stream.read(_HEAD)
    for pointer, (tool, command) in _POINTERS.items():
        if head.startswith(pointer):
            raise ConfigError(f"{path}: a {tool} pointer, not the data; run `{command}` in its directory")
    if path.suffix.lower() == ".txt" and b"\0" in head:
        raise ConfigError(
            f"{path}: not text (NUL at byte {head.index(0)}); save it as UTF-8, or move it out of the corpus"
        )
