"""Shared by the tests of engine nemo."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minitron.config.stages import DistillConfig, FinetuneConfig, PruneConfig
from minitron.stages import distill, finetune, prune

TRAINING = {
    "sequence_length": 32,
    "micro_batch_size": 4,
    "global_batch_size": 8,
    "max_steps": 8,
    "learning_rate": 3e-3,
    "min_learning_rate": 3e-4,
    "validation_interval": 4,
    "validation_sequences": 12,
    "checkpoint_interval": 3,
}
"""12 sequences are a batch and a half: the second is filled up. 3 does not divide 8: the intervals do not coincide."""


DISTILLATION = {"cross_entropy_weight": 0.5, "temperature": 2.0}
"""Of the distillations that are compared: both losses count."""

CUT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
"""Of the model `wide`: every axis."""


def run_finetune(output: Path, dataset: Path, teacher: Path, **settings: Any) -> dict[str, Any]:
    return finetune.run(FinetuneConfig(output=output, dataset=dataset, teacher=str(teacher), **TRAINING | settings))


def run_distill(output: Path, dataset: Path, teacher: Path, student: Path, **settings: Any) -> dict[str, Any]:
    return distill.run(
        DistillConfig(output=output, dataset=dataset, teacher=teacher, student=student, **TRAINING | settings)
    )


def run_prune(output: Path, dataset: Path, teacher: Path, **settings: Any) -> dict[str, Any]:
    config = PruneConfig(
        output=output, dataset=dataset, teacher=teacher, sequence_length=32, micro_batch_size=4,
        calibration_sequences=16, **settings,
    )  # fmt: skip
    prune.run(config)
    return json.loads((output / "pruning.json").read_text())


def curves(record: dict[str, Any]) -> dict[str, list[float]]:
    """Return the history as one list per metric."""
    names = ("loss", "kl", "cross_entropy", "learning_rate", "grad_norm", "validation_loss")
    series = {name: [row[name] for row in record["history"] if name in row] for name in names}
    return {name: values for name, values in series.items() if values}


def distillation_curves_of_hf(record: dict[str, Any]) -> dict[str, list[float]]:
    """Return the history of a DISTILLATION with the KL that engine nemo logs: that in the loss, at its temperature."""
    series = curves(record)
    share, temperature = DISTILLATION["cross_entropy_weight"], DISTILLATION["temperature"]
    losses = zip(series["loss"], series["cross_entropy"], strict=True)
    return series | {"kl": [(loss - share * cross_entropy) / temperature**2 for loss, cross_entropy in losses]}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def logits(directory: Path) -> torch.Tensor:
    """Return the logits of some tokens, in this environment's transformers."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(tokens()).logits


def tokens() -> torch.Tensor:
    return torch.arange(1, 97).reshape(2, 48) * 5 % 500
