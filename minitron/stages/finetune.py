"""Correct the teacher: fine-tune it on the corpus, and keep the better of the two models.

Run it: `python -m minitron.finetune --config finetune.yaml`.
"""

from pathlib import Path
from typing import Any

from minitron import engines
from minitron.config.stages import FinetuneConfig
from minitron.data.manifest import check_tokenizer
from minitron.models.checkpoint import copy_model
from minitron.models.checks import check_architecture, check_finite, check_model, check_sequence_length
from minitron.runtime import stage
from minitron.runtime.entry import main
from minitron.tracking.stage_run import Tracker


def run(config: FinetuneConfig) -> dict[str, Any]:
    """Write the corrected teacher to `config.output`, a Hugging Face directory.

    Returns:
        The stage's record; `metrics["corrected"]` is 0 if the teacher was kept unchanged.

    Raises:
        ConfigError: the model is not supported or does not match its config, or its tokenizer is not the dataset's.
        RunError: the weights or the dataset are damaged.
    """
    return stage.run(config, work)


def work(config: FinetuneConfig, directory: Path, tracker: Tracker) -> dict[str, Any]:
    """Train, or copy the teacher."""
    teacher = Path(config.teacher)
    check_model(teacher)
    if config.enabled:
        check_sequence_length("finetune.sequence_length", config.sequence_length, check_architecture(teacher), teacher)
    check_finite(teacher)
    check_tokenizer(config.dataset, teacher)
    result: dict[str, Any] = {"metrics": {"corrected": 0}, "history": []}
    if config.enabled:
        result = engines.get_engine(config.engine).train(config, teacher, directory, tracker)
        result["metrics"]["corrected"] = int(result["metrics"]["best_step"] > 0)
    else:
        copy_model(teacher, directory)
    return result


if __name__ == "__main__":
    main("finetune")
