"""The memory of this process as the system counts it: what the C library, if it is glibc, does with freed tensors."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_KEPT, _MOST_KEPT = 32 << 20, 256 << 20


def return_freed_memory() -> None:
    """Return what is freed to the system: glibc keeps freed tensors below 32 MB, and later ones may not fit there."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_freed_memory() -> None:
    """Keep up to 256 MB of what a step frees for the next: taking memory anew lasts longer than filling it.

    By itself glibc returns more or less of it, as the sizes of earlier tensors have it. A tensor of 32 MB or more is
    returned as before. Who sets MALLOC_… in the environment decides instead.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        tune(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        tune(_M_TRIM_THRESHOLD, _MOST_KEPT)
