"""Correct the teacher on the corpus, and keep the better of the two."""

from typing import Optional

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from minitron.components.images import TRAINER


# fmt: off
@dsl.component(base_image=TRAINER, packages_to_install=[], install_kfp_package=False)
def finetune(
    dataset: Input[Dataset],
    teacher: str,
    corrected: Output[Model],
    metrics: Output[Metrics],
    seed: int = 1234, engine: str = "hf",
    sequence_length: int = 8192, micro_batch_size: int = 4, global_batch_size: int = 128, max_steps: int = 30,
    learning_rate: float = 0.0001, min_learning_rate: float = 1e-05, warmup_steps: int = 2, weight_decay: float = 0.1,
    adam_beta1: float = 0.9, adam_beta2: float = 0.95, gradient_clipping: float = 1.0,
    gradient_checkpointing: bool = False,
    validation_interval: int = 10, validation_sequences: int = 640, checkpoint_interval: int = 10,
    tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1, context_parallel_size: int = 1,
    sequence_parallel: bool = False, num_nodes: int = 1, gpus_per_node: int = 8,
    enabled: bool = True,
    workspace: Optional[str] = None, tracking_uri: Optional[str] = None,
    experiment: str = "minitron", pipeline_run_id: Optional[str] = None, caching: bool = True, gpus: int = 0,
):
    """Correct the teacher on the corpus, and keep the better of the two. Settings: minitron.config.FinetuneConfig."""
    from minitron.stage import launch

    launch(
        "finetune", metrics, dataset=dataset.path, output=corrected.path, teacher=teacher, seed=seed,
        engine=engine, sequence_length=sequence_length, micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size, max_steps=max_steps, learning_rate=learning_rate,
        min_learning_rate=min_learning_rate, warmup_steps=warmup_steps, weight_decay=weight_decay,
        adam_beta1=adam_beta1, adam_beta2=adam_beta2, gradient_clipping=gradient_clipping,
        gradient_checkpointing=gradient_checkpointing, validation_interval=validation_interval,
        validation_sequences=validation_sequences, checkpoint_interval=checkpoint_interval,
        tensor_parallel_size=tensor_parallel_size, pipeline_parallel_size=pipeline_parallel_size,
        context_parallel_size=context_parallel_size, sequence_parallel=sequence_parallel, num_nodes=num_nodes,
        gpus_per_node=gpus_per_node, enabled=enabled,
        workspace=workspace, tracking_uri=tracking_uri, experiment=experiment, pipeline_run_id=pipeline_run_id,
        caching=caching, gpus=gpus,
    )
# fmt: on
