"""Measure teacher, pruned model and student, and write the report."""

from typing import Optional

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from minitron.config.pipelines import TRAINER


@dsl.component(base_image=TRAINER, packages_to_install=[], install_kfp_package=False)
def evaluate(
    dataset: Input[Dataset],
    teacher: Input[Model],
    pruned: Input[Model],
    student: Input[Model],
    teacher_before: str,
    evaluation: Output[Artifact],
    report: Output[HTML],
    metrics: Output[Metrics],
    settings: dict = {},
    workspace: Optional[str] = None,
    tracking_uri: Optional[str] = None,
    experiment: str = "minitron",
    pipeline_run_id: Optional[str] = None,
):
    """Measure teacher, pruned model and student, and write the report.

    Settings: minitron.config.EvaluateSettings.
    """
    import shutil

    from minitron.runtime.entry import launch

    # fmt: off
    launch(
        "evaluate", metrics, settings, output=evaluation.path, dataset=dataset.path, teacher=teacher.path,
        pruned=pruned.path, student=student.path, teacher_before=teacher_before, workspace=workspace,
        tracking_uri=tracking_uri, experiment=experiment, pipeline_run_id=pipeline_run_id,
    )
    # fmt: on
    shutil.copyfile(f"{evaluation.path}/report.html", report.path)
