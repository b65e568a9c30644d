"""Divergence: a training whose numbers are of no use any more ends with an error, in both engines."""

import math
from pathlib import Path

from minitron.config.metrics import find_not_finite
from minitron.config.stages import TrainingConfig
from minitron.errors import RunError

MARGIN = 10.0
"""Nats per token above uniform guessing, ln(V), or above the lowest validation loss, if that is higher: the bound of
every loss. A model beyond it gives the right token a twenty-thousandth of the probability that guessing gives it. The
margin is wide on purpose: a training can recover from a peak, and its best state is kept in any case."""

_BOUNDED = ("validation_loss", "cross_entropy", "kl")
"""The losses that are held against the bound. The loss of a distillation is not: it depends on the weights of its
terms. The KL from a teacher to uniform guessing is at most ln(V), too."""


class Diverged(RunError):
    """A training diverged."""


def check_untrained(model: Path, loss: float) -> None:
    """Refuse a model whose loss is no finite number before any training.

    Raises:
        RunError: the loss is infinite or not a number.
    """
    if not math.isfinite(loss):
        raise RunError(
            f"{model}: its validation loss is {loss} before any training; its weights are damaged, or it overflows in "
            "this precision: get the model again, or make it anew with other settings"
        )


def check_step(step: int, row: dict[str, float], vocabulary: int, lowest: float) -> None:
    """Hold the numbers of a step or a validation against the bound.

    Args:
        step: the optimizer step.
        row: its row of the history.
        vocabulary: the number of tokens that the model knows.
        lowest: the lowest validation loss so far, infinite before the first one.

    Raises:
        Diverged: a number is infinite or not a number, or a loss is above the bound.
    """
    if reason := find_not_finite(row):
        raise Diverged(f"the training diverged at step {step}: {reason}")
    bound = max(math.log(vocabulary), lowest) + MARGIN
    for name in _BOUNDED:
        if (loss := row.get(name, 0.0)) > bound:
            raise Diverged(
                f"the training diverged at step {step}: {name} is {loss:.3f}, more than {MARGIN:g} nats above uniform "
                f"guessing ({math.log(vocabulary):.3f}) and the lowest validation loss ({lowest:.3f})"
            )


def name_last_good(error: Diverged, config: TrainingConfig, path: Path, step: int, loss: float) -> Diverged:
    """Return the error with the last good state and the remedy.

    Args:
        error: says where the training diverged.
        config: its settings.
        path: directory of the last good state.
        step: the step that it is of; 0: the untrained model.
        loss: its validation loss.
    """
    state = f"step {step}" if step else "the untrained model"
    return Diverged(
        f"{error}; the last good state, {state} (validation loss {loss:.3f}), is in {path}; lower learning_rate "
        f"({config.learning_rate:g}), or raise warmup_steps ({config.warmup_steps}) or global_batch_size "
        f"({config.global_batch_size})"
    )
