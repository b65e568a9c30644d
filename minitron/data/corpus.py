"""Read the documents of a corpus: text, JSON and Parquet files, a directory of them, or a dataset on a hub.

Every corpus is read as a stream, one record at a time. A document is

- a record of a .jsonl, .json or .parquet file, or of a hub's dataset (of its split `train`);
- the text between two blank lines of a .txt file;
- an article, if the records, or the lines of a .txt file, are WikiText's. It reaches from its ` = Title = ` line to the
  next one, even into the next file: an article may be split between two shards.

Every kind but .parquet may be compressed: .gz, .zst.
"""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from minitron.errors import ConfigError, MinitronError, RunError
from minitron.storage.hub import HubDataset, resolve_hub_dataset, resolve_local_path
from minitron.storage.layout import RECORD

Numbered = Iterator[tuple[int, Any]]

_KINDS = (".txt", ".jsonl", ".json", ".parquet")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_SUPPORTED = ".txt, .jsonl or .json (each also .gz or .zst) or .parquet"
_TITLE = re.compile(r"\s*= [^=](?:.*[^=])? =\s*")
_LOOK_AHEAD = 1 << 20
"""Characters to search for the first title of a WikiText file: more than its longest article has."""
_CHUNK = 1 << 20
_ROWS = 256


class Corpus:
    """Iterate over the documents of a corpus, unchanged.

    Attributes:
        size: bytes of all files; None for a dataset on a hub.
    """

    def __init__(self, address: str, text_field: str) -> None:
        """Find the files.

        Raises:
            ConfigError: the address does not exist, or has no file of a supported kind.
            RunError: the hub cannot be reached.
        """
        self._address, self._field = address, text_field
        self._dataset = resolve_hub_dataset(address)
        self._files = [] if self._dataset else _list_files(resolve_local_path(address))
        self.size = None if self._dataset else sum(file.stat().st_size for file in self._files)
        self._done = 0
        self._position_in_file: Callable[[], int] = lambda: 0

    @property
    def position(self) -> int:
        """Bytes read so far, in the unit of `size`; characters for a dataset on a hub."""
        return self._done + self._position_in_file()

    def __iter__(self) -> Iterator[str]:
        """Yield the documents, in the order of the file names.

        Raises:
            ConfigError: a record has no text field.
            RunError: a file is damaged, or the hub cannot be reached any more.
        """
        document: list[str] = []
        for begins, piece in self._read_pieces():
            if begins and document:
                yield "".join(document)
                document = []
            if begins or document or piece.strip():
                document.append(piece)
        if document:
            yield "".join(document)

    def _read_pieces(self) -> Iterator[tuple[bool, str]]:
        """Yield pieces of text; for each, say whether it begins a document."""
        for lines_of_text, records in self._open_sources():
            head, is_wikitext = _look_ahead(records)
            records = chain(head, records)
            if is_wikitext:
                for record, begins in _mark_titles(records):
                    yield begins, record if record.endswith("\n") else record + "\n"
            elif lines_of_text:
                yield from _split_paragraphs(records)
            else:
                yield from ((True, record) for record in records)

    def _open_sources(self) -> Iterator[tuple[bool, Iterator[str]]]:
        """Yield for every file whether its records are the lines of one text, and the records."""
        if self._dataset:
            yield False, self._hub_records(self._dataset)
        for file in self._files:
            yield _file_kind(file) == ".txt", self._file_records(file)
            self._position_in_file = lambda: 0
            self._done += file.stat().st_size

    def _file_records(self, path: Path) -> Iterator[str]:
        number, is_text = 0, _file_kind(path) == ".txt"
        try:
            for number, record in self._read_records(path):
                yield record if is_text else self._get_text(record, f"{path}: record {number}")
        except MinitronError:
            raise
        except (OSError, ValueError, RecursionError, pyarrow.ArrowException) as error:
            remedy = "save it as UTF-8" if isinstance(error, UnicodeError) else "repair the file or get it again"
            raise RunError(
                f"{path}: cannot be read after record {number} ({_one_line_reason(error)}); {remedy}"
            ) from error

    def _hub_records(self, dataset: HubDataset) -> Iterator[str]:
        from datasets import load_dataset

        try:
            settings = {"split": "train", "streaming": True, "revision": dataset.commit}
            for number, record in enumerate(load_dataset(dataset.repository, dataset.config, **settings), 1):
                text = self._get_text(record, f"{self._address}: record {number}")
                self._done += len(text)
                yield text
        except MinitronError:
            raise
        except Exception as error:  # each dataset builder and network library has its own classes
            remedy = "check the configuration after the name, and the network, or give a local path"
            raise RunError(f"{self._address}: cannot be read ({_one_line_reason(error)}); {remedy}") from error

    def _read_records(self, path: Path) -> Numbered:
        """Yield numbered records: the lines of a .txt file, or the values of JSON or Parquet."""
        with path.open("rb") as raw:
            self._position_in_file = raw.tell
            compression = _COMPRESSIONS.get(path.suffix.lower())
            # pyarrow, unlike zstandard, detects a truncated stream.
            stream = io.BufferedReader(pyarrow.input_stream(raw, compression=compression)) if compression else raw
            match _file_kind(path):
                case ".txt":
                    yield from enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig"), 1)
                case ".jsonl":
                    yield from _json_lines(stream)
                case ".json":
                    yield from enumerate(_json_values(io.TextIOWrapper(stream, encoding="utf-8-sig")), 1)
                case _:
                    yield from self._read_rows(path)

    def _read_rows(self, path: Path) -> Numbered:
        with parquet.ParquetFile(path) as file:
            names, size, rows = file.schema_arrow.names, path.stat().st_size, file.metadata.num_rows
            number = 0
            self._position_in_file = lambda: size * number // rows
            for batch in file.iter_batches(_ROWS, columns=[self._field] if self._field in names else names):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record

    def _get_text(self, record: Any, where: str) -> str:
        """Return the text of a record; null counts as empty."""
        if not isinstance(record, dict):
            raise ConfigError(f"{where}: {type(record).__name__}, not an object; make it {{{self._field!r}: ...}}")
        remedy = "set text_field to the field that holds the text"
        if self._field not in record:
            raise ConfigError(f"{where}: no field {self._field!r} (found: {', '.join(record) or 'none'}); {remedy}")
        text = record[self._field]
        if not isinstance(text, str | None):
            raise ConfigError(f"{where}: field {self._field!r} is {type(text).__name__}, not text; {remedy}")
        return text or ""


