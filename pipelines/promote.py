"""Make a version the champion, if it meets its gates: what `minitron promote` does, started from Kubeflow's page.

Rewrite the compiled pipeline beside this file: `python -m minitron.pipelines.promote`.
"""

from pathlib import Path
from typing import Optional

from kfp import compiler, dsl

from minitron.components import promote as promote_component
from minitron.components.images import TOOLS
from minitron.pipelines.compress import CLUSTER, VOLUME, connect, give, protect

COMPILED = Path(__file__).with_suffix(".yaml")


@dsl.pipeline(
    name="promote",
    description="Make a version of a registered model the champion, if it meets its gates.",
    pipeline_config=dsl.PipelineConfig(ttl_seconds_after_finished=CLUSTER.ttl_hours * 3600),
)
def promote(
    name: str,
    tracking_uri: str,
    version: Optional[int] = None,
    why: Optional[str] = None,
    experiment: str = "minitron",
    workspace: str = VOLUME,
    tools_image: str = TOOLS,
    image_pull_secret: Optional[str] = None,
    secret: str = "minitron",
    workspace_claim: str = "minitron-workspace",
):
    """Make a version of a registered model the champion, if it meets its gates.

    Args:
        name: Registered model.
        tracking_uri: MLflow server whose registry has the version.
        version: Its number; none: the challenger's.
        why: Reason, for the ledger.
        experiment: MLflow experiment.
        workspace: Where results are kept: a directory of the claim, or gs://bucket/path.
        tools_image: Container image.
        image_pull_secret: Secret to pull the image with, if it is private.
        secret: Secret with credentials, all optional: MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD.
        workspace_claim: Persistent volume claim of the tasks.
    """
    task = promote_component(
        name=name, version=version, why=why, workspace=workspace, tracking_uri=tracking_uri, experiment=experiment,
        pipeline_run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
    )  # fmt: skip
    give(task, gpus=0, cpu="2", memory="8Gi")
    protect(task)
    connect(task, "promote", tools_image, image_pull_secret, secret, workspace_claim)


if __name__ == "__main__":
    compiler.Compiler().compile(promote, str(COMPILED))
