"""Cut the teacher to a smaller student by Minitron importance."""

from typing import Optional

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from minitron.components.images import TRAINER


@dsl.component(base_image=TRAINER, packages_to_install=[], install_kfp_package=False)
def prune(
    dataset: Input[Dataset],
    teacher: Input[Model],
    pruned: Output[Model],
    metrics: Output[Metrics],
    seed: int = 1234,
    engine: str = "hf",
    sequence_length: int = 8192,
    micro_batch_size: int = 4,
    hidden_size: Optional[int] = None,
    intermediate_size: Optional[int] = None,
    num_attention_heads: Optional[int] = None,
    num_key_value_heads: Optional[int] = None,
    num_hidden_layers: Optional[int] = None,
    drop_layers: Optional[list[int]] = None,
    calibration_sequences: int = 1024,
    workspace: Optional[str] = None,
    tracking_uri: Optional[str] = None,
    experiment: str = "minitron",
    pipeline_run_id: Optional[str] = None,
    caching: bool = True,
    gpus: int = 0,
):
    """Cut the teacher to a smaller student by Minitron importance. Settings: minitron.config.PruneConfig."""
    from minitron.stage import launch

    # fmt: off
    launch(
        "prune", metrics, dataset=dataset.path, teacher=teacher.path, output=pruned.path, seed=seed, engine=engine,
        sequence_length=sequence_length, micro_batch_size=micro_batch_size, hidden_size=hidden_size,
        intermediate_size=intermediate_size, num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads, num_hidden_layers=num_hidden_layers, drop_layers=drop_layers,
        calibration_sequences=calibration_sequences, workspace=workspace, tracking_uri=tracking_uri,
        experiment=experiment, pipeline_run_id=pipeline_run_id, caching=caching, gpus=gpus,
    )
    # fmt: on
