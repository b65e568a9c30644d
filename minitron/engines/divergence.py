"""Divergence: a training whose numbers have become useless ends with an error, in both engines."""

import math
from pathlib import Path

from minitron.config.metrics import find_not_finite
from minitron.config.stages import TrainingConfig
from minitron.errors import RunError

MARGIN = 10.0
"""The bound of every loss, in nats per token above uniform guessing, ln(V), or above the lowest validation loss if that
is higher. A model beyond it gives the right token a twenty-thousandth of the probability of a guess. The margin is wide
on purpose: a training can recover from a peak, and its best state is kept in any case."""

_BOUNDED = ("validation_loss", "cross_entropy", "kl")
"""The losses that are compared with the bound. The loss of a distillation is not, because it depends on the weights of
its terms. The KL from a teacher to uniform guessing is also at most ln(V)."""


class Diverged(RunError):
    """A training diverged."""


def check_untrained(model: Path, loss: float) -> None:
    """Refuse a model whose loss is not finite before training.

    Raises:
        RunError: the loss is infinite or NaN.
    """
    if not math.isfinite(loss):
        raise RunError(
            f"{model}: its validation loss is {loss} before training; its weights are damaged, or it overflows in "
            "this precision: get the model again, or make it again with other settings"
        )


def check_step(step: int, row: dict[str, float], vocabulary: int, lowest: float) -> None:
    """Compare the numbers of a step or a validation with the bound.

    Args:
        step: the optimizer step.
        row: the step's row of the history.
        vocabulary: the number of tokens that the model knows.
        lowest: the lowest validation loss so far, infinite before the first one.

    Raises:
        Diverged: a number is infinite or NaN, or a loss is above the bound.
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
    """Add the last good state and the remedy to an error.

    Args:
        error: says at which step the training diverged.
        config: the training's settings.
        path: directory of the last good state.
        step: step of the last good state; 0: the untrained model.
        loss: validation loss of the last good state.
    """
    state = f"step {step}" if step else "the untrained model"
    return Diverged(
        f"{error}; the last good state, {state} (validation loss {loss:.3f}), is in {path}; lower learning_rate "
        f"({config.learning_rate:g}), or raise warmup_steps ({config.warmup_steps}) or global_batch_size "
        f"({config.global_batch_size})"
    )
