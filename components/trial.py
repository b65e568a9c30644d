"""Try a candidate of a search: cut it, or distill it shortly, and measure its loss."""

from typing import Optional

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from minitron.config.pipelines import TRAINER


@dsl.component(base_image=TRAINER, packages_to_install=[], install_kfp_package=False)
def trial(
    dataset: Input[Dataset],
    teacher: Input[Model],
    planned: Input[Artifact],
    candidate: str,
    tried: Output[Artifact],
    metrics: Output[Metrics],
    workspace: Optional[str] = None,
    tracking_uri: Optional[str] = None,
    experiment: str = "minitron",
    pipeline_run_id: Optional[str] = None,
) -> str:
    """Try a candidate of a search; return it with its loss or its error, as JSON.

    Settings: minitron.config.shapes.SearchSettings.
    """
    from minitron.runtime.entry import launch

    # fmt: off
    return launch(
        "trial", metrics, output=tried.path, dataset=dataset.path, teacher=teacher.path, planned=planned.path,
        candidate=candidate, workspace=workspace, tracking_uri=tracking_uri, experiment=experiment,
        pipeline_run_id=pipeline_run_id,
    )["result"]
    # fmt: on
