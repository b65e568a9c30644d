"""Training inside NeMo: the data that both engines share, Megatron's parallelism, and the course of a run.

Runs in the workers (engines/nemo/worker.py). B = batch, S = sequence.
"""

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.lightning.io import load_context
from nemo.lightning.pytorch.optim import LRSchedulerModule
from torch import Tensor
from torch.utils.data import Dataset
from transformers import get_scheduler

from minitron.config.stages import DistillConfig, SequenceConfig, TrainingConfig
from minitron.data.packed import open_training_data
from minitron.engines.checkpoints import CHECKPOINT
from minitron.engines.gpus import count_workers
from minitron.engines.hf import get_compute_dtype, get_device
from minitron.engines.nemo.course import Balancer, Course
from minitron.engines.progress import Start
from minitron.models.losses import compute_loss_weights

_HAS_TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None


def train(config: Any, work: Path, initial: Path, start: Start) -> None:
    """Fine-tune or distill `<work>/student`, made from the model `initial`; resume from `start.step` if it is not 0."""
    train_set, validation_set = open_training_data(config)
    sequences, batch = min(config.validation_sequences, len(validation_set)), config.global_batch_size
    validations = math.ceil(sequences / batch)
    data = make_data_module(config, Batches(train_set), Batches(validation_set, sequences, validations * batch), batch)
    trainer = _make_trainer(config, validations)
    balancer = Balancer(compute_loss_weights(config, 1))
    trainer.callbacks.append(Course(config, work, initial, sequences, balancer, start))
    if start.step:
        trainer.ckpt_path = work / f"{CHECKPOINT}-{start.step}" / "weights"
    common: dict[str, Any] = {
        "data": data,
        "trainer": trainer,
        "optim": _make_optimizer(config),
        "log": nl.NeMoLogger(explicit_log_dir=str(work / "logs"), use_datetime_version=False),
        "resume": nl.AutoResume(restore_config=nl.RestoreConfig(path=str(work / "student"))),
        "tokenizer": "model",
    }
    if isinstance(config, DistillConfig):
        _leave_out_modelopt_state()
        settings = work / f"distillation-{os.environ['RANK']}.yaml"  # one per process: no process reads another's file
        settings.write_text(yaml.safe_dump(_make_distillation_settings(config)))
        llm.distill(work / "student", work / "teacher", distillation_config_path=settings, **common)
    else:
        llm.finetune(load_context(work / "student" / "context", subpath="model"), **common)


def _leave_out_modelopt_state() -> None:
    """Let NeMo save a distillation's student like any model, without Model-Optimizer's state.

    NeMo waits for every checkpoint of a converted model before it adds that state (llm/modelopt/model_utils.py,
    save_modelopt_state), so the GPUs would idle. Nothing reads the state: a resumed distillation converts its student
    itself, and only a plain model is exported.
    """
    from nemo.collections.llm.modelopt import model_utils

    model_utils.save_modelopt_state = lambda *_: None


class Batches(Dataset):
    """Our dataset in Megatron's form; items beyond `count` pad the last batch and have no loss."""

    def __init__(self, dataset: Any, count: int | None = None, length: int | None = None) -> None:
        """Take the first `count` items, and repeat the first item up to `length`."""
        self._dataset = dataset
        self._count = len(dataset) if count is None else count
        self._length = self._count if length is None else length
        self._sequence_length = len(dataset[0]["input_ids"])

    def __len__(self) -> int:
        """Return the number of items, including those without loss."""
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
    """NeMo's data module, with its sampler and its position in the data, on our datasets instead of Megatron's.

    Megatron's dataset turns every padding token into token 0 without loss. In many models that token also ends a
    document, so the end of a document would never be learned.
    """

    def build(self, *_: Any, **__: Any) -> None:
        """Build nothing: `make_data_module` sets our datasets."""


def make_data_module(config: SequenceConfig, training: Batches, validation: Batches | None, batch: int) -> _DataModule:
    """Return a data module that gives `batch` sequences per step."""
    prefix = str(config.dataset / "train")
    module = _DataModule(
        paths={"train": [prefix], "validation": [prefix], "test": [prefix]},
        tokenizer=object(),  # NeMo replaces it with the model's
        seq_length=config.sequence_length,
        micro_batch_size=config.micro_batch_size,
        global_batch_size=batch,
        num_workers=0,
        pin_memory=get_device().type == "cuda",
    )
    module._train_ds, module._validation_ds = training, validation
    return module


def _make_trainer(config: TrainingConfig, validations: int) -> nl.Trainer:
    on_gpu, dtype = get_device().type == "cuda", get_compute_dtype()
    strategy = nl.MegatronStrategy(
        tensor_model_parallel_size=config.tensor_parallel_size,
        pipeline_model_parallel_size=config.pipeline_parallel_size,
        context_parallel_size=config.context_parallel_size,
        sequence_parallel=config.sequence_parallel,
        pipeline_dtype=dtype,
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            check_for_nan_in_grad=False,  # Course ends a diverged training, and names the step
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=on_gpu,
            overlap_param_gather=on_gpu,
        ),
        ckpt_async_save=True,  # Course completes it
        ckpt_optim_fully_reshardable=True,  # a retried task may have another number of GPUs
    )
    return nl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=count_workers(config) // config.num_nodes,
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
        enable_progress_bar=False,  # NeMo's bar gathers timers on rank 0 only, and the other ranks wait forever
        enable_model_summary=False,
        logger=False,
    )


class _Schedule(LRSchedulerModule):
    """The schedule of engine hf: transformers' linear warm-up and cosine."""

    def __init__(self, warmup_steps: int, max_steps: int, floor: float) -> None:
        super().__init__()
        self._warmup_steps, self._max_steps, self._floor = warmup_steps, max_steps, floor

    def scheduler(self, model: Any, optimizer: Any) -> dict[str, Any]:
        """Return the schedule, which Lightning steps after every optimizer step."""
        schedule = get_scheduler(
            "cosine_warmup_with_min_lr",
            optimizer,
            self._warmup_steps,
            self._max_steps,
            {"min_lr_rate": self._floor},
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _make_optimizer(config: TrainingConfig) -> nl.MegatronOptimizerModule:
    dtype = get_compute_dtype()
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


def _make_distillation_settings(config: DistillConfig) -> dict[str, Any]:
    pairs = [[f"decoder.layers.{layer - 1}" for layer in pair] for pair in config.intermediate_layers]
    return {"skip_lm_loss": config.cross_entropy_weight == 0, "intermediate_layer_pairs": pairs}
