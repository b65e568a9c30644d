"""The configuration of every stage: its settings, inputs, output, workspace and tracking."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from minitron.config.fields import EXECUTION, HUB_DATASET, INPUT, Fault, InputPath, Location, ModelAddress
from minitron.config.settings import (
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


class StageConfig(StageSettings):
    """The keys of every stage beside its settings: output, workspace and tracking."""

    output: Annotated[Location, EXECUTION] = Field(
        description="Directory that the stage writes, or gs://bucket/path; it appears when it is complete."
    )
    workspace: Annotated[Location | None, EXECUTION] = Field(
        None,
        description="Directory that outlives the task, or gs://bucket/path. Finished stages are reused from it. A "
        "killed stage resumes in it or, with a bucket, in the volume MINITRON_CACHE.",
    )
    tracking_uri: Annotated[str | None, EXECUTION] = Field(None, description="MLflow server; none: no logging.")
    experiment: Annotated[str, EXECUTION] = Field("minitron", description="MLflow experiment.")
    pipeline_run_id: Annotated[str | None, EXECUTION] = Field(
        None, description="Pipeline run of this stage; all stages of one share an MLflow parent run."
    )


class PrepareConfig(PrepareSettings, StageConfig):
    """Corpus → deduplicated, split, tokenized dataset."""

    corpus: Annotated[str, INPUT, HUB_DATASET] = Field(
        min_length=1,
        description="Text: .txt, .jsonl, .ndjson or .json (also .gz, .bz2, .xz, .zst), .parquet, a directory of these, "
        "gs://bucket/path of either, or hf://dataset[/config].",
    )
    teacher: ModelAddress = Field(description="Model whose tokenizer is used; give the same address as for finetune.")


class SequenceConfig(SequenceSettings, StageConfig):
    """Configuration of every stage that runs a model on packed sequences."""

    dataset: InputPath = Field(description="Directory written by prepare.")


class TrainingConfig(TrainingSettings, SequenceConfig):
    """Configuration that fine-tuning and distillation share; they differ by their loss."""

    def find_faults(self) -> Iterator[Fault]:
        """Find also several nodes without a shared directory."""
        yield from super().find_faults()
        if self.num_nodes > 1 and self.workspace is None:
            yield Fault(
                "num_nodes", f"{self.num_nodes}, but there is no workspace for the nodes to share; set workspace"
            )


class FinetuneConfig(FinetuneSettings, TrainingConfig):
    """Teacher → corrected teacher (cross-entropy on the corpus)."""

    teacher: ModelAddress = Field(
        description="Teacher, never modified: a directory (Hugging Face's or NeMo 2's), hf://org/name, "
        "gs://bucket/path, models:/NAME@alias or ngc://org/team/model:version."
    )


class PruneConfig(PruneSettings, SequenceConfig):
    """Teacher → smaller student. Sizes that are not set stay as they are."""

    teacher: InputPath = Field(description="Model to prune.")


class DistillConfig(DistillSettings, TrainingConfig):
    """Teacher and pruned student → trained student (forward KL on logits)."""

    teacher: InputPath = Field(description="Model to learn from.")
    student: InputPath = Field(description="Pruned model to train.")


class EvaluateConfig(EvaluateSettings, SequenceConfig):
    """Models and data → evaluation.json and report.html."""

    teacher_before: ModelAddress = Field(description="Teacher; give the same address as for finetune.")
    teacher: InputPath = Field(description="Corrected teacher.")
    pruned: InputPath = Field(description="Student before distillation.")
    student: InputPath = Field(description="Student after distillation.")


class RegisterConfig(RegisterSettings, StageConfig):
    """Student → version in the MLflow registry."""

    # Not an EXECUTION field here: a version in one registry is not a result for another registry.
    tracking_uri: str | None = Field(None, description="MLflow server whose registry gets the version; required.")
    student: InputPath = Field(description="Model directory to register.")
    evaluation: InputPath = Field(description="Directory written by evaluate.")
    dataset: InputPath = Field(description="Directory written by prepare.")


LARGE = ("prepare", "finetune", "prune", "distill")
"""Stages whose large results (models, datasets) are passed on by reference if they cannot be hard-linked."""

STAGES: dict[str, type[StageConfig]] = {
    "prepare": PrepareConfig,
    "finetune": FinetuneConfig,
    "prune": PruneConfig,
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "register": RegisterConfig,
}
"""Every stage's configuration, in the order of the flow."""
