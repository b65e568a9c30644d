"""The memory of a process as the system counts it."""

import os
import subprocess
import sys
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


def test_what_a_step_frees_serves_the_next_unless_the_environment_says_otherwise() -> None:
    """In processes of their own, because it is a setting of the C library for the whole process."""
    program = (
        "import resource, torch\n"
        "from minitron.models.memory import keep_freed_memory\n"
        "def take_step(): [torch.ones(2**20) for _ in range(10)]\n"
        "def count_faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "keep_freed_memory()\n"
        "take_step()\n"
        "before = count_faults()\n"
        "for _ in range(10): take_step()\n"
        "print(count_faults() - before)\n"
    )
    pages = 10 * 10 * 2**20 * 4 / 4096
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    faults = [
        int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=environment).stdout)
        for environment in (plain, plain | {"MALLOC_MMAP_THRESHOLD_": "65536"})
    ]
    assert faults[0] < pages / 10 and faults[1] > pages / 2
