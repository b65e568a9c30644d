"""The configuration of every stage and of the tasks around them: settings, inputs, output, workspace and tracking."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from minitron.config.fields import (
    EXECUTION,
    HUB_DATASET,
    INPUT,
    Fault,
    InputPath,
    Location,
    ModelAddress,
    RegisteredName,
)
from minitron.config.settings import (
    CorpusText,
    DistillSettings,
    EvaluateSettings,
    FinetuneSettings,
    PrepareSettings,
    RegisterSettings,
    SequenceSettings,
    StageSettings,
    TrainingSettings,
)
from minitron.config.shapes import PruneSettings


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

    corpus: Annotated[CorpusText, INPUT, HUB_DATASET]
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


SETTINGS: dict[str, type[StageSettings]] = {
    "prepare": PrepareSettings,
    "finetune": FinetuneSettings,
    "prune": PruneSettings,
    "distill": DistillSettings,
    "evaluate": EvaluateSettings,
    "register": RegisterSettings,
}
"""Every stage's settings, in the order of the flow."""


class PlanConfig(StageConfig):
    """Preset and settings → the checked settings of every stage."""

    preset: str = Field("", description="Preset that ships with the package; empty: none.")
    document: dict[str, Any] = Field({}, description="Settings, written as in a preset; they win over the preset's.")
    teacher: str = Field("", description="Model to compress; empty: the preset's.")
    corpus: str = Field("", description="Text; empty: the preset's.")
    model_name: str = Field("", description="Registered model; empty: the preset's.")
    champion: str = Field("", description="Model in production to compare with; empty: the preset's, if it names one.")
    needs_budget: bool = Field(False, description="The pipeline searches: its document must have a budget.")


class ResolveConfig(PlanConfig):
    """Corpus, teacher and settings → the decision whether there is anything new to train."""

    tracking_uri: str = Field(description="MLflow server whose registry has the versions.")
    pipeline_run_id: str = Field(description="Pipeline run that this task belongs to.")


class PromoteConfig(StageConfig):
    """Version → champion, if it meets its gates."""

    tracking_uri: str = Field(description="MLflow server whose registry has the version.")
    model_name: RegisteredName = RegisterSettings.model_fields["name"].default
    version: PositiveInt | None = Field(None, description="Number of the version; none: the challenger.")
    why: str | None = Field(None, description="Reason for the promotion log.")


class ConcludeConfig(StageConfig):
    """The end of a run → its outcome in MLflow, and a page."""

    tracking_uri: str = Field(description="MLflow server.")
    pipeline_run_id: str = Field(description="Pipeline run that ends.")
    state: str = Field(description="Final state that Kubeflow reports.")
    message: str | None = Field(None, description="Kubeflow's message, if the run failed.")


class SelectConfig(StageConfig):
    """Budget, or the results of a round → the candidates of the next round; after the last round, the winner."""

    planned: Location = Field(description="Directory written by plan: teacher, and the sections search and prune.")
    document: dict[str, Any] = Field({}, description="Settings of the run, which the winner's sizes are added to.")
    results: list[str] = Field([], description="Results of the trials of a round, as JSON; none: no round yet.")
    rest: list[str] = Field([], description="Results of the candidates that earlier rounds eliminated, as JSON.")


class TrialConfig(StageConfig):
    """Candidate → the candidate with its loss in the next round, or with its error."""

    dataset: Location = Field(description="Directory written by prepare.")
    teacher: Location = Field(description="Model to cut, and to learn from.")
    candidate: str = Field(description="Candidate as JSON: name, sizes, and the losses of its earlier rounds.")
    planned: Location = Field(description="Directory written by plan: the sections search, prune and distill.")


TASKS: dict[str, type[StageConfig]] = {
    "plan": PlanConfig,
    "resolve": ResolveConfig,
    "promote": PromoteConfig,
    "conclude": ConcludeConfig,
    "select": SelectConfig,
    "trial": TrialConfig,
}
"""Tasks around the stages. They depend on the registry or on a race, so that they are never reused as a whole."""
