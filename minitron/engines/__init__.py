"""Who trains: hf (transformers) or nemo (NeMo, Megatron). Same configuration, same data, same directories."""

import importlib
from typing import Any

from minitron.fast_imports import many_imports


def get_engine(name: str) -> Any:
    """Return an engine's module, which has `train`; only the one that is used is imported."""
    with many_imports():
        return importlib.import_module("minitron.engines.nemo.engine" if name == "nemo" else f"minitron.engines.{name}")
