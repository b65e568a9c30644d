"""The transformers engine: one training path for fine-tuning and distillation, from a laptop to one GPU.

`train` runs `transformers.Trainer`. The two stages differ only in the loss (minitron/models/losses.py). A killed
training resumes from its last complete checkpoint.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from minitron.config.stages import DistillConfig, TrainingConfig
from minitron.data.packed import open_training_data
from minitron.engines.checkpoints import BEST, CHECKPOINT, Checkpoint, find_resume_point, publish_checkpoint
from minitron.engines.divergence import Diverged, check_step, check_untrained, name_last_good
from minitron.engines.hf.device import (
    autocast_on_gpu,
    compile_layers,
    get_compute_dtype,
    get_device,
    say_that_one_gpu_works,
)
from minitron.engines.hf.teacher_cache import cache_teacher, load_teacher
from minitron.engines.trainer_status import TrainerStatus
from minitron.models.checkpoint import copy_model, load_model, save_derived_model
from minitron.models.checks import read_config
from minitron.models.losses import LossWeights, TeacherTargets, linear_loss
from minitron.models.scoring import compute_hidden_states, get_output_head, score_models, validate_teacher
from minitron.storage.staging import checkpoints_path, last_good_path, replace_directory
from minitron.tracking.stage_run import Tracker

TERMS = ("kl", "cross_entropy", "teacher_loss", "top1_agreement")
"""The logged loss terms, in the order of LossTerms; without a teacher only the cross-entropy."""

LOGGED = ("loss", *TERMS, "learning_rate", "grad_norm", "validation_loss", "validation_perplexity")
"""The keys of the Trainer's logs that go into the history; the others are bookkeeping."""


def train(
    config: TrainingConfig,
    initial: Path,
    weights: LossWeights,
    directory: Path,
    tracker: Tracker,
    teacher: Path | None = None,
) -> dict[str, Any]:
    """Train the model in `initial`; write its best state by validation loss: see `engines.Engine.train`."""
    set_seed(config.seed)
    say_that_one_gpu_works()
    teacher_model: Any = None
    train_set: Any = open_training_data(config)[0]
    metrics: dict[str, float] = {}
    if isinstance(config, DistillConfig) and config.teacher_cache:
        train_set, metrics = cache_teacher(config, train_set)
    elif teacher is not None:
        teacher_model = load_teacher(teacher)
        metrics = validate_teacher(config, teacher_model)
    if teacher is not None:
        check_untrained(teacher, metrics["teacher_validation_loss"])
    checkpoints = checkpoints_path(directory)
    last = find_resume_point(checkpoints)
    best = BestModel(checkpoints, initial, last.best if last else None)
    trainer = _LinearLossTrainer(
        config, load_model(initial, torch.float32), weights, teacher_model, train_set, checkpoints, last is None
    )
    report = _Report(config, tracker, best, trainer.read_seconds)
    trainer.add_callback(report)
    trainer.start_clock(last.checkpoint.note["seconds"] if last else 0.0)
    try:
        trainer.train(resume_from_checkpoint=str(last.checkpoint.path) if last else None)
    except Diverged as error:
        report.on_train_end()
        raise name_last_good(error, config, best.keep_for_later(directory), best.step, best.loss) from error
    tokens = config.max_steps * config.global_batch_size * config.sequence_length
    history = _extract_history(trainer.state.log_history)
    metrics |= {
        "tokens": tokens,
        "tokens_per_second": round(tokens / trainer.read_seconds(), 1),
        "validation_loss_before": next(row["validation_loss"] for row in history if "validation_loss" in row),
        "validation_loss": best.loss,
        "best_step": best.step,
    }
    best.write(trainer.model, config.max_steps, directory)
    return {"metrics": metrics, "history": history}


