"""Compress a large language model: prepare → finetune → prune → distill → evaluate → register."""

__version__ = "0.11.0"

METHOD_VERSION = "0.1.0"
"""Part of every result's key, unlike the version. It changes when the same inputs and settings give another result."""

COMPENSATION_VERSION = "0.9.0"
"""The same, for compensated cuts alone."""

# `python -m minitron.STAGE` starts minitron/stages/STAGE.py; code imports minitron.stages.STAGE.
__path__ += [f"{__path__[0]}/stages"]
