"""Scheduled retraining: resolve → compress if anything has changed → promote if the gates are met → conclude.

Rewrite the compiled pipeline beside this file: `python -m minitron.pipelines.retrain`.
"""

from pathlib import Path

from kfp import dsl

from minitron.components import conclude, promote, resolve
from minitron.config.pipelines import TOOLS, TRAINER
from minitron.pipelines.compress import compress
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
    name="retrain",
    description="Compress again if data, teacher or settings have changed; promote the student if it meets the gates.",
)
def retrain(
    tracking_uri: str,
    teacher: str = "",
    corpus: str = "",
    model_name: str = "",
    preset: str = "",
    settings: dict = {},
    experiment: str = "minitron",
    workspace: str = VOLUME,
    workspace_claim: str = "minitron-workspace",
    trainer_image: str = TRAINER,
    tools_image: str = TOOLS,
    image_pull_secret: str = PULL_SECRET,
    credentials_secret: str = "minitron",
):
    """Compress again if data, teacher or settings have changed; promote the student if it meets the gates.

    Args:
        tracking_uri: MLflow server for the metrics and the model: http(s)://HOST.
        teacher: Model to compress: a directory that every task can read, hf://org/name, gs://bucket/path,
            models:/NAME@alias or ngc://org/team/model:version. Empty: the preset's.
        corpus: Text: a file or directory that every task can read, gs://bucket/path or hf://dataset, or a
            JSON list of several: [{"address": …, "weight": …}, …]. Empty: the preset's.
        model_name: Registered model that gets the new version and has the champion. Empty: the preset's.
        preset: Shipped preset, such as llama-3.1-minitron-4b-width. Empty: all defaults.
        settings: Settings that win over the preset's, one section per stage: {"distill": {"max_steps": 500}}.
        experiment: MLflow experiment.
        workspace: Where results are kept: a directory on the volume, or gs://bucket/path (work in progress stays on
            the volume).
        workspace_claim: Persistent volume claim that all tasks share; ReadWriteMany if they run on several nodes.
        trainer_image: Container image of prepare, finetune, prune, distill and evaluate.
        tools_image: Container image of the other tasks.
        image_pull_secret: Secret for pulling the images, if they are private.
        credentials_secret: Secret with credentials, all optional: HF_TOKEN, NGC_API_KEY, MLFLOW_TRACKING_USERNAME,
            MLFLOW_TRACKING_PASSWORD.
    """
    common = {"tracking_uri": tracking_uri, "experiment": experiment, "workspace": workspace}
    form = {"teacher": teacher, "corpus": corpus, "preset": preset, "settings": settings}
    run = common | {"pipeline_run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
    tasks = {"conclude": conclude(**run)}
    with dsl.ExitHandler(tasks["conclude"]):
        tasks["resolve"] = resolve(model_name=model_name, **form, **run)
        decision = tasks["resolve"].outputs
        with dsl.If(decision["Output"] == True):  # noqa: E712  (KFP's condition)
            compress_task = compress(
                model_name=model_name, champion=decision["champion"], **form, **common, workspace_claim=workspace_claim,
                trainer_image=trainer_image, tools_image=tools_image, image_pull_secret=image_pull_secret,
                credentials_secret=credentials_secret,
            )  # fmt: skip
            tasks["promote"] = promote(model_name=decision["model_name"], version=compress_task.output, **run)
    for name, task in tasks.items():
        set_resources(task, TOOLS_CPU, TOOLS_MEMORY)
        set_retries(task)
        set_pod(task, name, tools_image, image_pull_secret, credentials_secret, workspace_claim)


if __name__ == "__main__":
    write_compiled(retrain, COMPILED)
