"""Read the documents of a corpus: text, JSON and Parquet files, a directory of them, or a dataset on a hub.

Every corpus is read as a stream, one record at a time. A document is

- a record of a .jsonl, .ndjson, .json or .parquet file, or of a hub's dataset;
- the text of a .txt file, or the texts between the separators that the settings name;
- a record with messages, if the corpus is read with a ChatReader: a conversation, rendered by a chat template;
- an article, if the records, or the lines of a .txt file, are WikiText's. An article starts at its ` = Title = ` line
  and ends before the next one, even in the next file: an article may be split between two shards.

corpus_files.py says which files are read. If the corpus has splits of its own, they are read in the order test,
validation, train: Selection drops a document that it has seen in an earlier split.
"""

import io
import json
import lzma
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow
from pyarrow import parquet

from minitron.data.chat import ChatReader
from minitron.data.corpus_files import COMPRESSIONS, SPLIT_NAMES, file_kind, list_corpus_files, shorten
from minitron.data.indexed import SPLITS
from minitron.errors import ConfigError, MinitronError, RunError
from minitron.storage.hub import HubDataset, resolve_hub_dataset

Numbered = Iterator[tuple[int, Any]]

_TITLE = re.compile(r"\s*= [^=](?:.*[^=])? =\s*")
_LOOK_AHEAD = 1 << 20
"""Characters in which the first title of a WikiText file is searched; its longest article is shorter."""
_LONGEST = 1 << 26
"""Most characters of a .txt file that is one document: it is held in memory, and its tokens take far more."""
_CHUNK = 1 << 20
_ROWS = 256


