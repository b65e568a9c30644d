"""Register the student in the MLflow registry."""

from typing import Optional

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from minitron.config.pipelines import TOOLS


@dsl.component(base_image=TOOLS, packages_to_install=[], install_kfp_package=False)
def register(
    dataset: Input[Dataset],
    student: Input[Model],
    evaluation: Input[Artifact],
    registered: Output[Artifact],
    metrics: Output[Metrics],
    settings: dict = {},
    workspace: Optional[str] = None,
    tracking_uri: Optional[str] = None,
    experiment: str = "minitron",
    pipeline_run_id: Optional[str] = None,
) -> str:
    """Register the student in the MLflow registry; return its version.

    Settings: minitron.config.RegisterSettings.
    """
    from minitron.runtime.entry import launch

    # fmt: off
    record = launch(
        "register", metrics, settings, output=registered.path, dataset=dataset.path, student=student.path,
        evaluation=evaluation.path, workspace=workspace,
        tracking_uri=tracking_uri, experiment=experiment, pipeline_run_id=pipeline_run_id,
    )
    # fmt: on
    return str(record["registered"]["version"])
