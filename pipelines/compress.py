"""The whole flow as a Kubeflow pipeline: plan → prepare → finetune → prune → distill → evaluate → register.

Rewrite the compiled pipeline beside this file: `python -m minitron.pipelines.compress`.
"""

from pathlib import Path

from kfp import dsl

from minitron.components import distill, evaluate, finetune, plan, prepare, prune, register
from minitron.config.pipelines import TOOLS, TRAINER
from minitron.pipelines.tasks import (
    PULL_SECRET,
    TOOLS_CPU,
    TOOLS_MEMORY,
    VOLUME,
    set_gpus,
    set_pod,
    set_resources,
    set_retries,
    write_compiled,
)

COMPILED = Path(__file__).with_suffix(".yaml")


@dsl.pipeline(
    name="compress",
    description="Compress a large language model: prune it in width or depth and distill it back.",
)
def compress(
    tracking_uri: str,
    teacher: str = "",
    corpus: str = "",
    model_name: str = "",
    champion: str = "",
    preset: str = "",
    settings: dict = {},
    experiment: str = "minitron",
    workspace: str = VOLUME,
    workspace_claim: str = "minitron-workspace",
    trainer_image: str = TRAINER,
    tools_image: str = TOOLS,
    image_pull_secret: str = PULL_SECRET,
    credentials_secret: str = "minitron",
) -> str:
    """Compress a large language model: correct the teacher, prune it, distill it back, evaluate, register.

    Returns:
        The version in the MLflow registry.

    Args:
        tracking_uri: MLflow server for the metrics and the model: http(s)://HOST.
        teacher: Model to compress: a directory that every task can read, hf://org/name, gs://bucket/path,
            models:/NAME@alias or ngc://org/team/model:version. Empty: the preset's.
        corpus: Text: a file or directory that every task can read, gs://bucket/path or hf://dataset, or a
            JSON list of several: [{"address": …, "weight": …}, …]. Empty: the preset's.
        model_name: Registered model that gets the new version. Empty: the preset's.
        champion: Model in production to compare with: models:/NAME@champion. Empty: the preset's, or none.
        preset: Shipped preset, such as llama-3.1-minitron-4b-width. Empty: all defaults.
        settings: Settings that win over the preset's, one section per stage: {"distill": {"max_steps": 500}}.
        experiment: MLflow experiment.
        workspace: Where results are kept: a directory on the volume, or gs://bucket/path (work in progress stays on
            the volume).
        workspace_claim: Persistent volume claim that all tasks share; ReadWriteMany if they run on several nodes.
        trainer_image: Container image of prepare, finetune, prune, distill and evaluate.
        tools_image: Container image of plan and register.
        image_pull_secret: Secret for pulling the images, if they are private.
        credentials_secret: Secret with credentials, all optional: HF_TOKEN, NGC_API_KEY, MLFLOW_TRACKING_USERNAME,
            MLFLOW_TRACKING_PASSWORD.
    """
    pod = (image_pull_secret, credentials_secret, workspace_claim)
    common = {"workspace": workspace, "pipeline_run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
    plan_task = plan(
        teacher=teacher, corpus=corpus, model_name=model_name, champion=champion, preset=preset, settings=settings,
        tracking_uri=tracking_uri, experiment=experiment, **common,
    )  # fmt: skip
    set_resources(plan_task, TOOLS_CPU, TOOLS_MEMORY)
    set_pod(plan_task, "plan", tools_image, *pod)  # no retries: a wrong setting must fail within the first minute
    planned = plan_task.outputs
    common |= {"tracking_uri": tracking_uri, "experiment": experiment}
    base = planned["teacher"]
    tasks = {"prepare": prepare(corpus=planned["corpus"], teacher=base, settings=planned["prepare"], **common)}
    dataset = tasks["prepare"].outputs["dataset"]
    tasks["finetune"] = finetune(dataset=dataset, teacher=base, settings=planned["finetune"], **common)
    corrected = tasks["finetune"].outputs["corrected"]
    tasks["prune"] = prune(dataset=dataset, teacher=corrected, settings=planned["prune"], **common)
    pruned = tasks["prune"].outputs["pruned"]
    tasks["distill"] = distill(
        dataset=dataset, teacher=corrected, student=pruned, settings=planned["distill"], **common
    )  # fmt: skip
    student = tasks["distill"].outputs["distilled"]
    tasks["evaluate"] = evaluate(
        dataset=dataset, teacher_before=base, teacher=corrected, pruned=pruned, student=student,
        settings=planned["evaluate"], **common,
    )  # fmt: skip
    evaluation = tasks["evaluate"].outputs["evaluation"]
    tasks["register"] = register(
        dataset=dataset, student=student, evaluation=evaluation, settings=planned["register"], **common
    )  # fmt: skip
    for stage, task in tasks.items():
        set_resources(task, planned[f"{stage}_cpu"], planned[f"{stage}_memory"])
        set_retries(task)
        set_pod(task, stage, tools_image if stage == "register" else trainer_image, *pod)
    for stage in ("finetune", "prune", "distill", "evaluate"):
        set_gpus(tasks[stage], planned[f"{stage}_gpus"], planned["gpu_tolerations"], planned["gpu_node_selector"])
    return tasks["register"].outputs["Output"]


if __name__ == "__main__":
    write_compiled(compress, COMPILED)
