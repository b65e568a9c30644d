"""Distil the teacher into the pruned student."""

from typing import Optional

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from minitron.components.images import TRAINER


@dsl.component(base_image=TRAINER, packages_to_install=[], install_kfp_package=False)
def distill(
    dataset: Input[Dataset],
    teacher: Input[Model],
    student: Input[Model],
    distilled: Output[Model],
    metrics: Output[Metrics],
    seed: int = 1234,
    sequence_length: int = 8192,
    micro_batch_size: int = 4,
    engine: str = "hf",
    max_steps: int = 30,
    global_batch_size: int = 128,
    learning_rate: float = 0.0001,
    min_learning_rate: float = 1e-05,
    warmup_steps: int = 2,
    weight_decay: float = 0.1,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.95,
    gradient_clipping: float = 1.0,
    gradient_checkpointing: bool = False,
    validation_interval: int = 10,
    validation_sequences: int = 640,
    checkpoint_interval: int = 10,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    cross_entropy_weight: float = 0.0,
    workspace: Optional[str] = None,
    tracking_uri: Optional[str] = None,
    experiment: str = "minitron",
    pipeline_run_id: Optional[str] = None,
    caching: bool = True,
):
    """Distil the teacher into the pruned student. Settings: minitron.config.DistillConfig."""
    from minitron.stage import launch

    # fmt: off
    launch(
        "distill", metrics, dataset=dataset.path, teacher=teacher.path, student=student.path,
        output=distilled.path, seed=seed, sequence_length=sequence_length, micro_batch_size=micro_batch_size,
        engine=engine, max_steps=max_steps, global_batch_size=global_batch_size, learning_rate=learning_rate,
        min_learning_rate=min_learning_rate, warmup_steps=warmup_steps, weight_decay=weight_decay,
        adam_beta1=adam_beta1, adam_beta2=adam_beta2, gradient_clipping=gradient_clipping,
        gradient_checkpointing=gradient_checkpointing, validation_interval=validation_interval,
        validation_sequences=validation_sequences, checkpoint_interval=checkpoint_interval,
        temperature=temperature, kl_weight=kl_weight, cross_entropy_weight=cross_entropy_weight,
        workspace=workspace, tracking_uri=tracking_uri, experiment=experiment,
        pipeline_run_id=pipeline_run_id, caching=caching,
    )
    # fmt: on