class Corpus:
    """Iterate over the documents of a corpus, unchanged.

    Attributes:
        address: its address.
        size: bytes of all files; None for a dataset on a hub.
        files: number of files; None for a dataset on a hub.
        left_out: names that are not read, each with the reason.
        own_splits: the corpus's own splits, train among them; else empty.
        chat: reads conversations; None: there are none.
    """

    def __init__(
        self,
        address: str,
        text_field: str,
        separator: str | None = None,
        own_splits: bool = True,
        chat: ChatReader | None = None,
    ) -> None:
        """Find the files.

        Args:
            address: a local path, or hf://org/name[@revision][/config].
            text_field: the field of a record that holds the text.
            separator: the text between two documents of a .txt file; None: the file is one document.
            own_splits: False: ignore the splits that the names of files, or a hub, give.
            chat: reads the messages of a record that has its field; None: no record is a conversation.

        Raises:
            ConfigError: the address does not exist, or a file can be neither read nor left out.
            RunError: the hub cannot be reached.
        """
        self.address, self._field, self._separator, self.chat = address, text_field, separator, chat
        dataset = resolve_hub_dataset(address)
        listed = None if dataset else list_corpus_files(address)
        self._hub_splits = _load_hub_splits(address, dataset) if dataset else {}
        sources: dict[Any, str | None] = dict(listed.files) if listed else {}
        sources |= {name: SPLIT_NAMES[name] for name in self._hub_splits if name in SPLIT_NAMES}
        unused = {f"split {name}": "unknown name" for name in self._hub_splits if name not in sources}
        self.left_out = listed.left_out if listed else unused
        self.files = len(sources) if listed else None
        self.size = sum(file.stat().st_size for file in sources) if listed else None
        self.own_splits = _find_own_splits(address, sources) if own_splits else ()
        self._sources = _order_sources(sources) if self.own_splits else [(source, None) for source in sources]
        self._separated: set[bool] = set()
        self._done = 0
        self._position_in_file: Callable[[], int] = lambda: 0

    def describe(self) -> str:
        """Describe the corpus: its files, its own splits that are used, and the names that are left out."""
        what = "a dataset on a hub" if self.files is None else f"{self.files} files"
        splits = f"own splits {', '.join(self.own_splits)}" if self.own_splits else "no splits of its own"
        left_out = shorten([f"{name} ({reason})" for name, reason in self.left_out.items()]) or "nothing"
        return f"{what}, {splits}; left out: {left_out}"

    @property
    def position(self) -> int:
        """Bytes read so far, in the unit of `size`; characters for a dataset on a hub."""
        return self._done + self._position_in_file()

    def __iter__(self) -> Iterator[str]:
        """Yield the documents of `read_documents`, without their splits."""
        return (text for _, text in self.read_documents())

    def read_documents(self, splits: Collection[str | None] = (*SPLITS, None)) -> Iterator[tuple[str | None, str]]:
        """Yield every document's split, if it is the corpus's own, and its text, in the order of the file names.

        Args:
            splits: the splits to read; None: documents without a split of their own.

        Raises:
            ConfigError: a record has no text field, or no .txt file has the separator.
            RunError: a file is damaged, or the hub cannot be reached anymore.
        """
        document: list[str] = []
        previous = None
        for split, begins, piece in self._read_pieces(splits):
            if document and (begins or split != previous):
                yield previous, _join_pieces(document)
                document = []
            previous = split
            if begins or document or piece.strip():
                document.append(piece)
        if document:
            yield previous, _join_pieces(document)

    def _read_pieces(self, splits: Collection[str | None]) -> Iterator[tuple[str | None, bool, str]]:
        """Yield pieces of text, each with its split and whether it begins a document."""
        for source, split in self._sources:
            if split not in splits:
                continue
            is_text = isinstance(source, Path) and file_kind(source.name) == ".txt"
            records = self._file_records(source) if isinstance(source, Path) else self._hub_records(source)
            head, is_wikitext = _look_ahead(records) if not (is_text and self._separator) else ([], False)
            records = chain(head, records)
            if is_wikitext:
                for record, begins in _mark_titles(records):
                    yield split, begins, record if record.endswith("\n") else record + "\n"
            else:
                one_document = is_text and not self._separator
                records = _limit_length(records, source) if one_document else records
                yield from ((split, not (one_document and number), record) for number, record in enumerate(records))
            if isinstance(source, Path):
                self._position_in_file = lambda: 0
                self._done += source.stat().st_size
        if self._separated == {False} and self._sources[-1][1] in splits:  # all were read
            raise ConfigError(
                f"{self.address}: no .txt file contains document_separator {self._separator!r}; correct it, or leave "
                "it out so that each file is one document"
            )

    def _file_records(self, path: Path) -> Iterator[str]:
        number, is_text = 0, file_kind(path.name) == ".txt"
        try:
            for number, record in self._read_records(path):
                yield record if is_text else self._get_text(record, f"{path}: record {number}")
        except MinitronError:
            raise
        except (OSError, EOFError, ValueError, RecursionError, lzma.LZMAError, pyarrow.ArrowException) as error:
            remedy = "save it as UTF-8" if isinstance(error, UnicodeError) else "repair the file or download it again"
            raise RunError(
                f"{path}: cannot be read after record {number} ({_one_line_reason(error)}); {remedy}"
            ) from error

    def _hub_records(self, split: str) -> Iterator[str]:
        with _hub_errors(self.address):
            for number, record in enumerate(self._hub_splits[split], 1):
                text = self._get_text(record, f"{self.address}: {split}: record {number}")
                self._done += len(text)
                yield text

    def _read_records(self, path: Path) -> Numbered:
        """Yield numbered records: lines or documents of a .txt file, or the values of JSON or Parquet."""
        with path.open("rb") as raw:
            self._position_in_file = raw.tell
            stream = _decompress(raw, COMPRESSIONS.get(path.suffix.lower()))
            match file_kind(path.name):
                case ".txt":
                    text = io.TextIOWrapper(stream, encoding="utf-8-sig")
                    yield from enumerate(self._split_text(text, self._separator) if self._separator else text, 1)
                case ".jsonl" | ".ndjson":
                    yield from _json_lines(stream)
                case ".json":
                    yield from enumerate(_json_values(io.TextIOWrapper(stream, encoding="utf-8-sig")), 1)
                case _:
                    yield from self._read_rows(path)
        size = path.stat().st_size
        self._position_in_file = lambda: size  # it is closed, but its last documents may not be taken yet

    def _split_text(self, stream: TextIO, separator: str) -> Iterator[str]:
        """Yield the texts between separators, while reading the stream; note whether there were any."""
        rest, found = "", False
        while chunk := stream.read(_CHUNK):
            *documents, rest = (rest + chunk).split(separator)
            found = found or bool(documents)
            yield from documents
        self._separated.add(found)
        yield rest

    def _read_rows(self, path: Path) -> Numbered:
        with parquet.ParquetFile(path) as file:
            names, size, rows = file.schema_arrow.names, path.stat().st_size, file.metadata.num_rows
            number = 0
            self._position_in_file = lambda: size * number // rows
            fields = {self._field, self.chat.field if self.chat else self._field} & {*names}
            for batch in file.iter_batches(_ROWS, columns=sorted(fields) or names):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record

    def _get_text(self, record: Any, where: str) -> str:
        """Return the text of a record, or its conversation; null counts as empty."""
        if not isinstance(record, dict):
            raise ConfigError(f"{where}: {type(record).__name__}, not an object; make it {{{self._field!r}: ...}}")
        if self.chat and self.chat.field in record:
            messages = record[self.chat.field]
            if messages is not None or self._field not in record:
                return self.chat.read([] if messages is None else messages, where)
        remedy = "set text_field to the field that holds the text, or messages_field to that of conversations"
        if self._field not in record:
            raise ConfigError(f"{where}: no field {self._field!r} (found: {', '.join(record) or 'none'}); {remedy}")
        text = record[self._field]
        if not isinstance(text, str | None):
            raise ConfigError(f"{where}: field {self._field!r} is {type(text).__name__}, not text; {remedy}")
        return text or ""