class BestModel:
    """The state with the lowest validation loss: `initial` until a training step beats it. It survives a kill."""

    def __init__(self, checkpoints: Path, initial: Path, best: Checkpoint | None) -> None:
        """Start from the best state that an earlier attempt left among the checkpoints."""
        self._checkpoints, self.initial = checkpoints, initial
        self.step: int = best.step if best else 0
        self.loss: float = best.note["loss"] if best else float("inf")

    def keep_if_better(self, model: PreTrainedModel, step: int, loss: float) -> None:
        """Keep the model if its loss is the lowest so far."""
        if loss >= self.loss:
            return
        self.step, self.loss = step, loss
        self._path.mkdir(parents=True)
        if step:
            model.save_pretrained(self._path)
        publish_checkpoint(self._path, {"loss": loss})

    def write(self, model: Any, step: int, directory: Path) -> None:
        """Write the best model in the dtypes of the initial one; `model` is the state at `step`."""
        if not self.step:
            copy_model(self.initial, directory)
            return
        model = model.cpu().eval() if step == self.step else load_model(self._path, torch.float32)
        save_derived_model(model, directory, self.initial)

    def keep_for_later(self, directory: Path) -> Path:
        """Keep the best state of the failed work in `directory` as a model, and return its directory."""
        if not self.step:
            return self.initial
        with replace_directory(last_good_path(directory)) as target:
            save_derived_model(load_model(self._path, torch.float32), target, self.initial)
        return last_good_path(directory)

    @property
    def _path(self) -> Path:
        return self._checkpoints / f"{BEST}-{self.step}"


class _LinearLossTrainer(Trainer):
    """A Trainer whose loss is `linear_loss` and whose evaluation is `score`."""

    def __init__(
        self,
        config: TrainingConfig,
        model: PreTrainedModel,
        weights: LossWeights,
        teacher: PreTrainedModel | None,
        train_set: Dataset,
        checkpoints: Path,
        validate_first: bool,
    ) -> None:
        model.config.use_cache = False
        model.generation_config = GenerationConfig()  # transformers 4.57 cannot save every one that it loads
        # nothing is padded here; a padding index would freeze the embedding of a token that also ends documents
        model.get_input_embeddings().padding_idx = None  # type: ignore[assignment]
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        compile_layers(model)
        _, validation_set = open_training_data(config)
        arguments = _make_arguments(config, checkpoints, validate_first)
        super().__init__(model, arguments, train_dataset=train_set, eval_dataset=validation_set)
        self._validation_set = validation_set
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of the whole step
        self._config, self._teacher, self._weights = config, teacher, weights
        self._has_teacher = isinstance(config, DistillConfig)
        self._sums, self._tokens = torch.zeros(len(TERMS), device=self.args.device), 0
        self._started = time.perf_counter()

    def start_clock(self, seconds: float) -> None:
        """Start the clock at the seconds that killed attempts took up to the checkpoint."""
        self._started = time.perf_counter() - seconds

    def read_seconds(self) -> float:
        """Return the seconds of training so far, without validations."""
        return time.perf_counter() - self._started

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        """Read the sequences in the order of TrainingSequences."""
        dataset: Any = self.train_dataset
        return SequentialSampler(dataset)

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> tuple[list, Any]:
        """Return the step's batches and the number of their labels, which are already shifted; none is masked."""
        batches, _ = super().get_batch_samples(*arguments, **keywords)
        return batches, sum(batch["labels"].numel() for batch in batches)

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], *_: Any, num_items_in_batch: Any = None, **__: Any
    ) -> Any:
        """Return the micro-batch's share of the step's loss; its terms are summed without waiting for the GPU."""
        student, labels = self.accelerator.unwrap_model(model), inputs["labels"].flatten()
        with autocast_on_gpu():
            hidden = compute_hidden_states(student, inputs["input_ids"]).to(get_compute_dtype())
        teacher_hidden = teacher_head = targets = None
        if self._teacher is not None:
            with torch.no_grad():
                teacher_hidden, teacher_head = (
                    compute_hidden_states(self._teacher, inputs["input_ids"]),
                    get_output_head(self._teacher),
                )
        elif "ids" in inputs:
            targets = TeacherTargets(*(inputs[name].flatten(0, 1) for name in TeacherTargets._fields))
        teacher = (teacher_hidden, teacher_head, targets)
        terms = linear_loss(hidden, get_output_head(student), labels, self._weights, *teacher)
        self._sums += torch.stack(list(terms[1:-1])).detach()
        self._tokens += labels.numel()
        return terms.loss / num_items_in_batch

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        """Log the numbers and the means of the loss terms since the last log."""
        if "loss" in logs and self._tokens:
            means = dict(zip(TERMS, (self._sums / self._tokens).tolist(), strict=True))
            logs |= means if self._has_teacher else {"cross_entropy": means["cross_entropy"]}
            self._sums.zero_()
            self._tokens = 0
        super().log(logs, *arguments, **keywords)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the model on the validation split."""
        started = time.perf_counter()
        models: dict[str, Any] = {"model": self.model}
        sequences, micro_batch_size = self._config.validation_sequences, self._config.micro_batch_size
        with autocast_on_gpu():
            scores = score_models(models, self._validation_set, sequences, micro_batch_size)
        metrics = {f"validation_{name}": value for name, value in scores["model"].items() if value is not None}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._started += time.perf_counter() - started
        return metrics


class _Report(TrainerCallback):
    """Progress bar in tokens (so that it shows tokens/s and ETA), metrics to the tracker, states to resume from.

    In a TrainJob the progress goes to Kubeflow Trainer, too.
    """

    def __init__(
        self, config: TrainingConfig, tracker: Tracker, best: BestModel, read_seconds: Callable[[], float]
    ) -> None:
        self._step_tokens = config.global_batch_size * config.sequence_length
        self._tracker, self._best, self._read_seconds = tracker, best, read_seconds
        self._vocabulary = read_config(best.initial).vocab_size

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)  # a checkpoint restores the intervals of the run that wrote it
        total, done = state.max_steps * self._step_tokens, state.global_step * self._step_tokens
        self._bar = tqdm(total=total, initial=done, desc="training", unit="tok", unit_scale=True)
        self._status = TrainerStatus(state.global_step, state.max_steps)
        for row in _extract_history(state.log_history):  # the last rows may not have arrived before the kill
            self._tracker.log({name: value for name, value in row.items() if name != "step"}, row["step"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.update(self._step_tokens)
        control.should_evaluate |= state.global_step == state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        numbers = {name: value for name, value in logs.items() if name in LOGGED}
        if not state.global_step and "validation_loss" in numbers:
            check_untrained(self._best.initial, numbers["validation_loss"])
        check_step(state.global_step, numbers, self._vocabulary, self._best.loss)
        self._tracker.log(numbers, state.global_step)
        self._status.report(state.global_step, numbers)
        if "loss" in logs:
            self._bar.set_postfix(
                {"step": f"{state.global_step}/{state.max_steps}", "loss": f"{logs['loss']:.3f}"}, refresh=False
            )

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, model: Any = None, **_: Any
    ) -> None:
        self._best.keep_if_better(model, state.global_step, metrics["validation_loss"])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Complete the checkpoint that the Trainer has just written."""
        note = {"best": self._best.step, "seconds": self._read_seconds()}
        publish_checkpoint(Path(args.output_dir) / f"{CHECKPOINT}-{state.global_step}", note)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._bar.close()
        self._status.close()


