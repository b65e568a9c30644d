"""The course of a training inside NeMo: weighted losses, validations, the best state, checkpoints, progress."""

import resource
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from modelopt.torch.distill import DistillationLossBalancer
from modelopt.torch.distill.loss_balancers import STUDENT_LOSS_KEY
from nemo.utils.model_utils import unwrap_model
from torch import Tensor

from minitron.config.metrics import compute_perplexity
from minitron.config.stages import DistillConfig
from minitron.engines.checkpoints import BEST, CHECKPOINT, publish_checkpoint
from minitron.engines.divergence import Diverged, check_step, check_untrained
from minitron.engines.hf import get_device
from minitron.engines.progress import HISTORY, Start, append_row, write_end
from minitron.engines.trainer_status import TrainerStatus
from minitron.models.checks import read_config
from minitron.models.losses import LossWeights
from minitron.models.memory import return_freed_memory

LOSS_TERMS = ("kl", "cross_entropy", "intermediate")


class Balancer(DistillationLossBalancer):
    """Adds up the distillation's loss with fixed weights, and sums its terms for the history.

    NeMo's own balancer scales the KL to the size of the cross-entropy in every micro-batch. As there, the intermediate
    loss is scaled to the size of the KL.
    """

    def __init__(self, weights: LossWeights) -> None:
        """Start with empty sums."""
        super().__init__()
        self._weights = weights
        self._sums, self._count = torch.zeros(len(LOSS_TERMS)), 0

    def forward(self, loss_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the micro-batch's loss under the names that NeMo expects."""
        cross_entropy = loss_dict.pop(STUDENT_LOSS_KEY)
        kl = loss_dict.pop(next(name for name in loss_dict if name.startswith("LogitsKLLoss")))
        intermediate = sum(loss_dict.values(), torch.zeros_like(kl)) / max(len(loss_dict), 1)
        weights = self._weights
        loss = weights.kl * weights.temperature**2 * kl + weights.cross_entropy * cross_entropy
        if loss_dict:
            loss = loss + intermediate * (kl.detach() / intermediate.detach())
        self._sums = self._sums.to(kl.device) + torch.stack([kl, cross_entropy, intermediate]).detach()
        self._count += 1
        return {"kd_loss": loss, "logits_loss": kl, "intermediate_loss": intermediate}

    def reduce_means(self) -> dict[str, float]:
        """Return the mean of the terms since the last call, over all copies of the model."""
        means = (self._sums / max(self._count, 1)).to(
            get_device()
        )  # pipeline stages without a loss have zeros on another device
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(means, group=group)
        means /= torch.distributed.get_world_size(group)
        _share_last_stage(means)
        self._sums, self._count = torch.zeros_like(self._sums), 0
        return dict(zip(LOSS_TERMS, means.tolist(), strict=True))


def _share_last_stage(value: Tensor) -> None:
    """Give every pipeline stage the value of the last one, in place; the other stages have zeros."""
    torch.distributed.all_reduce(value, group=parallel_state.get_pipeline_model_parallel_group())


class Course(pl.Callback):
    """Validates before step 1, at every interval and at the end; keeps the best state; saves checkpoints.

    NeMo's ModelCheckpoint would write the optimizer with every best state, and nothing at all if the validation and
    checkpoint intervals both equal the number of steps.
    """

    def __init__(
        self, config: Any, work: Path, initial: Path, sequences: int, balancer: Balancer, start: Start
    ) -> None:
        """Continue from `start`; validate on `sequences` sequences; `initial` is the untrained model."""
        self._config, self._work, self._balancer = config, work, balancer
        self._initial, self._vocabulary = initial, read_config(initial).vocab_size
        self._sequences, self._start = sequences, start
        self._best_step, self._best = start.best_step, start.best_loss
        self._sum, self._validated = 0.0, 0
        self._publishing: Future[None] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Set which activations are recomputed, before the model is built."""
        if self._config.gradient_checkpointing:
            settings = pl_module.config
            settings.recompute_granularity, settings.recompute_method = "full", "uniform"
            settings.recompute_num_layers = 1

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Give the distillation our weights and temperature, which NeMo's settings lack."""
        if not isinstance(self._config, DistillConfig):
            return
        model = unwrap_model(pl_module.module)
        model._loss_balancer = self._balancer
        model._tensor_split_idx = pl_module.config.hidden_size  # with a pipeline NeMo sets it in step 1: too late
        for loss in model._layers_to_loss.values():
            if hasattr(loss, "_temperature"):
                loss._temperature = self._config.temperature
        cross_entropy = model.compute_language_model_loss
        # Megatron's turns fp32 logits into probabilities in place; the KL, computed later, would use these
        model.compute_language_model_loss = lambda labels, logits: cross_entropy(
            labels, logits.clone() if logits.dtype == torch.float32 else logits
        )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Validate the untrained model."""
        trainer.fit_loop.epoch_loop._should_check_val_fx = lambda _: False  # else it validates again at the end
        self._status = TrainerStatus(self._start.step, self._config.max_steps)
        if not self._start.step:
            self._validate_model(trainer, 0)
        self._started = time.perf_counter() - self._start.seconds

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Report the step; validate and save at their intervals."""
        step, config = trainer.global_step, self._config
        self._write_row(trainer, self._make_row(trainer, step))
        if step % config.validation_interval == 0 or step == config.max_steps:
            started = time.perf_counter()
            self._validate_model(trainer, step)
            self._started += time.perf_counter() - started
        if step % config.checkpoint_interval == 0 and step < config.max_steps:
            self._save_checkpoint(trainer, step)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Tensor, *_: Any) -> None:
        """Add up the losses, each weighted by its number of sequences: the last batch may be padded."""
        loss = outputs.detach().float().reshape(()).clone()
        _share_last_stage(loss)
        size = min(self._config.global_batch_size, self._sequences - self._validated)
        self._sum += loss.item() * size
        self._validated += size

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Complete the last checkpoint; write the seconds of training, and the memory of the largest worker."""
        end = {"best": self._best_step, "seconds": self._read_seconds()}
        self._finish_saving(trainer)
        peaks = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, _read_peak_gpu_mb()])
        peaks = peaks.to(get_device())
        torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
        rss, gpu = (round(peak, 1) for peak in peaks.tolist())
        self._status.close()
        if trainer.is_global_zero:
            write_end(self._work, end | {"peak_rss_mb": rss, "peak_gpu_mb": gpu or None})

    def _read_seconds(self) -> float:
        """Return the seconds of training so far, without validations."""
        return time.perf_counter() - self._started

    def _make_row(self, trainer: Any, step: int) -> dict[str, Any]:
        metrics = trainer.callback_metrics
        row: dict[str, Any] = {"step": step, "loss": metrics["reduced_train_loss"].item()}
        if isinstance(self._config, DistillConfig):
            terms = self._balancer.reduce_means()
            row |= {name: value for name, value in terms.items() if value or name == "kl"}
        else:
            row["cross_entropy"] = row["loss"]
        row["learning_rate"] = float(metrics["lr"])  # this step's: the schedule has already advanced
        return row | ({"grad_norm": metrics["grad_norm"].item()} if "grad_norm" in metrics else {})

    def _write_row(self, trainer: Any, row: dict[str, Any]) -> None:
        """Append a row to the history. If it shows that the training diverged, end the worker here."""
        numbers = {name: value for name, value in row.items() if name != "step"}
        if not row["step"]:
            check_untrained(self._initial, row["validation_loss"])
        self._check_row(trainer, row["step"], numbers)
        if trainer.is_global_zero:
            self._status.report(row["step"], numbers)
            append_row(self._work, row)

    def _check_row(self, trainer: Any, step: int, numbers: dict[str, Any]) -> None:
        """End this worker if the training diverged, once the best state is on the disk; all processes call this.

        Not every pipeline stage has the loss. The stages without it wait to be ended, so that the message comes from a
        stage that has it.
        """
        error = None
        try:
            check_step(step, numbers, self._vocabulary, self._best)
        except Diverged as found:
            error = found
        diverged = torch.tensor(float(error is not None), device=get_device())
        torch.distributed.all_reduce(diverged, op=torch.distributed.ReduceOp.MAX)
        if diverged.item():
            self._finish_saving(trainer)
            torch.distributed.barrier()
            if error:
                raise error
            torch.distributed.barrier()

    def _validate_model(self, trainer: Any, step: int) -> None:
        """Run Lightning's validation loop, as Lightning does between steps; keep the state if it is the best."""
        self._sum, self._validated = 0.0, 0
        first = trainer._logger_connector._first_loop_iter
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        trainer._logger_connector._first_loop_iter = first
        loss = self._sum / self._sequences
        row, perplexity = {"step": step, "validation_loss": loss}, compute_perplexity(loss)
        self._write_row(trainer, row if perplexity is None else row | {"validation_perplexity": perplexity})
        if loss < self._best:
            self._best_step, self._best = step, loss
            self._save_best(trainer, step)

    def _save_checkpoint(self, trainer: Any, step: int) -> None:
        """Start writing a checkpoint to resume from, with the history so far."""
        path, history = self._work / f"{CHECKPOINT}-{step}", self._work / HISTORY
        rows = history.read_text() if trainer.is_global_zero else ""
        note = {"best": self._best_step, "seconds": self._read_seconds()}

        def publish() -> None:
            (path / HISTORY).write_text(rows)
            publish_checkpoint(path, note)

        self._save(trainer, path, publish, weights_only=False)

    def _save_best(self, trainer: Any, step: int) -> None:
        """Start writing the best state, a NeMo checkpoint that can be exported; the untrained state is not copied."""
        path, note = self._work / f"{BEST}-{step}", {"loss": self._best}

        def publish() -> None:
            if step:
                shutil.copytree(self._work / "student" / "context", path / "context")
            publish_checkpoint(path, note)

        if step:
            self._save(trainer, path, publish, weights_only=True)
        elif trainer.is_global_zero:
            path.mkdir()
            publish()

    def _save(self, trainer: Any, path: Path, publish: Callable[[], None], weights_only: bool) -> None:
        """Start writing the model to a directory, and publish it when all processes have written their part.

        Forked processes write it from a copy in the host's memory, while the training continues. They report to one
        queue per process (megatron/core/dist_checkpointing/strategies/filesystem_async.py). Two checkpoints at a time
        could get each other's reports, so the earlier one is completed first. A thread of the first process computes
        the files' checksums, which would otherwise keep the GPUs waiting.
        """
        self._finish_saving(trainer)

        def start_publishing() -> None:
            if trainer.is_global_zero:
                pool = ThreadPoolExecutor(1)
                self._publishing = pool.submit(publish)
                pool.shutdown(wait=False)

        trainer.save_checkpoint(path, weights_only=weights_only, storage_options={"finalize_fn": start_publishing})

    def _finish_saving(self, trainer: Any) -> None:
        """Wait until the checkpoint that is being written is complete, and free its copy; all processes call this."""
        trainer.strategy.checkpoint_io.maybe_finalize_save_checkpoint(blocking=True)
        if self._publishing:
            self._publishing.result()
        return_freed_memory()  # the next copy would add to it


def _read_peak_gpu_mb() -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