def _join_pieces(pieces: list[str]) -> str:
    """Return the text of a document; one that is not in pieces stays what it is, such as a conversation."""
    return pieces[0] if len(pieces) == 1 else "".join(pieces)


def _load_hub_splits(address: str, dataset: HubDataset) -> dict[str, Iterable[Any]]:
    """Return the splits of a hub's dataset, as streams.

    Raises:
        ConfigError: there is no train split.
        RunError: the hub cannot be reached, or has no such configuration.
    """
    from datasets import load_dataset

    with _hub_errors(address):
        splits = load_dataset(dataset.repository, dataset.config, streaming=True, revision=dataset.commit)
    if not any(SPLIT_NAMES.get(name) == "train" for name in splits):
        raise ConfigError(
            f"{address}: no split train (found: {shorten(list(splits))}); give hf://org/name/CONFIG of a configuration "
            "that has one, or download the files and give their directory"
        )
    return dict(splits)


@contextmanager
def _hub_errors(address: str) -> Iterator[None]:
    try:
        yield
    except MinitronError:
        raise
    except Exception as error:  # each dataset builder and network library has its own classes
        remedy = "check the dataset's configuration and the network, or give a local path"
        raise RunError(f"{address}: cannot be read ({_one_line_reason(error)}); {remedy}") from error


def _find_own_splits(address: str, sources: dict[Any, str | None]) -> tuple[str, ...]:
    """Return the corpus's own splits, by the names in it; none unless there are train and another one.

    Raises:
        ConfigError: some names give a split, and others do not.
    """
    splits = tuple(split for split in SPLITS if split in sources.values())
    if "train" not in splits or len(splits) == 1:
        return ()
    if nameless := [source.name for source, split in sources.items() if split is None]:
        raise ConfigError(
            f"{address}: has files for {' and '.join(splits)}, but the names of {shorten(nameless)} give no split; "
            "rename them, or set prepare.own_splits to false to divide all documents by the fractions"
        )
    return splits


def _order_sources(sources: dict[Any, str | None]) -> list[tuple[Any, str | None]]:
    """Return the sources with their splits: those of test first, then of validation, then of train."""
    return [(source, split) for name in reversed(SPLITS) for source, split in sources.items() if split == name]


def _decompress(raw: BinaryIO, compression: str | None) -> BinaryIO:
    """Return the stream of a file's content. These readers detect a truncated file; zstandard's own would not."""
    match compression:
        case None:
            return raw
        case "xz":
            return io.BufferedReader(lzma.open(raw))
        case _:
            return io.BufferedReader(pyarrow.input_stream(raw, compression=compression))


def _limit_length(lines: Iterator[str], path: Path) -> Iterator[str]:
    length = 0
    for line in lines:
        length += len(line)
        if length > _LONGEST:
            raise ConfigError(
                f"{path}: one document of more than {_LONGEST / 1e6:.0f} million characters; if it has several, set "
                r"prepare.document_separator to the text between them ('\n\n' for a blank line), or save them as .jsonl"
            )
        yield line


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


def _mark_titles(records: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield each record; say whether it is a title that begins an article.

    A title must follow a blank line, because some lines in formulas look like titles. In copies of WikiText without
    blank lines, every such line counts as a title.
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
            # A value that the end of the buffer cuts off fails at the very end, or has an unterminated string.
            incomplete = error.pos >= len(buffer) - len("-Infinity") or error.msg.startswith("Unterminated string")
            chunk = stream.read(max(_CHUNK, len(buffer) - start)) if incomplete else ""
            if not chunk and (start < len(buffer) or open_arrays):
                raise ValueError(error.msg if start < len(buffer) else "the array has no end") from error
            if not chunk:
                return
            buffer, start = buffer[start:] + chunk, 0


def _one_line_reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