def _list_files(path: Path) -> list[Path]:
    """Return the supported files in a directory, or the file itself.

    Raises:
        ConfigError: there are none.
    """
    if path.is_file():
        candidates = [path]
    else:
        candidates = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    files = [file for file in candidates if _file_kind(file) in _KINDS and file.name != RECORD]
    if not files:
        names = ", ".join(file.name for file in candidates[:3]) or "nothing"
        raise ConfigError(f"{path}: no file of a supported kind (found: {names}); give {_SUPPORTED}")
    return files


def _file_kind(path: Path) -> str:
    """Return the suffix of a file without its compression; a compressed .parquet is not supported."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes = [suffix for suffix in suffixes[:-1] if suffix != ".parquet"]
    return suffixes[-1] if suffixes else ""


def _look_ahead(records: Iterator[str]) -> tuple[list[str], bool]:
    """Return the first records, and whether the last of these is a WikiText title."""
    head: list[str] = []
    size = 0
    for record, begins in _mark_titles(records):
        head.append(record)
        size += len(record)
        if begins or size > _LOOK_AHEAD or "\n" in record.strip():
            return head, begins
    return head, False


def _split_paragraphs(lines: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """Yield each line that is not blank; say whether it begins a paragraph."""
    blank = True
    for line in lines:
        filled = bool(line.strip())
        if filled:
            yield blank, line
        blank = not filled


def _mark_titles(records: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield each record; say whether it is a title that begins an article.

    A title comes after a blank line, because some lines in formulas look like titles. Some copies of WikiText have no
    blank lines; there every such line counts.
    """
    blank, has_blanks = True, False
    for record in records:
        yield record, (blank or not has_blanks) and _TITLE.fullmatch(record) is not None
        blank = not record.strip()
        has_blanks = has_blanks or blank


def _json_lines(stream: Iterable[bytes]) -> Numbered:
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg} at column {error.colno}") from error


def _json_values(stream: io.TextIOBase) -> Iterator[Any]:
    """Yield the elements of a JSON array, or consecutive JSON values, while reading the stream."""
    decoder, buffer, start, open_arrays = json.JSONDecoder(), "", 0, 0
    while True:
        while start < len(buffer) and (character := buffer[start]) in " \t\r\n,[]":
            open_arrays += (character == "[") - (character == "]")
            start += 1
        try:
            value, start = decoder.raw_decode(buffer, start)
            yield value
        except json.JSONDecodeError as error:
            # A value cut off by the end of the buffer fails at the very end, or has an unterminated string.
            incomplete = error.pos >= len(buffer) - len("-Infinity") or error.msg.startswith("Unterminated string")
            chunk = stream.read(max(_CHUNK, len(buffer) - start)) if incomplete else ""
            if not chunk and (start < len(buffer) or open_arrays):
                raise ValueError(error.msg if start < len(buffer) else "the array has no end") from error
            if not chunk:
                return
            buffer, start = buffer[start:] + chunk, 0


def _one_line_reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
