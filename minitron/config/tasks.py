"""The configuration of the tasks around the stages: resolve, promote, conclude."""

from typing import Any

from pydantic import Field, PositiveInt

from minitron.config.fields import RegisteredName
from minitron.config.settings import RegisterSettings
from minitron.config.stages import StageConfig


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


TASKS: dict[str, type[StageConfig]] = {
    "plan": PlanConfig,
    "resolve": ResolveConfig,
    "promote": PromoteConfig,
    "conclude": ConcludeConfig,
}
"""The tasks that decide instead of making something: what they do depends on the registry, so no result is reused."""
