"""Distill the teacher into the pruned student."""

from typing import Optional

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from minitron.config.pipelines import TRAINER


@dsl.component(base_image=TRAINER, packages_to_install=[], install_kfp_package=False)
def distill(
    dataset: Input[Dataset],
    teacher: Input[Model],
    student: Input[Model],
    distilled: Output[Model],
    metrics: Output[Metrics],
    settings: dict = {},
    workspace: Optional[str] = None,
    tracking_uri: Optional[str] = None,
    experiment: str = "minitron",
    pipeline_run_id: Optional[str] = None,
):
    """Distill the teacher into the pruned student. Settings: minitron.config.DistillSettings."""
    from minitron.runtime.entry import launch

    # fmt: off
    launch(
        "distill", metrics, settings, output=distilled.path, dataset=dataset.path, teacher=teacher.path,
        student=student.path, workspace=workspace,
        tracking_uri=tracking_uri, experiment=experiment, pipeline_run_id=pipeline_run_id,
    )
    # fmt: on
