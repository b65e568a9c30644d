"""The training loop of engine hf, in one process or in several: steps, validations, the best state, checkpoints.

A step reads the same sequences whatever the number of processes; each process computes its micro-batches. G = global
batch, B = micro-batch, S = sequence.
"""

import resource
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import get_scheduler, set_seed

from minitron.config.stages import DistillConfig, TrainingConfig
from minitron.data.packed import open_training_data
from minitron.engines.checkpoints import CHECKPOINT
from minitron.engines.divergence import check_step, check_untrained
from minitron.engines.hf.device import autocast_on_gpu, compile_layers, get_compute_dtype, get_device
from minitron.engines.hf.sharding import open_model, release_head, score_model
from minitron.engines.hf.states import LayerOutputs
from minitron.engines.hf.teacher_cache import CachedTeacher
from minitron.engines.hf.writer import StateWriter
from minitron.engines.progress import Start, append_row, write_end
from minitron.engines.trainer_status import TrainerStatus
from minitron.models.losses import (
    IGNORED,
    LossWeights,
    TeacherTargets,
    compute_loss_weights,
    linear_loss,
    sum_cosine_distances,
)
from minitron.models.memory import keep_freed_memory
from minitron.models.processes import count_processes, get_rank
from minitron.models.pruning.surgery import list_changed_matrices
from minitron.models.scoring import compute_hidden_states, get_output_head

warnings.filterwarnings("ignore", "torch.distributed is .* in a single process")  # it is: checkpoints of one process

TERMS = ("kl", "cross_entropy", "teacher_loss", "top1_agreement", "intermediate")
"""The loss terms. Without a teacher only the cross-entropy is logged, and the last one only with pairs of layers."""


class Teacher(NamedTuple):
    """The teacher of a distillation: its directory, and the directory of its cache if that replaces it."""

    path: Path
    cache: Path | None = None


Report = Callable[[dict[str, Any]], None]
"""Called with every new row of the history."""


def train(
    config: TrainingConfig,
    initial: Path,
    teacher: Teacher | None,
    work: Path,
    start: Start,
    report: Report = lambda row: None,
    may_save: Callable[[], bool] = lambda: True,
) -> None:
    """Train the model in `initial` from `start` to the end, and write its states to `work`; all processes call this.

    Raises:
        RunError: the training diverged, or a model's loss is not finite before it.
        SystemExit: SIGTERM came; the state after the last step is saved.
    """
    set_seed(config.seed)
    if get_device().type == "cpu":
        keep_freed_memory()
    training = _Training(config, initial, teacher, work, start, report)
    with _deferring_sigterm(may_save) as arrived:
        with training.writer:
            training.run(arrived)
        training.end()
    if arrived and count_processes() == 1:  # too late to save anything; writing the model is left to the next attempt
        raise SystemExit(128 + signal.SIGTERM)


class _Terminated(Exception):
    """SIGTERM came to a process of the training."""


@contextmanager
def _deferring_sigterm(may_save: Callable[[], bool]) -> Iterator[list[int]]:
    """Yield a list that gets a signal's number when SIGTERM comes, so that the state is saved before the end."""
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return

    def defer(number: int, frame: Any) -> None:
        if not may_save():
            raise SystemExit(128 + number)
        arrived.append(number)

    handler = signal.signal(signal.SIGTERM, defer)
    try:
        yield arrived
    finally:
        signal.signal(signal.SIGTERM, handler)


