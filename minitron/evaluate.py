"""Measure teacher before and after correction, pruned model and student, and write the report.

    python -m minitron.evaluate --config FILE

Writes `evaluation.json` and `report.html`. A model with the weights of another one is measured once for both.
"""

import math
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minitron import report, stage, tasks
from minitron.checkpoint import check_architecture, load_model, load_tokenizer, parameter_count
