"""The memory of a process as the system counts it."""

from pathlib import Path

import torch

from minitron.models.memory import return_freed_memory


def read_resident_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def test_freed_tensors_between_others_are_returned() -> None:
    tensor_mb, count = 16, 16
    first = torch.ones(tensor_mb, 2**18)
    del first  # glibc keeps tensors of a size once one of them was freed
    others = [torch.ones(tensor_mb, 2**18) for _ in range(2 * count)]
    del others[::2]
    kept = read_resident_mb()
    return_freed_memory()
    assert kept - read_resident_mb() > 0.9 * count * tensor_mb
    assert all(bool((other == 1).all()) for other in others)
