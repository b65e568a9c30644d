"""The configuration of the tasks around the stages: plan, resolve, promote, conclude."""

from typing import Any

from pydantic import Field, PositiveInt

from minitron.config.fields import RegisteredName
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


TASKS: dict[str, type[StageConfig]] = {
    "plan": PlanConfig,
    "resolve": ResolveConfig,
    "promote": PromoteConfig,
    "conclude": ConcludeConfig,
}
"""Tasks that make decisions. Their results depend on the registry, so they are never reused."""
