"""Imports of what is large: torch, transformers, mlflow."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["many_imports"]


@contextmanager
def many_imports() -> Iterator[None]:
    """Let the garbage collector wait, which would look through all that the block imports: a third faster."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
