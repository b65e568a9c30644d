"""Write Megatron's .bin and .idx files, and read them by memory map."""

import struct
from array import array
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from minitron.errors import ConfigError, RunError

SPLITS = ("train", "validation", "test")

_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES: dict[int, Any] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}
_HEADER = struct.Struct("<QBQQ")  # version, dtype code, sequences, document boundaries


class IndexedWriter:
    """Write documents to `<prefix>.bin` as they come, and `<prefix>.idx` at the end."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        """Open the file. A token takes two bytes if the vocabulary allows it, as in Megatron."""
        self._prefix = prefix
        self._code = 8 if vocab_size < 65500 else 4
        self._bin = prefix.with_suffix(".bin").open("wb")
        self._lengths = array("i")

    def add_documents(self, documents: list[list[int]]) -> None:
        """Append documents, each a list of token ids with its EOS."""
        self._lengths.extend(map(len, documents))
        self._bin.write(np.fromiter(chain.from_iterable(documents), _DTYPES[self._code]).tobytes())

    def close(self) -> None:
        """Close the .bin file and write the index."""
        self._bin.close()
        lengths = np.array(self._lengths, np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(lengths) else lengths
        with self._prefix.with_suffix(".idx").open("wb") as idx:
            idx.write(_MAGIC)
            idx.write(_HEADER.pack(1, self._code, len(lengths), len(lengths) + 1))
            idx.write(lengths.astype(np.int32).tobytes())
            idx.write((starts * _DTYPES[self._code].itemsize).astype(np.int64).tobytes())
            idx.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


class IndexedDataset:
    """Read a split: `lengths` [D] and `starts` [D] in tokens, `tokens` [T] memory-mapped."""

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
        _, code, count, _ = _HEADER.unpack_from(idx, len(_MAGIC))
        if code not in _DTYPES or len(idx) != offset + 4 * count + 8 * count + 8 * (count + 1):
            raise RunError(f"{idx_path}: {len(idx)} bytes do not hold {count} documents; run prepare again")
        self.lengths = np.frombuffer(idx, np.int32, count, offset).astype(np.int64)
        dtype: Any = _DTYPES[code]
        expected, actual = int(self.lengths.sum()) * dtype.itemsize, bin_path.stat().st_size
        if actual != expected:
            raise RunError(f"{bin_path}: damaged: {actual} bytes, but its index lists {expected}; run prepare again")
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]) if count else self.lengths
        self.tokens: Any = np.memmap(bin_path, dtype=dtype, mode="r") if actual else np.empty(0, dtype)

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the token ids of one document."""
        start = self.starts[index]
        return self.tokens[start : start + self.lengths[index]]
