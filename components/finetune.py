"""Correct the teacher on the corpus, and keep the better of the two."""

from typing import Optional

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from minitron.config.pipelines import TRAINER


@dsl.component(base_image=TRAINER, packages_to_install=[], install_kfp_package=False)
def finetune(
    dataset: Input[Dataset],
    teacher: str,
    corrected: Output[Model],
    metrics: Output[Metrics],
    settings: dict = {},
    workspace: Optional[str] = None,
    tracking_uri: Optional[str] = None,
    experiment: str = "minitron",
    pipeline_run_id: Optional[str] = None,
):
    """Correct the teacher on the corpus, and keep the better of the two.

    Settings: minitron.config.FinetuneSettings.
    """
    from minitron.runtime.entry import launch

    # fmt: off
    launch(
        "finetune", metrics, settings, output=corrected.path, dataset=dataset.path, teacher=teacher,
        workspace=workspace, tracking_uri=tracking_uri, experiment=experiment, pipeline_run_id=pipeline_run_id,
    )
    # fmt: on
