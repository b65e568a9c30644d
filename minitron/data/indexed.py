"""Write Megatron's .bin and .idx files, and read them by memory map.

A split of conversations has a third file, .mask, with a byte per token: 1 if the token counts in the loss, else 0.
Megatron does not read it.
"""

import os
import struct
from array import array
from collections.abc import Sequence
from io import BufferedRandom
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from minitron.errors import ConfigError, RunError
from minitron.storage.layout import MASK

LENGTHS = ".lengths"
"""The end of the name of a file with the lengths of the saved documents, until there is an index."""

SPLITS = ("train", "validation", "test")

_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES: dict[int, Any] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}
_HEADER = struct.Struct("<QBQQ")  # version, dtype code, sequences, document boundaries


class IndexedWriter:
    """Write documents to `<prefix>.bin` as they come, their masks to `<prefix>.mask`, and `<prefix>.idx` at the end."""

    def __init__(self, prefix: Path, vocab_size: int, has_masks: bool = False, saved: int = 0) -> None:
        """Open the files. A token takes two bytes if the vocabulary allows it, as in Megatron.

        Args:
            prefix: the split.
            vocab_size: number of tokens that there are.
            has_masks: whether documents may have masks.
            saved: number of documents to keep, as `save` returned it; later ones in the files are dropped.
        """
        self._prefix, self._saved = prefix, saved
        self._code = 8 if vocab_size < 65500 else 4
        self._lengths = array("i")
        if saved:
            with prefix.with_suffix(LENGTHS).open("rb") as stream:
                self._lengths.fromfile(stream, saved)
        self._bin = _open_after(prefix.with_suffix(".bin"), self.tokens * _DTYPES[self._code].itemsize)
        self._mask = _open_after(prefix.with_suffix(MASK), self.tokens) if has_masks else None

    @property
    def tokens(self) -> int:
        """Number of tokens so far."""
        return sum(self._lengths)

    def add_documents(self, documents: list[list[int]], masks: Sequence[bytes | None] = ()) -> None:
        """Append documents, each a list of token ids with its EOS, and their masks; None: all tokens count."""
        self._lengths.extend(map(len, documents))
        self._bin.write(np.fromiter(chain.from_iterable(documents), _DTYPES[self._code]).tobytes())
        if self._mask:
            pairs = zip(documents, masks, strict=True)
            self._mask.writelines(b"\1" * len(ids) if mask is None else mask for ids, mask in pairs)

    def save(self) -> int:
        """Write everything to the disk, so that another writer can go on after a kill; return the documents so far."""
        with _open_after(self._prefix.with_suffix(LENGTHS), self._saved * self._lengths.itemsize) as stream:
            self._lengths[self._saved :].tofile(stream)
            for file in filter(None, (self._bin, self._mask, stream)):
                file.flush()
                os.fsync(file.fileno())
        self._saved = len(self._lengths)
        return self._saved

    def close(self) -> None:
        """Close the .bin file and write the index."""
        self._bin.close()
        if self._mask:
            self._mask.close()
        lengths = np.array(self._lengths, np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(lengths) else lengths
        write_index(self._prefix, self._code, lengths, starts)


def _open_after(path: Path, size: int) -> BufferedRandom:
    """Open a file to write after its first bytes; drop the others."""
    path.touch()
    stream = path.open("r+b")
    stream.truncate(size)
    stream.seek(size)
    return stream


def write_index(prefix: Path, code: int, lengths: np.ndarray, starts: np.ndarray) -> None:
    """Write `<prefix>.idx`: the documents' lengths [D] and starts [D] in tokens; several may start at the same one."""
    with prefix.with_suffix(".idx").open("wb") as idx:
        idx.write(_MAGIC)
        idx.write(_HEADER.pack(1, code, len(lengths), len(lengths) + 1))
        idx.write(lengths.astype(np.int32).tobytes())
        idx.write((starts * _DTYPES[code].itemsize).astype(np.int64).tobytes())
        idx.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


class IndexedDataset:
    """Read a split: `lengths` [D] and `starts` [D] in tokens, `tokens` [T] and `mask` [T] memory-mapped.

    `mask` is None if the split has none: then all tokens count. The index of a mixture of corpora may list a document
    several times, or not at all.
    """

    def __init__(self, prefix: Path) -> None:
        """Map the files.

        Raises:
            ConfigError: the split does not exist.
            RunError: a file is truncated, or not in Megatron's format.
        """
        idx_path, bin_path = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
        if not (idx_path.is_file() and bin_path.is_file()):
            raise ConfigError(f"{prefix}: no .bin and .idx; give a directory that prepare wrote")
        idx = idx_path.read_bytes()
        offset = len(_MAGIC) + _HEADER.size
        if not idx.startswith(_MAGIC) or len(idx) < offset:
            raise RunError(f"{idx_path}: not a Megatron index; run prepare again")
        _, self.code, count, _ = _HEADER.unpack_from(idx, len(_MAGIC))
        if self.code not in _DTYPES or len(idx) != offset + 4 * count + 8 * count + 8 * (count + 1):
            raise RunError(f"{idx_path}: {len(idx)} bytes do not hold {count} documents; run prepare again")
        self.lengths = np.frombuffer(idx, np.int32, count, offset).astype(np.int64)
        dtype: Any = _DTYPES[self.code]
        self.starts = np.frombuffer(idx, np.int64, count, offset + 4 * count) // dtype.itemsize
        ends = self.starts + self.lengths
        is_mixture = not np.array_equal(self.starts[1:], ends[:-1])  # its index may leave out the last documents
        expected, actual = int(ends.max(initial=0)) * dtype.itemsize, bin_path.stat().st_size
        if actual < expected or (actual > expected and not is_mixture):
            raise RunError(f"{bin_path}: damaged: {actual} bytes, but its index lists {expected}; run prepare again")
        self.tokens: Any = np.memmap(bin_path, dtype=dtype, mode="r") if actual else np.empty(0, dtype)
        self.mask = _read_mask(prefix.with_suffix(MASK), len(self.tokens))

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the token ids of one document."""
        return self.tokens[self._span(index)]

    def read_mask(self, index: int) -> np.ndarray:
        """Return 1 for every token of a document that counts in the loss, else 0."""
        if self.mask is None:
            return np.ones(self.lengths[index], np.uint8)
        return self.mask[self._span(index)]

    def count_tokens_of_loss(self) -> int:
        """Return the number of tokens that count in the loss."""
        return int(self.lengths.sum()) if self.mask is None else int(np.count_nonzero(self.mask))

    def _span(self, index: int) -> slice:
        return slice(self.starts[index], self.starts[index] + self.lengths[index])


def _read_mask(path: Path, tokens: int) -> Any:
    if not path.is_file():
        return None
    if (actual := path.stat().st_size) != tokens:
        raise RunError(f"{path}: damaged: {actual} bytes for {tokens} tokens; run prepare again")
    return np.memmap(path, np.uint8, mode="r") if tokens else np.empty(0, np.uint8)
