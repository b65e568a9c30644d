"""The configuration of every stage: its settings, its inputs, and where it writes and reports."""

from typing import Annotated, Any

from pydantic import Field, PositiveInt, model_validator

from minitron.fields import EXECUTION, HUB_DATASET, INPUT, InputPath, ModelAddress, Place, RegisteredName
from minitron.settings import (
    DistillSettings,
    EvaluateSettings,
    FinetuneSettings,
    PrepareSettings,
    PruneSettings,
    RegisterSettings,
    SequenceSettings,
    StageSettings,
    TrainingSettings,
)
from minitron.validation import validated


class StageConfig(StageSettings):
    """What every stage has beside its settings: where it writes and where it reports."""

    output: Annotated[Place, EXECUTION] = Field(
        description="Directory the stage writes, or gs://bucket/path; it appears when complete."
    )
    workspace: Annotated[Place | None, EXECUTION] = Field(
        None,
        description="Directory that outlives the task, or gs://bucket/path: a killed stage resumes (from a bucket: in "
        "the volume MINITRON_CACHE), a finished one is reused from it.",
    )
    tracking_uri: Annotated[str | None, EXECUTION] = Field(None, description="MLflow server; none: no logging.")
    experiment: Annotated[str, EXECUTION] = Field("minitron", description="MLflow experiment.")
    pipeline_run_id: Annotated[str | None, EXECUTION] = Field(
        None, description="Kubeflow run that this stage belongs to: the stages of one run share an MLflow parent run."
    )


class PrepareConfig(PrepareSettings, StageConfig):
    """Corpus → deduplicated, split, tokenised dataset."""

    corpus: Annotated[str, INPUT, HUB_DATASET] = Field(
        min_length=1,
        description="Text: .txt, .jsonl(.gz/.zst), .json or .parquet, a directory of them, gs://bucket/path of either, "
        "or hf://dataset[/config].",
    )
    teacher: ModelAddress = Field(description="Model whose tokenizer is used; its address is finetune's.")


class SequenceConfig(SequenceSettings, StageConfig):
    """What every stage that runs a model on packed sequences has."""

    dataset: InputPath = Field(description="Directory written by prepare.")


class TrainingConfig(TrainingSettings, SequenceConfig):
    """What fine-tuning and distillation share: they differ by their loss."""

    @model_validator(mode="after")
    def _nodes_share_a_workspace(self) -> "TrainingConfig":
        if self.num_nodes > 1 and self.workspace is None:
            raise ValueError(f"num_nodes is {self.num_nodes}, but the nodes share no workspace: give one")
        return self


class FinetuneConfig(FinetuneSettings, TrainingConfig):
    """Base model → corrected teacher (cross-entropy on the corpus)."""

    teacher: ModelAddress = Field(
        description="Base model, never modified: a directory (Hugging Face's or NeMo 2's), hf://org/name, "
        "gs://bucket/path, models:/NAME@alias or ngc://org/team/model:version."
    )


class PruneConfig(PruneSettings, SequenceConfig):
    """Teacher → smaller student. A size that is not given is not cut."""

    teacher: InputPath = Field(description="Model to prune.")


class DistillConfig(DistillSettings, TrainingConfig):
    """Teacher and pruned student → trained student (forward KL on logits)."""

    teacher: InputPath = Field(description="Model to learn from.")
    student: InputPath = Field(description="Pruned model to train.")


class EvaluateConfig(EvaluateSettings, SequenceConfig):
    """Models and data → evaluation.json and report.html."""

    teacher_before: ModelAddress = Field(description="Base model; its address is finetune's.")
    teacher: InputPath = Field(description="Corrected teacher.")
    pruned: InputPath = Field(description="Student before distillation.")
    student: InputPath = Field(description="Student after distillation.")


class RegisterConfig(RegisterSettings, StageConfig):
    """Student → version in the MLflow registry."""

    # Not an EXECUTION field here: a version in one registry is no result for another.
    tracking_uri: str | None = Field(None, description="MLflow server whose registry gets the version; required.")
    student: InputPath = Field(description="Model directory to register.")
    evaluation: InputPath = Field(description="Directory written by evaluate.")
    dataset: InputPath = Field(description="Directory written by prepare.")


class PlanConfig(StageConfig):
    """Preset and settings → what every stage is going to do, all of it checked."""

    preset: str = Field("", description="Preset that ships with the package; empty: none.")
    document: dict[str, Any] = Field({}, description="Settings, as in a preset, that win over those of the preset.")
    teacher: str = Field("", description="Base model; empty: the preset's.")
    corpus: str = Field("", description="Text; empty: the preset's.")
    model_name: str = Field("", description="Registered model; empty: the preset's.")
    champion: str = Field("", description="Model in production to compare with; empty: the preset's, or none.")


class ResolveConfig(PlanConfig):
    """Corpus, teacher and settings → is there anything to train that is not there yet?"""

    tracking_uri: str = Field(description="MLflow server whose registry has the versions.")
    pipeline_run_id: str = Field(description="Kubeflow run that asks.")


class PromoteConfig(StageConfig):
    """Version → champion, if it meets its gates."""

    tracking_uri: str = Field(description="MLflow server whose registry has the version.")
    model_name: RegisteredName = RegisterSettings.model_fields["name"].default
    version: PositiveInt | None = Field(None, description="Its number; none: the challenger's.")
    why: str | None = Field(None, description="Reason, for the ledger.")


class ConcludeConfig(StageConfig):
    """What happened in a run → its outcome in MLflow, and a page."""

    tracking_uri: str = Field(description="MLflow server.")
    pipeline_run_id: str = Field(description="Kubeflow run that ends.")
    state: str = Field(description="State in which Kubeflow says that it ended.")
    message: str | None = Field(None, description="What Kubeflow says of a failure.")


LARGE = ("prepare", "finetune", "prune", "distill")
"""Stages whose results, models and datasets, are passed on by reference where they cannot be linked."""

STAGES: dict[str, type[StageConfig]] = {
    "prepare": PrepareConfig,
    "finetune": FinetuneConfig,
    "prune": PruneConfig,
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "register": RegisterConfig,
}
"""Every stage's configuration, in the order of the flow."""


TASKS: dict[str, type[StageConfig]] = {
    "plan": PlanConfig,
    "resolve": ResolveConfig,
    "promote": PromoteConfig,
    "conclude": ConcludeConfig,
}
"""The tasks that decide instead of making something: what they do depends on the registry, so no result is reused."""


def fields_marked(model: type[StageSettings], mark: str) -> list[str]:
    """Return the names of the fields that carry INPUT or EXECUTION."""
    return [name for name, field in model.model_fields.items() if mark in field.metadata]


def parse(stage: str, values: dict[str, Any]) -> StageConfig:
    """Validate the values of one stage, or of one of TASKS.

    Raises:
        ConfigError: a key is unknown, missing or has a value of the wrong kind; all faults are named.
    """
    return validated(stage, (STAGES | TASKS)[stage], values)