class _Training:
    """The state of a training in this process."""

    def __init__(
        self,
        config: TrainingConfig,
        initial: Path,
        teacher: Teacher | None,
        work: Path,
        start: Start,
        report: Report,
    ) -> None:
        self._config, self._initial = config, initial
        self._work, self._start, self._report = work, start, report
        self._step = self._saved = start.step
        self._is_validated, self._arrived = start.is_validated, list[int]()
        self._best_step, self._best_loss = start.best_step, start.best_loss
        self._rank, self._processes, self._device = get_rank(), count_processes(), get_device()
        train_set, self._validation_set = open_training_data(config)
        self._train_set: Any = train_set
        self._pairs = config.intermediate_layers if isinstance(config, DistillConfig) else []
        self._terms = ("cross_entropy",) if not teacher else TERMS if self._pairs else TERMS[:-1]
        self._teacher, self._metrics = None, dict[str, float]()
        if teacher and teacher.cache:
            assert isinstance(config, DistillConfig)
            self._train_set = CachedTeacher(train_set, teacher.cache, config.teacher_cache_size)
        elif teacher:
            self._open_teacher(teacher.path)
        self._student = _open_student(config, initial)
        self._vocabulary = self._student.config.vocab_size
        self._parameters = dict(self._student.named_parameters())
        self._outputs = LayerOutputs(self._student, [student for student, _ in self._pairs])
        self._teacher_outputs = LayerOutputs(self._teacher, [layer for _, layer in self._pairs])
        self._optimizer = _make_optimizer(config, self._parameters, initial)
        schedule = get_scheduler(  # linear warm-up, whose first step is not at learning rate 0, then cosine
            "cosine_warmup_with_min_lr",
            self._optimizer,
            config.warmup_steps,
            config.max_steps,
            {"min_lr": config.min_learning_rate},
        )
        self._get_rate_factor: Any = schedule.lr_lambdas[0]  # type: ignore[attr-defined]
        moments = _start_moments(self._optimizer, self._parameters)
        if start.step:
            _load_checkpoint(work / f"{CHECKPOINT}-{start.step}", self._parameters | moments)
        self.writer = StateWriter(initial, work, self._parameters, moments)
        self._status = TrainerStatus(start.step, config.max_steps)
        self._started = time.perf_counter() - start.seconds

    def _open_teacher(self, path: Path) -> None:
        self._teacher = open_model(path, get_compute_dtype()).requires_grad_(False)
        compile_layers(self._teacher)
        loss = self._score(self._teacher, "teacher validation")["loss"]
        check_untrained(path, loss)
        self._metrics = {"teacher_validation_loss": loss}

    def run(self, arrived: list[int]) -> None:
        """Take all steps. If `arrived` gets a signal, in any process, save the state after the last step and exit.

        A validation is broken off, and so is a step between its micro-batches: both are done again after the resume.
        """
        self._arrived = arrived
        try:
            self._take_steps()
        except _Terminated:
            if self._step > self._saved:
                self._save(is_best=False, is_due=True)
            raise SystemExit(128 + signal.SIGTERM) from None

    def _take_steps(self) -> None:
        config = self._config
        if not self._step or not self._is_validated:
            self._save(self._validate(), is_due=False)
        for step in range(self._step + 1, config.max_steps + 1):
            self._log(self._take_step(step))
            self._step, is_last = step, step == config.max_steps
            is_best = (step % config.validation_interval == 0 or is_last) and self._validate()
            self._save(is_best, is_due=step % config.checkpoint_interval == 0 and not is_last)

    def _stop_if_asked(self) -> None:
        """Break off if SIGTERM came to any process; all call this at the same point of their work."""
        if self._reduce(torch.tensor(len(self._arrived)), dist.ReduceOp.MAX):
            raise _Terminated

    def end(self) -> None:
        """Write the end: seconds of training, best step, the teacher's loss, and the memory of the largest process."""
        on_gpu = self._device.type == "cuda"
        peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]
        peaks.append(torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0.0)
        rss, gpu = self._reduce(torch.tensor(peaks, device=self._device), dist.ReduceOp.MAX).tolist()
        note = {"best": self._best_step, "seconds": self._read_seconds(), "metrics": self._metrics}
        self._status.close()
        if self._rank == 0:
            write_end(self._work, note | {"peak_rss_mb": round(rss, 1), "peak_gpu_mb": round(gpu, 1) or None})

    def _take_step(self, step: int) -> dict[str, Any]:
        """Return the step's row of the history."""
        config = self._config
        torch.manual_seed(config.seed + step * self._processes + self._rank)  # so that a dropout needs no saved state
        rate = config.learning_rate * self._get_rate_factor(step - 1)
        sums = torch.zeros(1 + len(TERMS), device=self._device)  # loss, terms
        weights, batches = compute_loss_weights(config, step), list(self._read_batches(step))
        counts = [(batch["labels"] != IGNORED).sum() for batch in batches]
        tokens = self._reduce(torch.stack(counts).sum().to(self._device)).clamp(min=1)  # no token of a step may count
        for batch in batches:
            self._stop_if_asked()
            loss, terms = self._compute_loss({name: value.to(self._device) for name, value in batch.items()}, weights)
            loss = loss / tokens
            loss.backward()
            sums += torch.stack([loss, *terms]).detach()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), config.gradient_clipping)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self._optimizer.step()
        self._optimizer.zero_grad()
        whole_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._reduce(sums)[1:] /= tokens
        mean_loss, *values = sums.tolist()
        means = dict(zip(TERMS, values, strict=True))
        shown = {name: means[name] for name in self._terms}
        return {"step": step, "loss": mean_loss, **shown, "learning_rate": rate, "grad_norm": whole_norm.item()}

    def _read_batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        """Yield this process's share of a step: batches of what the data has of a sequence, each [B, S, …]."""
        size, end = self._config.micro_batch_size, step * self._config.global_batch_size
        for first in range(end - self._config.global_batch_size + self._rank * size, end, self._processes * size):
            items = [self._train_set[index] for index in range(first, first + size)]
            yield {name: torch.stack([item[name] for item in items]) for name in items[0]}

    def _compute_loss(self, batch: dict[str, Tensor], weights: LossWeights) -> tuple[Tensor, list[Tensor]]:
        """Return the loss and its TERMS, summed over a micro-batch."""
        with autocast_on_gpu(), self._outputs.reading() as states:
            hidden = compute_hidden_states(self._student, batch["input_ids"]).to(get_compute_dtype())
        teacher: Any = ()
        teacher_states: dict[int, Tensor] = {}
        if self._teacher is not None:
            with torch.no_grad(), self._teacher_outputs.reading() as teacher_states:
                teacher = compute_hidden_states(self._teacher, batch["input_ids"]), get_output_head(self._teacher)
        elif "ids" in batch:
            targets = TeacherTargets(*(batch[name].flatten(0, 1) for name in TeacherTargets._fields))
            teacher = None, None, targets
        labels = batch["labels"].flatten()
        terms = linear_loss(hidden, get_output_head(self._student), labels, weights, *teacher)
        release_head(self._teacher)
        distance = torch.zeros_like(terms.kl)
        if self._pairs:
            pairs = [(states[student], teacher_states[layer]) for student, layer in self._pairs]
            distance = sum_cosine_distances(pairs, labels)
        return terms.loss + weights.intermediate * distance, [*terms[1:-1], distance]

    def _validate(self) -> bool:
        """Log the validation loss of the last step; return whether its state is the best so far."""
        started, self._is_validated = time.perf_counter(), False
        try:
            scores = self._score(self._student, "validation")
        finally:
            self._started += time.perf_counter() - started
        row = {f"validation_{name}": value for name, value in scores.items() if value is not None}
        self._log({"step": self._step} | row)
        self._is_validated, is_best = True, scores["loss"] < self._best_loss
        if is_best:
            self._best_step, self._best_loss = self._step, scores["loss"]
        return is_best

    def _score(self, model: Any, description: str) -> dict[str, Any]:
        sequences, size = self._config.validation_sequences, self._config.micro_batch_size
        return score_model(model, self._validation_set, sequences, size, description, self._stop_if_asked)

    def _log(self, row: dict[str, Any]) -> None:
        """Add a row to the history, unless it shows that the training diverged."""
        step, numbers = row["step"], {name: value for name, value in row.items() if name != "step"}
        if not step:
            check_untrained(self._initial, row["validation_loss"])
        check_step(step, numbers, self._vocabulary, self._best_loss)
        if self._rank == 0:
            append_row(self._work, row)
            self._status.report(step, numbers)
            self._report(row)

    def _save(self, is_best: bool, is_due: bool) -> None:
        """Let the state after the last step be written, if it is the best one, or if a checkpoint is due."""
        best, checkpoint = {"loss": self._best_loss} if is_best else None, None
        if is_due:
            self._saved = self._step
            checkpoint = {"best": self._best_step, "seconds": self._read_seconds(), "is_validated": self._is_validated}
        self.writer.save(self._step, best, checkpoint)

    def _read_seconds(self) -> float:
        """Return the seconds of training so far, without validations."""
        return time.perf_counter() - self._started

    def _reduce(self, values: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
        """Add up a tensor over the processes, in place."""
        if self._processes > 1:
            dist.all_reduce(values, operation)
        return values


def _open_student(config: TrainingConfig, initial: Path) -> Any:
    model = open_model(initial, torch.float32)
    model.config.use_cache = False
    # nothing is padded here; a padding index would freeze the embedding of a token that also ends documents
    model.get_input_embeddings().padding_idx = None
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compile_layers(model)
    return model.train()


def _make_optimizer(config: TrainingConfig, parameters: dict[str, Any], initial: Path) -> torch.optim.AdamW:
    """Return AdamW, whose weight decay leaves out norms and biases; `factor` is that of a group's learning rate."""
    factor = config.cut_learning_rate_factor if isinstance(config, DistillConfig) else 1.0
    changed = list_changed_matrices(initial, parameters) if factor != 1 else set()
    matrices = {name: parameter for name, parameter in parameters.items() if parameter.ndim > 1}
    vectors = [parameter for parameter in parameters.values() if parameter.ndim == 1]
    groups: Any = [{"params": vectors, "weight_decay": 0.0, "factor": 1.0}]
    for its_factor, names in ((factor, changed), (1.0, matrices.keys() - changed)):
        params = [matrix for name, matrix in matrices.items() if name in names]
        groups.append({"params": params, "weight_decay": config.weight_decay, "factor": its_factor})
    groups = [group for group in groups if group["params"]]
    betas = config.adam_beta1, config.adam_beta2
    return torch.optim.AdamW(groups, config.learning_rate, betas, fused=True)


def _start_moments(optimizer: torch.optim.AdamW, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the optimizer the state with which it would begin; return the tensors by the names of their parameters."""
    moments: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        zeros = {key: torch.zeros_like(parameter).detach() for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device)} | zeros
        moments |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return moments


def _load_checkpoint(path: Path, state: dict[str, Tensor]) -> None:
    """Read a checkpoint into the tensors of a training, whatever the number of processes that wrote it."""
    dcp.load(
        {name: tensor.detach() for name, tensor in state.items()}, checkpoint_id=path, no_dist=count_processes() == 1
    )
