"""Find out whether there is anything to train."""

from typing import NamedTuple, Optional

from kfp import dsl
from kfp.dsl import Artifact, Metrics, Output

from minitron.components.images import TOOLS


# fmt: off
@dsl.component(base_image=TOOLS, packages_to_install=[], install_kfp_package=False)
def resolve(
    corpus: str,
    teacher: str,
    tracking_uri: str,
    pipeline_run_id: str,
    resolved: Output[Artifact],
    metrics: Output[Metrics],
    name: str = "minitron",
    sequence_length: int = 8192,
    seed: int = 1234,
    engine: str = "nemo",
    prepare_text_field: str = "text",
    prepare_validation_fraction: float = 0.01,
    prepare_test_fraction: float = 0.01,
    prepare_licence: str = "unknown",
    finetune_micro_batch_size: int = 4,
    finetune_max_steps: int = 30,
    finetune_global_batch_size: int = 128,
    finetune_learning_rate: float = 0.0001,
    finetune_min_learning_rate: float = 1e-05,
    finetune_warmup_steps: int = 2,
    finetune_weight_decay: float = 0.1,
    finetune_adam_beta1: float = 0.9,
    finetune_adam_beta2: float = 0.95,
    finetune_gradient_clipping: float = 1.0,
    finetune_gradient_checkpointing: bool = False,
    finetune_validation_interval: int = 10,
    finetune_validation_sequences: int = 640,
    finetune_checkpoint_interval: int = 10,
    finetune_enabled: bool = True,
    prune_micro_batch_size: int = 4,
    prune_hidden_size: Optional[int] = None,
    prune_intermediate_size: Optional[int] = None,
    prune_num_attention_heads: Optional[int] = None,
    prune_num_key_value_heads: Optional[int] = None,
    prune_num_hidden_layers: Optional[int] = None,
    prune_drop_layers: Optional[list[int]] = None,
    prune_calibration_sequences: int = 1024,
    distill_micro_batch_size: int = 4,
    distill_max_steps: int = 30,
    distill_global_batch_size: int = 128,
    distill_learning_rate: float = 0.0001,
    distill_min_learning_rate: float = 1e-05,
    distill_warmup_steps: int = 2,
    distill_weight_decay: float = 0.1,
    distill_adam_beta1: float = 0.9,
    distill_adam_beta2: float = 0.95,
    distill_gradient_clipping: float = 1.0,
    distill_gradient_checkpointing: bool = False,
    distill_validation_interval: int = 10,
    distill_validation_sequences: int = 640,
    distill_checkpoint_interval: int = 10,
    distill_temperature: float = 1.0,
    distill_kl_weight: float = 1.0,
    distill_cross_entropy_weight: float = 0.0,
    distill_intermediate_layers: list = [],
    workspace: Optional[str] = None,
    experiment: str = "minitron",
) -> NamedTuple("Decision", [("Output", bool), ("champion", str)]):  # type: ignore[valid-type]
    """Find out whether there is anything to train. Settings: minitron.config.ResolveConfig.

    The settings are those of prepare, finetune, prune and distill that decide the student's weights. `Output` says
    whether there is anything: kfp.local knows no other name in a condition.
    """
    settings = dict(locals())
    from collections import namedtuple

    from minitron.stage import launch

    found = launch(
        "resolve", metrics, output=resolved.path, corpus=corpus, teacher=teacher, name=name, settings=settings,
        workspace=workspace, tracking_uri=tracking_uri, experiment=experiment, pipeline_run_id=pipeline_run_id,
    )
    return namedtuple("Decision", ["Output", "champion"])(found["train"], found["champion"] or "")
# fmt: on
