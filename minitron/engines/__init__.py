"""The engines that train and prune: hf (transformers) and nemo (NeMo, Megatron), with the same settings and data.

An engine is a module with the functions of `Engine`. The room imports config, cluster, storage, data, tracking and
models.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from minitron.config.stages import PruneConfig, TrainingConfig
from minitron.fast_imports import many_imports

if TYPE_CHECKING:  # register's image has no torch
    from minitron.models.pruning.surgery import Cut, Given, Shape
    from minitron.tracking.stage_run import Tracker


class Engine(Protocol):
    """The functions of an engine that stages call."""

    def train(
        self,
        config: TrainingConfig,
        initial: Path,
        directory: Path,
        tracker: "Tracker",
        teacher: Path | None = None,
    ) -> dict[str, Any]:
        """Train the model in `initial`; write its best state by validation loss, the untrained one included.

        Args:
            config: steps, batch sizes, loss, optimizer, validation and checkpoint intervals.
            initial: model directory to start from; it is not changed.
            directory: the stage's work in progress, which becomes a Hugging Face model directory;
                `staging.checkpoints_path` gives the directory for the checkpoints.
            tracker: receives the metrics while the training runs.
            teacher: model directory to learn logits from; None: cross-entropy alone.

        Returns:
            Entries of the stage's record: `metrics`, `history`, and the numbers that the engine knows better.

        Raises:
            ConfigError: the engine is not installed, or a setting does not fit the model.
            RunError: the training failed.
        """

    def prune(self, config: PruneConfig, shape: "Shape", given: "Given", directory: Path) -> "Cut":
        """Cut the student out of `config.teacher` and write it to `directory`, a Hugging Face model directory.

        Args:
            config: the stage's settings; its inputs are local directories.
            shape: the student's sizes.
            given: what to keep, of the axes that the engine does not choose.
            directory: the stage's work in progress.

        Returns:
            What was kept, and by what it was chosen.

        Raises:
            ConfigError: the engine is not installed, cannot cut to these sizes, or needs more calibration.
            RunError: the weights cannot be read, or the scores or activations are not finite.
        """


def get_engine(name: str) -> Engine:
    """Return the engine of a name, hf or nemo; the other one is not imported."""
    with many_imports():
        if name == "nemo":
            from minitron.engines.nemo import engine as nemo

            return nemo
        from minitron.engines import hf

        return hf
