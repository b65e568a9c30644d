"""Cut the teacher to a smaller student."""

from typing import Optional

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from minitron.config.pipelines import TRAINER


@dsl.component(base_image=TRAINER, packages_to_install=[], install_kfp_package=False)
def prune(
    dataset: Input[Dataset],
    teacher: Input[Model],
    pruned: Output[Model],
    metrics: Output[Metrics],
    settings: dict = {},
    workspace: Optional[str] = None,
    tracking_uri: Optional[str] = None,
    experiment: str = "minitron",
    pipeline_run_id: Optional[str] = None,
):
    """Cut the teacher to a smaller student. Settings: minitron.config.PruneSettings."""
    from minitron.runtime.entry import launch

    # fmt: off
    launch(
        "prune", metrics, settings, output=pruned.path, dataset=dataset.path, teacher=teacher.path, workspace=workspace,
        tracking_uri=tracking_uri, experiment=experiment, pipeline_run_id=pipeline_run_id,
    )
    # fmt: on