class _OneGpuArguments(TrainingArguments):
    """Trainer's arguments for one GPU, however many are visible.

    Trainer would multiply the batch by the number of GPUs, and split it with DataParallel, around `compute_loss`.
    """

    @property
    def n_gpu(self) -> int:
        """The number of GPUs that Trainer uses in this process."""
        return min(super().n_gpu, 1)


def _make_arguments(config: TrainingConfig, checkpoints: Path, validate_first: bool) -> TrainingArguments:
    return _OneGpuArguments(
        output_dir=str(checkpoints),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.global_batch_size // config.micro_batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_warmup_with_min_lr",  # its first step is not at learning rate 0
        lr_scheduler_kwargs={"min_lr": config.min_learning_rate},
        warmup_steps=config.warmup_steps,
        optim="adamw_torch_fused",
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.gradient_clipping,
        eval_strategy="steps",
        eval_steps=config.validation_interval,
        eval_on_start=validate_first,
        save_strategy="steps",
        save_steps=config.checkpoint_interval,
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=get_device().type == "cpu",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",  # _Report does it
    )


def _extract_history(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per logged step, and one per validation."""
    rows = [{"step": entry["step"]} | {name: entry[name] for name in LOGGED if name in entry} for entry in log]
    return [row for row in rows if len(row) > 1]
