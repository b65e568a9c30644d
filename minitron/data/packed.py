"""Pack the tokens of Megatron's .bin and .idx files, read by memory map, into fixed-length sequences.

The format is megatron-core's `IndexedDataset` (one sequence per document). A test reads our files with megatron-core,
and its files with this module. We do not use megatron-core's code because it requires numpy < 2, but this environment
has a newer numpy.

S = sequence length, T = tokens of a split, D = documents of a split.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from minitron.config.stages import TrainingConfig
from minitron.data.indexed import IndexedDataset
from minitron.errors import ConfigError

IGNORED = -100
"""The label of a token that counts in no loss; torch's own, too."""


class PackedDataset(Dataset):
    """The documents of a split in one seeded order, laid end to end and cut every S tokens.

    Item i is `{"input_ids": int64 [S], "labels": int64 [S]}`; the labels are the next tokens, or IGNORED where the mask
    of the split has 0. There is no padding, and without a mask all tokens count, even the end of a document.
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
                "give a larger corpus, raise this split's share, or lower sequence_length"
            )
        self._order = np.random.default_rng(seed).permutation(len(self._indexed))
        self._ends = np.cumsum(self._indexed.lengths[self._order])

    def __len__(self) -> int:
        """Return the number of whole sequences."""
        return int(self._ends[-1] - 1) // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one packed sequence and its labels."""
        span = index * self.sequence_length, self.sequence_length + 1
        tokens = torch.from_numpy(self._read(self._indexed.__getitem__, *span))
        labels = tokens[1:]
        if self._indexed.mask is not None:
            counts = torch.from_numpy(self._read(self._indexed.read_mask, *span))[1:]
            labels = labels.masked_fill(counts == 0, IGNORED)
        return {"input_ids": tokens[:-1], "labels": labels}

    def _read(self, read_document: Callable[[int], np.ndarray], start: int, count: int) -> np.ndarray:
        """Return what a document has per token, for `count` tokens from position `start` of the packed stream."""
        pieces = []
        document = int(np.searchsorted(self._ends, start, side="right"))
        while count:
            values = read_document(self._order[document])
            piece = values[len(values) - int(self._ends[document] - start) :][:count]
            pieces.append(piece)
            start, count, document = start + len(piece), count - len(piece), document + 1
        return np.concatenate(pieces).astype(np.int64)


class TrainingSequences(Dataset):
    """The sequences of a whole training, in the order that both engines use.

    Every epoch has its own seeded order. All batches are full: a batch may span the end of one epoch and the beginning
    of the next.
    """

    def __init__(self, dataset: PackedDataset, count: int, seed: int) -> None:
        """Lay out `count` items of a dataset."""
        self._dataset, self._count, self._seed = dataset, count, seed
        self._epoch, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        """Return the number of sequences in the training."""
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return the sequence at a position of the training, as an item of PackedDataset."""
        return self._dataset[self.find_item(index)]

    def find_item(self, index: int) -> int:
        """Return the position in PackedDataset of the sequence at a position of the training."""
        epoch, position = divmod(index, len(self._dataset))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self._dataset), generator=generator)
        return int(self._order[position])

    @property
    def distinct(self) -> int:
        """Number of different sequences; the first epoch has each of them once."""
        return min(self._count, len(self._dataset))


def open_training_data(config: TrainingConfig) -> tuple[TrainingSequences, PackedDataset]:
    """Return the training sequences and the validation split."""
    train, validation = (
        PackedDataset(config.dataset / split, config.sequence_length, config.seed) for split in ("train", "validation")
    )
    return TrainingSequences(train, config.max_steps * config.global_batch_size, config.seed), validation
