"""Compress a large language model: prepare → finetune → prune → distill → evaluate → register."""

__version__ = "0.1.0"
