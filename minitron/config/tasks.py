"""The configuration of the tasks around the stages: plan, resolve, promote, conclude; of a search select and trial."""

from typing import Any

from pydantic import Field, PositiveInt

from minitron.config.fields import Location, RegisteredName
from minitron.config.settings import RegisterSettings
from minitron.config.stages import StageConfig


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
