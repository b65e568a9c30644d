"""Processes that work on the same models, one per GPU: each has its share of the sequences, and process 0 decides.

What is summed over shares differs by rounding, and so may what two processes compute from equal sums. So wherever one
of several results is to be chosen, one process chooses, and the others take its choice. A process that is alone has
everything, and exchanges nothing.

N = rows of a process, C = columns.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")
Sequences = TypeVar("Sequences", Tensor, range)


def count_processes() -> int:
    """Count the processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank() -> int:
    """Return the number of this process; 0 decides, and writes all files that are no shard."""
    return dist.get_rank() if dist.is_initialized() else 0


def take_share(sequences: Sequences, first: int = 0) -> Sequences:
    """Return this process's share of sequences, every n-th one; it may be empty.

    Args:
        sequences: one per entry, or per row.
        first: how many sequences of the same calibration come before them, so that all shares of it are about equal.
    """
    return sequences[(get_rank() - first) % count_processes() :: count_processes()]


def split_share(sequences: Tensor, size: int, first: int = 0) -> tuple[Tensor, ...]:
    """Return this process's share in batches of at most so many sequences; see `take_share`."""
    share = take_share(sequences, first)
    return share.split(size) if len(share) else ()


def ask_first(compute: Callable[[], Value]) -> Value:
    """Return what process 0 computes to all."""
    values: list[Any] = [compute() if get_rank() == 0 else None]
    if count_processes() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def list_values(value: Value) -> list[Value]:
    """Return a value of every process, in their order, to all."""
    values: list[Any] = [value] * count_processes()
    if count_processes() > 1:
        dist.all_gather_object(values, value)
    return values


def add_shares(sums: Iterable[Tensor], receiver: int | None = None) -> None:
    """Add up what the processes have summed over their shares, in place; all get it, or the receiver alone."""
    if count_processes() == 1:
        return
    for each in sums:
        if receiver is None:
            dist.all_reduce(each)
        else:
            dist.reduce(each, receiver)


def send_to_all(tensor: Tensor, source: int) -> None:
    """Overwrite a tensor, which is contiguous, by that of one process."""
    if count_processes() > 1:
        dist.broadcast(tensor, source)


def gather_rows(rows_NC: Tensor) -> list[Tensor]:
    """Return the rows of all processes, in their order. All have the same number of columns; some may have no rows."""
    parts = [
        rows_NC.contiguous() if process == get_rank() else rows_NC.new_empty(count, rows_NC.shape[1])
        for process, count in enumerate(list_values(len(rows_NC)))
    ]
    for process, part in enumerate(parts):
        send_to_all(part, process)
    return parts
