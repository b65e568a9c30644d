"""Make a version the champion if it meets its gates: `minitron promote`, started from Kubeflow's page.

Rewrite the compiled pipeline beside this file: `python -m minitron.pipelines.promote`.
"""

from pathlib import Path
from typing import Optional

from kfp import dsl

from minitron.components import promote as promote_component
from minitron.config.pipelines import TOOLS
from minitron.pipelines.tasks import (
    PULL_SECRET,
    TOOLS_CPU,
    TOOLS_MEMORY,
    VOLUME,
    set_pod,
    set_resources,
    set_retries,
    write_compiled,
)

COMPILED = Path(__file__).with_suffix(".yaml")


@dsl.pipeline(
    name="promote",
    description="Make a version of a registered model the champion if it meets its gates.",
)
def promote(
    model_name: str,
    tracking_uri: str,
    version: str = "",
    why: Optional[str] = None,
    experiment: str = "promotions",
    workspace: str = VOLUME,
    workspace_claim: str = "minitron-workspace",
    tools_image: str = TOOLS,
    image_pull_secret: str = PULL_SECRET,
    credentials_secret: str = "minitron",
):
    """Make a version of a registered model the champion if it meets its gates.

    Args:
        model_name: Registered model.
        tracking_uri: MLflow server whose registry has the version: http(s)://HOST.
        version: Number of the version. Empty: the challenger.
        why: Reason for the promotion log.
        experiment: MLflow experiment.
        workspace: Where results are kept: a directory on the volume, or gs://bucket/path.
        workspace_claim: Persistent volume claim of the tasks.
        tools_image: Container image.
        image_pull_secret: Secret for pulling the image, if it is private.
        credentials_secret: Secret with credentials, all optional: MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD.
    """
    task = promote_component(
        model_name=model_name, version=version, why=why, workspace=workspace, tracking_uri=tracking_uri,
        experiment=experiment, pipeline_run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
    )  # fmt: skip
    set_resources(task, TOOLS_CPU, TOOLS_MEMORY)
    set_retries(task)
    set_pod(task, "promote", tools_image, image_pull_secret, credentials_secret, workspace_claim)


if __name__ == "__main__":
    write_compiled(promote, COMPILED)
