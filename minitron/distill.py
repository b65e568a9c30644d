"""Distil the teacher into the pruned student: forward KL between their next-token distributions.

Run it: `python -m minitron.distill --config distill.yaml`.
"""

from pathlib import Path
from typing import Any

from minitron import stage
from minitron.checkpoint import load_model, read_config, save_model
from minitron.config import DistillConfig
from minitron.data import PackedDataset, check_tokenizer
from minitron.engines import hf
from minitron.losses import LossWeights
from minitron.scoring import score
from minitron.tracking import Tracker


def run(config: DistillConfig) -> dict[str, Any]:
    """Write the trained student to `config.output`, a Hugging Face directory.

    Returns:
        The stage's record; its history holds the loss terms of every step and the validations, step 0 included.

    Raises:
        ConfigError: a model is not supported, or its tokenizer is not the dataset's.
        RunError: weights or the dataset are damaged.
    """
    return stage.run(config, _work)


def _work(config: DistillConfig, directory: Path, tracker: Tracker) -> dict[str, Any]:
    for model in (config.teacher, config.student):
        check_tokenizer(config.dataset, model)
    teacher: Any = load_model(config.teacher, hf.compute_dtype())
    teacher.requires_grad_(False).to(hf.device())
    validation = PackedDataset(config.dataset / "validation", config.sequence_length, config.seed)
    sequences, micro_batch_size = config.validation_sequences, config.micro_batch_size
    floor = score({"teacher": teacher}, validation, sequences, micro_batch_size, description="teacher validation")
    weights = LossWeights(config.kl_weight, config.cross_entropy_weight, config.temperature)
    student, found = hf.train(config, config.student, weights, directory, tracker, teacher)
    save_model(student.to(read_config(config.student).dtype), directory, tokenizer_from=config.student)
    found["metrics"]["teacher_validation_loss"] = floor["teacher"]["loss"]
    return found


if __name__ == "__main__":
    stage.main("distill")
