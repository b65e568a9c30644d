"""Imports of what is large: torch, transformers, mlflow."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["many_imports"]


@contextmanager
def many_imports() -> Iterator[None]:
    """Let the garbage collector wait, which would look through all that the block imports: a third faster.

    What is in memory after the block, the collector never looks at again: let no block make a model.
    """
    if not gc.isenabled():  # a block within such a block
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
