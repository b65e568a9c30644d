"""The transformers engine, from a laptop to the GPUs of several nodes: `train` and `prune`."""

from minitron.engines.hf.device import autocast_on_gpu, compile_layers, get_compute_dtype, get_device
from minitron.engines.hf.pruning import prune
from minitron.engines.hf.training import train

__all__ = ["autocast_on_gpu", "compile_layers", "get_compute_dtype", "get_device", "prune", "train"]
