"""Promote a version to champion, if it meets its gates."""

from typing import Optional

from kfp import dsl
from kfp.dsl import Artifact, Metrics, Output

from minitron.config.pipelines import TOOLS


@dsl.component(base_image=TOOLS, packages_to_install=[], install_kfp_package=False)
def promote(
    model_name: str,
    tracking_uri: str,
    promoted: Output[Artifact],
    metrics: Output[Metrics],
    version: str = "",
    why: Optional[str] = None,
    workspace: Optional[str] = None,
    experiment: str = "minitron",
    pipeline_run_id: Optional[str] = None,
):
    """Promote a version to champion, if it meets its gates. Settings: minitron.config.stages.PromoteConfig."""
    from minitron.runtime.entry import launch

    # fmt: off
    launch(
        "promote", metrics, output=promoted.path, model_name=model_name, version=version or None, why=why,
        workspace=workspace, tracking_uri=tracking_uri, experiment=experiment, pipeline_run_id=pipeline_run_id,
    )
    # fmt: on
