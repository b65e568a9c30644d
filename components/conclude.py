"""Record how a run ended, whatever happened in it."""

from typing import Optional

from kfp import dsl
from kfp.dsl import HTML, Artifact, Metrics, Output, PipelineTaskFinalStatus

from minitron.config.pipelines import TOOLS


@dsl.component(base_image=TOOLS, packages_to_install=[], install_kfp_package=False)
def conclude(
    status: PipelineTaskFinalStatus,
    tracking_uri: str,
    pipeline_run_id: str,
    concluded: Output[Artifact],
    report: Output[HTML],
    metrics: Output[Metrics],
    workspace: Optional[str] = None,
    experiment: str = "minitron",
):
    """Record how a run ended, whatever happened in it. Settings: minitron.config.stages.ConcludeConfig."""
    import shutil

    from minitron.runtime.entry import launch

    # fmt: off
    launch(
        "conclude", metrics, output=concluded.path, state=status.state, message=status.error_message,
        workspace=workspace, tracking_uri=tracking_uri, experiment=experiment, pipeline_run_id=pipeline_run_id,
    )
    # fmt: on
    shutil.copyfile(f"{concluded.path}/conclusion.html", report.path)
