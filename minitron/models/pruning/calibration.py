"""The calibration of a compensated cut: how much of it there must be, and which part of it no fit sees.

S = sequence.
"""

from itertools import count
from typing import Any

from torch import Tensor

from minitron.errors import ConfigError
from minitron.models.pruning.layers import get_head_dim

HELD_OUT = 8
"""One of so many calibration sequences, at least one, is held out of the fits: it chooses ridges, and shows errors."""

MOST_HELD_OUT = 8192
"""Tokens that are held out, at most: more of them would choose the same ridges, and a layer's inputs are kept."""


def check_calibration(sequences: int, sequence_length: int, config: Any) -> None:
    """Refuse calibration that is too small to fit a layer's matrices.

    Raises:
        ConfigError: the fits would see fewer tokens than a matrix has columns; the message says how many are needed.
    """
    columns = max(config.intermediate_size, config.num_attention_heads * get_head_dim(config), config.hidden_size)
    needed = next(n for n in count(2) if (n - _count_held_out(n, sequence_length)) * sequence_length >= columns)
    if sequences < needed:
        raise ConfigError(
            f"prune.calibration_sequences: {sequences} sequences of {sequence_length} tokens are too few to refit "
            f"matrices of {columns} columns; give at least {needed}, with a corpus that has as many, or set method to "
            "minitron"
        )


def split_calibration(input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sequences that are fitted, and those that are held out."""
    fitted = len(input_ids) - _count_held_out(*input_ids.shape)
    return input_ids[:fitted], input_ids[fitted:]


def _count_held_out(sequences: int, sequence_length: int) -> int:
    return max(min(sequences // HELD_OUT, MOST_HELD_OUT // sequence_length), 1)
