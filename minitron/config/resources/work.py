"""The work of a run's stages: floating-point operations of the matrix products, from settings and sizes.

To learn from a token takes three times as many as to read it: the backward pass has two products for each one of the
forward pass. What is computed twice (gradient_checkpointing) counts once.
"""

from collections.abc import Mapping
from typing import NamedTuple

from minitron.config.document import Plan
from minitron.config.parse import apply_kept
from minitron.config.resources.sizes import Models, Sizes
from minitron.config.settings import DistillSettings, EvaluateSettings, FinetuneSettings, TrainingSettings
from minitron.config.shapes import PruneSettings

_LEARNING = 3
_QUESTION = 100
"""Tokens of a question and its answers."""

_GENERATING = 25
"""Tokens that a CPU reads in the time in which it writes one: all weights pass through it in both cases."""

_TIMINGS = 14
"""Texts per model whose generation is timed; a text in a batch is cheaper."""

_REFITTING = 2
"""A compensated cut reads the calibration with both models again, and solves the systems."""

_TRIED = 12
"""Layers that are measured for each one that is dropped by loss, after all of them for the first one."""

_MEASURING = 0.75
"""A layer is measured in half of the model on average, on held-out calibration; a seam takes half as long again."""


class StageWork(NamedTuple):
    """The work of a stage.

    Attributes:
        total: operations of the stage.
        per_token: operations for one token in each of its progress bars.
        tokens: tokens that a training learns from, or that the other stages read.
    """

    total: float
    per_token: Mapping[str, float]
    tokens: float


def count_operations(sizes: Sizes, length: int) -> float:
    """Count the operations for reading a token: two per weight, and attention to half of the sequence, on average."""
    attention = 2 * sizes.heads * sizes.head * length
    return sizes.layers * (2 * sizes.layer_weights + attention) + 2 * sizes.head_weights


def count_learning_operations(learner: Sizes, length: int, teacher: Sizes | None = None) -> float:
    """Count the operations for learning from a token; if there is a teacher, it reads the token, too."""
    return _LEARNING * count_operations(learner, length) + (count_operations(teacher, length) if teacher else 0.0)


def count_work(plan: Plan, models: Models, tokens: Mapping[str, float]) -> dict[str, StageWork]:
    """Count the work of the stages that read tokens with a model, in their order.

    Args:
        plan: the settings.
        models: the sizes of teacher and student.
        tokens: those of each split; settings may ask for more than there are.
    """
    length = plan.pipeline.sequence_length
    teacher, student = (count_operations(sizes, length) for sizes in (models.teacher_sizes, models.student_sizes))
    work: dict[str, StageWork] = {}
    for stage, settings in plan.stages.items():
        match settings:
            case FinetuneSettings(enabled=True):
                work[stage] = _count_training(settings, length, tokens["validation"], teacher, 0.0)
            case PruneSettings():
                read = min(settings.calibration_sequences * length, tokens["train"])
                passes = read * _count_passes(settings, models)
                passes += _count_layer_search(settings, read, models.teacher_sizes.layers)
                work[stage] = StageWork(passes * teacher, {"importance": teacher}, read)
            case DistillSettings():
                work[stage] = _count_training(settings, length, tokens["validation"], student, teacher)
            case EvaluateSettings():
                all_models = models.teachers * teacher + 2 * student
                read = sum(min(settings.evaluation_sequences * length, tokens[name]) for name in ("validation", "test"))
                read += len(settings.tasks) * (settings.task_limit or 0) * _QUESTION
                read += settings.generation_tokens * (len(settings.prompts) + _TIMINGS) * _GENERATING
                work[stage] = StageWork(read * all_models, {"validation": all_models}, read)
    return work


def _count_passes(settings: PruneSettings, models: Models) -> int:
    """Count how often the teacher reads the calibration, or as much is computed, beside a choice of layers by loss."""
    if settings.method != "compensated":
        return 1
    by_influence = models.student_sizes.layers < models.teacher_sizes.layers and settings.layers_by == "influence"
    has_components = models.student_sizes.hidden < models.teacher_sizes.hidden
    return _REFITTING + by_influence + has_components


def _count_layer_search(settings: PruneSettings, calibration_tokens: float, layers: int) -> float:
    """Count the tokens that the teacher would read in the time in which layers are dropped by loss."""
    left = apply_kept(settings).num_hidden_layers
    if settings.layers_by != "loss" or not left or left >= layers:
        return 0.0
    return (layers + _TRIED * (layers - left)) * min(calibration_tokens / 8, 4096) * _MEASURING


def _count_training(
    settings: TrainingSettings, length: int, validation_tokens: float, learner: float, teacher: float
) -> StageWork:
    """Count the work of a training, by the operations per token of the model that learns and of the teacher."""
    step = _LEARNING * learner + teacher
    validated = min(settings.validation_sequences * length, validation_tokens)
    validations = 1 + -(-settings.max_steps // settings.validation_interval)
    learned = settings.max_steps * settings.global_batch_size * length
    total = learned * step + validated * (learner * validations + teacher)
    return StageWork(total, {"teacher validation": teacher, "validation": learner, "training": step}, learned)
