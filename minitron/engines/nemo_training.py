"""Training inside NeMo: the data both engines share, Megatron's parallelism, and the course of a run.

Runs in the workers (nemo_worker.py). B = batch, S = sequence.
"""

import importlib.util
import json
import math
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from modelopt.torch.distill import DistillationLossBalancer
from modelopt.torch.distill.loss_balancers import STUDENT_LOSS_KEY
from nemo import lightning as nl
from nemo.collections import llm
from nemo.lightning.io import load_context
from nemo.lightning.pytorch.optim import LRSchedulerModule
from nemo.utils.model_utils import unwrap_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import get_scheduler

from minitron.config.stages import DistillConfig, SequenceConfig, TrainingConfig
from minitron.data.packed import training_data
from minitron.engines.hf import compute_dtype, device
from minitron.engines.nemo import BEST, FINISHED, HISTORY, gpus, last_checkpoint, step_of
from minitron.models.losses import LossWeights

_HAS_TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None
LOSS_TERMS = ("kl", "cross_entropy", "intermediate")


def train(config: Any, weights: LossWeights, work: Path) -> None:
    """Fine-tune or distil the model in `<work>/student`, from the last checkpoint if there is one."""
    train_set, validation_set = training_data(config)
    sequences, batch = min(config.validation_sequences, len(validation_set)), config.global_batch_size
    validations = math.ceil(sequences / batch)
    data = data_module(config, Batches(train_set), Batches(validation_set, sequences, validations * batch), batch)
    trainer = _trainer(config, validations)
    balancer = Balancer(weights)
    last = last_checkpoint(work)
    trainer.callbacks.append(Course(config, work, sequences, balancer, 0 if last is None else step_of(last)))
    if last:
        trainer.ckpt_path = last / "weights"
    common: dict[str, Any] = {
        "data": data,
        "trainer": trainer,
        "optim": _optimizer(config),
        "log": nl.NeMoLogger(explicit_log_dir=str(work / "logs"), use_datetime_version=False),
        "resume": nl.AutoResume(restore_config=nl.RestoreConfig(path=str(work / "student"))),
        "tokenizer": "model",
    }
    if isinstance(config, DistillConfig):
        settings = work / "distillation.yaml"
        settings.write_text(yaml.safe_dump(_distillation_settings(config)))
        llm.distill(work / "student", work / "teacher", distillation_config_path=settings, **common)
    else:
        llm.finetune(load_context(work / "student" / "context", subpath="model"), **common)


class Batches(Dataset):
    """A dataset of ours in the form of Megatron's; items beyond `count`, which fill the last batch, have no loss."""

    def __init__(self, dataset: Any, count: int | None = None, length: int | None = None) -> None:
        """Take the first `count` items, and repeat the first one up to `length`."""
        self._dataset = dataset
        self._count = len(dataset) if count is None else count
        self._length = self._count if length is None else length
        self._sequence_length = len(dataset[0]["input_ids"])

    def __len__(self) -> int:
        """Return the number of items, those without loss included."""
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return tokens [S], labels [S], loss_mask [S], position_ids [S] and, for Megatron's own layers, a mask."""
        real = index < self._count
        item = self._dataset[index if real else 0]
        length = self._sequence_length
        batch = {
            "tokens": item["input_ids"],
            "labels": item["labels"],
            "loss_mask": torch.full((length,), float(real)),
            "position_ids": torch.arange(length),
        }
        if not _HAS_TRANSFORMER_ENGINE:
            batch["attention_mask"] = torch.ones(1, length, length).triu(1).bool()  # True: not seen
        return batch


class _DataModule(llm.PreTrainingDataModule):
    """NeMo's data module, its sampler and its place in the data, on our datasets instead of Megatron's.

    Megatron's dataset turns every token whose id is the padding's, which in many models is the end of a document, into
    token 0 without loss: the end of a document would never be learnt.
    """

    def build(self, *_: Any, **__: Any) -> None:
        """Megatron's datasets are not built; `data_module` gave ours."""


def data_module(config: SequenceConfig, training: Batches, validation: Batches | None, batch: int) -> _DataModule:
    """Return a data module that gives `batch` sequences per step."""
    prefix = str(config.dataset / "train")
    module = _DataModule(
        paths={"train": [prefix], "validation": [prefix], "test": [prefix]},
        tokenizer=object(),  # NeMo puts the model's in its place
        seq_length=config.sequence_length,
        micro_batch_size=config.micro_batch_size,
        global_batch_size=batch,
        num_workers=0,
        pin_memory=device().type == "cuda",
    )
    module._train_ds, module._validation_ds = training, validation
    return module


