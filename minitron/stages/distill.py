"""Distill the teacher into the pruned student: a divergence between their next-token distributions.

Run it: `python -m minitron.distill --config distill.yaml`.
"""

from pathlib import Path
from typing import Any

from minitron import engines
from minitron.config.parse import SectionError
from minitron.config.stages import DistillConfig
from minitron.data.manifest import check_tokenizer
from minitron.engines.plan_checks import find_pair_faults, read_sizes
from minitron.models.checks import check_architecture, check_finite, check_model, check_sequence_length
from minitron.runtime import stage
from minitron.runtime.entry import main
from minitron.tracking.stage_run import Tracker


def run(config: DistillConfig) -> dict[str, Any]:
    """Write the trained student to `config.output`, a Hugging Face directory.

    Returns:
        The stage's record; its history has the loss terms of every step and all validations, including step 0.

    Raises:
        ConfigError: a model is not supported or does not match its config, or its tokenizer is not the dataset's.
        RunError: weights or the dataset are damaged.
    """
    return stage.run(config, work)


def work(config: DistillConfig, directory: Path, tracker: Tracker) -> dict[str, Any]:
    """Train the student."""
    for model in (config.teacher, config.student):
        check_model(model)
        check_sequence_length("distill.sequence_length", config.sequence_length, check_architecture(model), model)
        check_finite(model)
        check_tokenizer(config.dataset, model)
    sizes = [read_sizes(check_architecture(model)) for model in (config.student, config.teacher)]
    if faults := list(find_pair_faults(config, *sizes)):
        raise SectionError(faults)
    return engines.get_engine(config.engine).train(config, config.student, directory, tracker, config.teacher)


if __name__ == "__main__":
    main("distill")
