"""The memory of this process as the system counts it."""

import ctypes


def return_freed_memory() -> None:
    """Return what is freed to the system: glibc keeps freed tensors below 32 MB, and later ones may not fit there."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # no other C library has it
        trim(0)
