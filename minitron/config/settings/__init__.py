"""The settings of every stage, one frozen model each: the only place where a setting and its default are written.

A preset has one section per stage, and a component takes it as its parameter `settings`:

    prune(teacher=..., dataset=..., settings=PruneSettings(intermediate_size=9216).as_settings())
"""

from minitron.config.settings.base import EngineSettings, SequenceSettings, Settings, StageSettings
from minitron.config.settings.cluster import (
    QUEUE_LABEL,
    RESOURCES,
    RETRIES,
    TRAIN_JOB_QUEUE_LABEL,
    ClusterConfig,
    GpuResources,
    Resources,
)
from minitron.config.settings.corpus import (
    CorpusPart,
    CorpusText,
    compute_shares,
    format_parts,
    identify_parts,
    list_parts,
)
from minitron.config.settings.evaluate import EvaluateSettings
from minitron.config.settings.prepare import PrepareSettings
from minitron.config.settings.register import RegisterSettings
from minitron.config.settings.training import DistillSettings, FinetuneSettings, TrainingSettings, read_weight

__all__ = [
    "QUEUE_LABEL",
    "RESOURCES",
    "RETRIES",
    "TRAIN_JOB_QUEUE_LABEL",
    "ClusterConfig",
    "CorpusPart",
    "CorpusText",
    "DistillSettings",
    "EngineSettings",
    "EvaluateSettings",
    "FinetuneSettings",
    "GpuResources",
    "PrepareSettings",
    "RegisterSettings",
    "Resources",
    "SequenceSettings",
    "Settings",
    "StageSettings",
    "TrainingSettings",
    "compute_shares",
    "format_parts",
    "identify_parts",
    "list_parts",
    "read_weight",
]
