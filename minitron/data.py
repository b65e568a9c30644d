"""Tokens on disk and in batches: Megatron's .bin/.idx, read by memory map, packed into fixed-length sequences.

The format is megatron-core's `IndexedDataset` (one sequence per document); a test reads our files with megatron-core,
and its files with this module. It is written here because megatron-core declares numpy < 2, which cannot be installed
beside the numpy of this environment without overriding it.

S = sequence length, T = tokens of a split, D = documents of a split.
"""

import struct
from array import array
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from minitron.config.stages import TrainingConfig
from minitron.errors import ConfigError, RunError

SPLITS = ("train", "validation", "test")

_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES: dict[int, Any] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}
_HEADER = struct.Struct("<QBQQ")  # version, dtype code, sequences, document boundaries


class IndexedWriter:
    """Write documents to `<prefix>.bin` as they come and `<prefix>.idx` at the end."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        """Open the file; tokens take two bytes where the vocabulary allows, as Megatron's do."""
        self._prefix = prefix
        self._code = 8 if vocab_size < 65500 else 4
        self._bin = prefix.with_suffix(".bin").open("wb")
        self._lengths = array("i")

    def add(self, documents: list[list[int]]) -> None:
        """Append documents, each a list of token ids with its EOS."""
        self._lengths.extend(map(len, documents))
        self._bin.write(np.fromiter(chain.from_iterable(documents), _DTYPES[self._code]).tobytes())

    def close(self) -> None:
        """Write the index."""
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
            RunError: a file is truncated or not Megatron's.
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
        expected, found = int(self.lengths.sum()) * dtype.itemsize, bin_path.stat().st_size
        if found != expected:
            raise RunError(f"{bin_path}: {found} bytes, but its index lists {expected}: truncated; run prepare again")
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]) if count else self.lengths
        self.tokens: Any = np.memmap(bin_path, dtype=dtype, mode="r") if found else np.empty(0, dtype)

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the token ids of one document."""
        start = self.starts[index]
        return self.tokens[start : start + self.lengths[index]]


class PackedDataset(Dataset):
    """The documents of a split in one seeded order, laid end to end and cut every S tokens.

    Item i is `{"input_ids": int64 [S], "labels": int64 [S]}`, labels being the next tokens: nothing is padded or
    masked, the end of a document included.
    """

    def __init__(self, prefix: Path, sequence_length: int, seed: int) -> None:
        """Open a split.

        Raises:
            ConfigError: the split is shorter than one sequence.
        """
        self._indexed = IndexedDataset(prefix)
        self.sequence_length = sequence_length
        total = int(self._indexed.lengths.sum())
        if total < sequence_length + 1:
            raise ConfigError(
                f"{prefix}: {total} tokens are fewer than one sequence of {sequence_length} + 1; "
                "give a larger corpus, a larger share to this split, or a smaller sequence_length"
            )
        self._order = np.random.default_rng(seed).permutation(len(self._indexed))
        self._ends = np.cumsum(self._indexed.lengths[self._order])

    def __len__(self) -> int:
        """Return the number of whole sequences."""
        return int(self._ends[-1] - 1) // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one packed sequence and its labels."""
        tokens = torch.from_numpy(self._read(index * self.sequence_length, self.sequence_length + 1))
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}

    def _read(self, start: int, count: int) -> np.ndarray:
        """Return `count` tokens from position `start` of the packed stream."""
        pieces = []
        document = int(np.searchsorted(self._ends, start, side="right"))
        while count:
            tokens = self._indexed[self._order[document]]
            piece = tokens[len(tokens) - int(self._ends[document] - start) :][:count]
            pieces.append(piece)
            start, count, document = start + len(piece), count - len(piece), document + 1
        return np.concatenate(pieces).astype(np.int64)


class TrainingSequences(Dataset):
    """The sequences of a whole training, in the order in which both engines read them.

    Every epoch has a seeded order of its own; a batch may hold the end of one and the beginning of the next, so that
    all batches are full.
    """

    def __init__(self, dataset: PackedDataset, count: int, seed: int) -> None:
        """Lay out `count` items of a dataset."""
        self._dataset, self._count, self._seed = dataset, count, seed
        self._epoch, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        """Return the number of sequences that the training reads."""
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return the sequence at a place of the training; items are those of PackedDataset."""
        epoch, place = divmod(index, len(self._dataset))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self._dataset), generator=generator)
        return self._dataset[int(self._order[place])]


def training_data(config: TrainingConfig) -> tuple[TrainingSequences, PackedDataset]:
    """Return what a training reads, and what it is validated on: the first sequences, in order."""
    train, validation = (
        PackedDataset(config.dataset / split, config.sequence_length, config.seed) for split in ("train", "validation")
    )
    return TrainingSequences(train, config.max_steps * config.global_batch_size, config.seed), validation
