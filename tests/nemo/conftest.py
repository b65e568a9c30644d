"""NeMo on a CPU, with real processes: what these tests prove, and what they do not.

With `cpu_shim.py` under it, NeMo runs here without a GPU, in fp32 and with Megatron's own layers. That proves the
orchestration (import, launch, resume, export), the pruning, the losses and the conversions, and the collectives over
gloo. It does not touch Transformer Engine, bf16, NCCL, or anything's speed: `pytest -m gpu` does, on a GPU.

Run them: `make test-nemo`.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minitron.models.checkpoint import save_model
from tests.nemo.nemo_support import CUT, DISTILLATION, run_distill, run_finetune, run_prune

SHIM = Path(__file__).parent / "cpu"
if not torch.cuda.is_available():  # under this process and every one that it starts
    sys.path.insert(0, str(SHIM))
    runpy.run_path(str(SHIM / "sitecustomize.py"))
    paths = [str(SHIM), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)


@pytest.fixture(scope="session")
def wide(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that Model-Optimizer, whose widths are multiples of 64, can cut on every axis."""
    config = LlamaConfig.from_pretrained(
        teacher, hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=4, head_dim=24,
        num_hidden_layers=4, rope_theta=500000.0, vocab_size=600,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # importances that differ, as in a trained model
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    output = tmp_path_factory.mktemp("wide") / "wide"
    save_model(model, output, tokenizer_from=teacher)
    return output


@pytest.fixture(scope="session")
def finetuned(teacher: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same fine-tuning by both engines."""
    root = tmp_path_factory.mktemp("finetuned")
    for engine in ("hf", "nemo"):
        run_finetune(root / engine, dataset, teacher, engine=engine)
    return {engine: root / engine for engine in ("hf", "nemo")}


@pytest.fixture(scope="session")
def pruned(wide: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same cut by both engines."""
    root = tmp_path_factory.mktemp("pruned")
    for engine in ("hf", "nemo"):
        run_prune(root / engine, dataset, wide, engine=engine, **CUT)
    return {engine: root / engine for engine in ("hf", "nemo")}


@pytest.fixture(scope="session")
def distilled(
    wide: Path, pruned: dict[str, Path], dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """The records of one distillation: by engine hf, by engine nemo, and by it in two processes of either kind."""
    root = tmp_path_factory.mktemp("distilled")
    runs = {
        "hf": {},
        "nemo": {"engine": "nemo"},
        "tensor": {"engine": "nemo", "tensor_parallel_size": 2, "gradient_checkpointing": True},
        "pipeline": {"engine": "nemo", "pipeline_parallel_size": 2},
    }
    return {
        name: run_distill(root / name, dataset, wide, pruned["hf"], **DISTILLATION, **settings)
        for name, settings in runs.items()
    }
