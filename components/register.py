"""Register the student in the MLflow registry."""

from typing import Optional

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from minitron.components.images import TOOLS


@dsl.component(base_image=TOOLS, packages_to_install=[], install_kfp_package=False)
def register(
    dataset: Input[Dataset],
    student: Input[Model],
    evaluation: Input[Artifact],
    registered: Output[Artifact],
    metrics: Output[Metrics],
    seed: int = 1234,
    name: str = "minitron",
    alias: str = "challenger",
    workspace: Optional[str] = None,
    tracking_uri: Optional[str] = None,
    experiment: str = "minitron",
    pipeline_run_id: Optional[str] = None,
    caching: bool = True,
    gpus: int = 0,
) -> int:
    """Register the student in the MLflow registry; return its version. Settings: minitron.config.RegisterConfig."""
    from minitron.stage import launch

    # fmt: off
    record = launch(
        "register", metrics, dataset=dataset.path, student=student.path, evaluation=evaluation.path,
        output=registered.path, seed=seed, name=name, alias=alias, workspace=workspace,
        tracking_uri=tracking_uri, experiment=experiment, pipeline_run_id=pipeline_run_id, caching=caching, gpus=gpus,
    )
    # fmt: on
    return record["registered"]["version"]