def _trainer(config: TrainingConfig, validations: int) -> nl.Trainer:
    on_gpu, dtype = device().type == "cuda", compute_dtype()
    strategy = nl.MegatronStrategy(
        tensor_model_parallel_size=config.tensor_parallel_size,
        pipeline_model_parallel_size=config.pipeline_parallel_size,
        context_parallel_size=config.context_parallel_size,
        sequence_parallel=config.sequence_parallel,
        pipeline_dtype=dtype,
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            check_for_nan_in_grad=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=on_gpu,
            overlap_param_gather=on_gpu,
        ),
        ckpt_async_save=False,
        ckpt_optim_fully_reshardable=True,  # a retried task may get another number of GPUs
    )
    return nl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=gpus(config) // config.num_nodes,
        num_nodes=config.num_nodes,
        strategy=strategy,
        plugins=nl.MegatronMixedPrecision(precision="bf16-mixed" if on_gpu else "32", params_dtype=dtype),
        max_steps=config.max_steps,
        limit_val_batches=validations,
        val_check_interval=config.max_steps + 1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_checkpointing=False,  # Course saves
        enable_progress_bar=False,  # NeMo's gathers timers on rank 0 alone, and the others then wait for ever
        enable_model_summary=False,
        logger=False,
    )


class _Schedule(LRSchedulerModule):
    """The schedule of engine hf: transformers' linear warm-up and cosine."""

    def __init__(self, warmup_steps: int, max_steps: int, floor: float) -> None:
        super().__init__()
        self._warmup_steps, self._max_steps, self._floor = warmup_steps, max_steps, floor

    def scheduler(self, model: Any, optimizer: Any) -> dict[str, Any]:
        """Return what Lightning steps after every optimizer step."""
        schedule = get_scheduler(
            "cosine_warmup_with_min_lr",
            optimizer,
            self._warmup_steps,
            self._max_steps,
            {"min_lr_rate": self._floor},
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _optimizer(config: TrainingConfig) -> nl.MegatronOptimizerModule:
    dtype = compute_dtype()
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        clip_grad=config.gradient_clipping,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    schedule = _Schedule(config.warmup_steps, config.max_steps, config.min_learning_rate / config.learning_rate)
    return nl.MegatronOptimizerModule(settings, schedule)


def _distillation_settings(config: DistillConfig) -> dict[str, Any]:
    pairs = [[f"decoder.layers.{layer - 1}" for layer in pair] for pair in config.intermediate_layers]
    return {"skip_lm_loss": config.cross_entropy_weight == 0, "intermediate_layer_pairs": pairs}


class Balancer(DistillationLossBalancer):
    """Adds up the distillation's loss with our fixed weights, and sums its terms for the history.

    NeMo's own scales the KL to the size of the cross-entropy in every micro-batch. The intermediate loss is scaled to
    the size of the KL, as there.
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

    def means(self) -> dict[str, float]:
        """Return the mean of the terms since the last call, over all copies of the model."""
        means = (self._sums / max(self._count, 1)).to(device())  # where a stage without a loss has its zeros, too
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(means, group=group)
        means /= torch.distributed.get_world_size(group)
        _from_last_stage(means)
        self._sums, self._count = torch.zeros_like(self._sums), 0
        return dict(zip(LOSS_TERMS, means.tolist(), strict=True))


def _from_last_stage(value: Tensor) -> None:
    """Give every pipeline stage what the last one knows; the others have zeros."""
    torch.distributed.all_reduce(value, group=parallel_state.get_pipeline_model_parallel_group())


class Course(pl.Callback):
    """Validates before step 1, at every interval and at the end; keeps the best state; saves what a kill resumes from.

    NeMo's ModelCheckpoint would write the optimizer with every best state, and nothing at all where the validation and
    checkpoint intervals both equal the number of steps.
    """

    def __init__(self, config: Any, work: Path, sequences: int, balancer: Balancer, step: int) -> None:
        """Go on after `step`; `sequences` are validated on."""
        self._config, self._work, self._balancer = config, work, balancer
        self._sequences, self._first_step = sequences, step
        self._best = float("inf")
        self._sum, self._validated = 0.0, 0
        if (work / BEST / "best.json").is_file():
            self._best = json.loads((work / BEST / "best.json").read_text())["loss"]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Say which activations are recomputed, before the model is built."""
        if self._config.gradient_checkpointing:
            settings = pl_module.config
            settings.recompute_granularity, settings.recompute_method = "full", "uniform"
            settings.recompute_num_layers = 1

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Give the distillation our weights and temperature, which NeMo's settings do not have."""
        if not isinstance(self._config, DistillConfig):
            return
        model = unwrap_model(pl_module.module)
        model._loss_balancer = self._balancer
        model._tensor_split_idx = pl_module.config.hidden_size  # pipeline: NeMo learns it in step 1, we validate before
        for loss in model._layers_to_loss.values():
            if hasattr(loss, "_temperature"):
                loss._temperature = self._config.temperature
        cross_entropy = model.compute_language_model_loss
        # Megatron's turns fp32 logits into probabilities in place: the KL, computed after it, would be of those
        model.compute_language_model_loss = lambda labels, logits: cross_entropy(
            labels, logits.clone() if logits.dtype == torch.float32 else logits
        )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Validate the untrained model."""
        trainer.fit_loop.epoch_loop._should_check_val_fx = lambda _: False  # at the last step Lightning would, too
        if not self._first_step:
            self._validate(trainer, 0)
        self._started, self._validating = time.perf_counter(), 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Report the step; validate and save where it is time."""
        step, config = trainer.global_step, self._config
        self._write(trainer, self._row(trainer, step))
        if step % config.validation_interval == 0 or step == config.max_steps:
            started = time.perf_counter()
            self._validate(trainer, step)
            self._validating += time.perf_counter() - started
        if step % config.checkpoint_interval == 0 and step < config.max_steps:
            self._save(trainer, self._work / f"step-{step}", weights_only=False)
            if trainer.is_global_zero:
                _delete_all_but(self._work, step)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Tensor, *_: Any) -> None:
        """Add up the losses, each weighted by its sequences: the last batch may be filled up."""
        loss = outputs.detach().float().reshape(()).clone()
        _from_last_stage(loss)
        size = min(self._config.global_batch_size, self._sequences - self._validated)
        self._sum += loss.item() * size
        self._validated += size

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say how long it took, and what the largest worker needed."""
        peaks = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, _peak_gpu_mb()])
        peaks = peaks.to(device())
        torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
        rss, gpu = (round(peak, 1) for peak in peaks.tolist())
        end = {
            "steps": trainer.global_step - self._first_step,
            "seconds": time.perf_counter() - self._started - self._validating,
            "peak_rss_mb": rss,
            "peak_gpu_mb": gpu or None,
        }
        if trainer.is_global_zero:
            (self._work / FINISHED).write_text(json.dumps(end))

    def _row(self, trainer: Any, step: int) -> dict[str, float]:
        found = trainer.callback_metrics
        row = {"step": step, "loss": found["reduced_train_loss"].item()}
        if isinstance(self._config, DistillConfig):
            terms = self._balancer.means()
            row |= {name: value for name, value in terms.items() if value or name == "kl"}
        else:
            row["cross_entropy"] = row["loss"]
        row["learning_rate"] = float(found["lr"])  # of this step: the schedule has moved on already
        return row | ({"grad_norm": found["grad_norm"].item()} if "grad_norm" in found else {})

    def _write(self, trainer: Any, row: dict[str, float]) -> None:
        if trainer.is_global_zero:
            with (self._work / HISTORY).open("a") as stream:
                stream.write(json.dumps(row) + "\n")

    def _validate(self, trainer: Any, step: int) -> None:
        """Run Lightning's validation loop, as it does itself between two steps; keep the state if it is the best."""
        self._sum, self._validated = 0.0, 0
        first = trainer._logger_connector._first_loop_iter
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        trainer._logger_connector._first_loop_iter = first
        loss = self._sum / self._sequences
        self._write(trainer, {"step": step, "validation_loss": loss, "validation_perplexity": math.exp(loss)})
        if loss < self._best:
            self._best = loss
            self._save(trainer, self._work / BEST, weights_only=True, note={"step": step, "loss": loss})

    def _save(self, trainer: Any, path: Path, weights_only: bool, note: dict[str, float] | None = None) -> None:
        """Write a checkpoint under another name and rename it when complete; the untrained state is not copied."""
        saving = path.with_name(f"{path.name}.saving")
        if note is None or note["step"]:
            trainer.save_checkpoint(saving, weights_only=weights_only)
        torch.distributed.barrier()
        if trainer.is_global_zero:
            saving.mkdir(exist_ok=True)
            if note is not None:
                if note["step"]:
                    shutil.copytree(self._work / "student" / "context", saving / "context")
                (saving / "best.json").write_text(json.dumps(note))
            shutil.rmtree(path, ignore_errors=True)
            saving.rename(path)
        torch.distributed.barrier()


def _delete_all_but(work: Path, step: int) -> None:
    for path in work.glob("step-*[0-9]"):
        if step_of(path) != step:
            shutil.rmtree(path)


def _peak_gpu_mb() -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
