"""The states of a training on their way to the disk: copied to memory in a moment, written while the training goes on.

One thread writes them in their order, so that a kill at any write leaves what it would leave of a training that waits.
The next state waits until the one before is on the disk: the memory of one copy is enough, and is kept for the next.
"""

import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from minitron.engines.checkpoints import BEST, CHECKPOINT, publish_checkpoint
from minitron.engines.hf.copies import StateCopies
from minitron.engines.hf.sharding import gather_weights
from minitron.engines.progress import HISTORY
from minitron.models.checks import CONFIG
from minitron.models.processes import count_processes, get_rank

Note = dict[str, Any] | None
"""The note of a best state or of a checkpoint (see engines/checkpoints.py); None: it is not to be written."""


class StateWriter:
    """Writes best states and checkpoints; every process of a training has one, and calls the same methods."""

    def __init__(self, initial: Path, work: Path, parameters: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Write the parameters and moments to `work`; `initial` is the model that is trained."""
        self._initial, self._work = initial, work
        self._parameters = {name: parameter.detach() for name, parameter in parameters.items()}
        self._state = self._parameters | moments
        self._copies = StateCopies(self._state)
        # the thread's messages must not meet those of the training
        self._group = dist.new_group(backend="gloo") if count_processes() > 1 else None
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] = self._thread.submit(lambda: None)

    def save(self, step: int, best: Note, checkpoint: Note) -> None:
        """Copy the state after a step, and let it be written: as the best state, as a checkpoint, or as both.

        Raises:
            Exception: an earlier state could not be written; such as OSError if the disk is full.
        """
        if best or checkpoint or self._pending.done():
            self._pending.result()
        if not best and not checkpoint:
            return
        is_alone, weights, state = count_processes() == 1, dict[str, Tensor](), dict[str, Tensor]()
        if checkpoint or (best and step and is_alone):
            state = self._copies.update(self._state if checkpoint else self._parameters)
        if best and step:  # the untrained state is not copied
            weights = {name: state[name] for name in self._parameters} if is_alone else gather_weights(self._parameters)
        history = (self._work / HISTORY).read_text() if get_rank() == 0 else ""
        self._pending = self._thread.submit(self._write, step, weights, best, state, checkpoint, history)

    def __enter__(self) -> "StateWriter":
        """Let the states be written until the block ends."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the last state.

        Raises:
            Exception: it could not be written, and no other error ends the block.
        """
        self._thread.shutdown()
        self._copies.release()
        error = self._pending.exception()
        if error and (kind is None or kind is SystemExit):
            raise error
        if error:
            print(f"warning: {error}", file=sys.stderr, flush=True)

    def _write(
        self, step: int, weights: dict[str, Tensor], best: Note, state: dict[str, Tensor], note: Note, history: str
    ) -> None:
        if best and get_rank() == 0:
            self._write_best(self._work / f"{BEST}-{step}", weights, best)
        if note:
            self._write_checkpoint(self._work / f"{CHECKPOINT}-{step}", state, note, history)

    def _write_best(self, path: Path, weights: dict[str, Tensor], note: dict[str, Any]) -> None:
        """Write a model in float32."""
        path.mkdir()
        if weights:
            shutil.copyfile(self._initial / CONFIG, path / CONFIG)
            save_file(weights, path / "model.safetensors", {"format": "pt"})
        publish_checkpoint(path, note)

    def _write_checkpoint(self, path: Path, state: dict[str, Tensor], note: dict[str, Any], history: str) -> None:
        """Write this process's share; process 0 completes the checkpoint once all have written theirs."""
        writer = dcp.FileSystemWriter(path, sync_files=False)  # publishing does it
        try:
            dcp.save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        except dcp.CheckpointException as error:  # is no Exception, and hides its reason
            raise next(iter(error.failures.values()))[0] from error
        if get_rank() == 0:
            (path / HISTORY).write_text(history)
            publish_checkpoint(path, note)
