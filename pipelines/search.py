"""The best student under a budget: candidates race, and the winner is compressed like any other student.

plan → prepare → finetune, then three rounds of select → trial (of every candidate) → select, then compress with the
winner's sizes. The first round measures the cuts, the second a short distillation of the better half, the third a
longer one of the best quarter. Their number is fixed, because Kubeflow has no loop whose end a task decides.

Rewrite the compiled pipeline beside this file: `python -m minitron.pipelines.search`.
"""

from pathlib import Path

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Model

from minitron.components import finetune, plan, prepare, select, trial
from minitron.config.pipelines import TOOLS, TRAINER
from minitron.config.settings import RETRIES
from minitron.config.shapes import PARALLEL_TRIALS
from minitron.pipelines.compress import compress
from minitron.pipelines.tasks import (
    CLUSTER,
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


@dsl.pipeline(name="try-candidate", description="Try a candidate of a search in its next round.")
def try_candidate(
    candidate: str,
    dataset: Input[Dataset],
    teacher: Input[Model],
    planned: Input[Artifact],
    cpu: str,
    memory: str,
    gpus: str,
    gpu_tolerations: list,
    gpu_node_selector: dict,
    tracking_uri: str,
    experiment: str,
    workspace: str,
    workspace_claim: str,
    trainer_image: str,
    image_pull_secret: str,
    credentials_secret: str,
) -> str:
    """Try a candidate: a pipeline of its own, because Kubeflow's compiler hands no limits down into a loop.

    Settings come in the artifact `planned`: in a loop kfp.local takes the item for every parameter that is another
    task's output. What it takes it for here, it ignores.
    """
    task = trial(
        candidate=candidate, dataset=dataset, teacher=teacher, planned=planned,
        tracking_uri=tracking_uri, experiment=experiment, workspace=workspace,
        pipeline_run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
    )  # fmt: skip
    set_resources(task, cpu, memory)
    set_retries(task)
    set_pod(task, "trial", trainer_image, image_pull_secret, credentials_secret, workspace_claim)
    task.set_env_variable(RETRIES, str(CLUSTER.retries))  # the last attempt notes that the others were killed
    set_gpus(task, gpus, gpu_tolerations, gpu_node_selector)
    return task.outputs["Output"]


@dsl.pipeline(
    name="search",
    description="Find the best student under a budget: race candidates, and compress with the winner's sizes.",
)
def search(
    tracking_uri: str,
    teacher: str = "",
    corpus: str = "",
    model_name: str = "",
    champion: str = "",
    preset: str = "",
    settings: dict = {},
    stop_after_race: bool = False,
    experiment: str = "minitron",
    workspace: str = VOLUME,
    workspace_claim: str = "minitron-workspace",
    trainer_image: str = TRAINER,
    tools_image: str = TOOLS,
    image_pull_secret: str = PULL_SECRET,
    credentials_secret: str = "minitron",
):
    """Find the best student under a budget: race candidates, and compress with the winner's sizes.

    Args:
        tracking_uri: MLflow server for the metrics and the model: http(s)://HOST.
        teacher: Model to compress: a directory that every task can read, hf://org/name, gs://bucket/path,
            models:/NAME@alias or ngc://org/team/model:version. Empty: the preset's.
        corpus: Text: a file or directory that every task can read, gs://bucket/path or hf://dataset, or a
            JSON list of several: [{"address": …, "weight": …}, …]. Empty: the preset's.
        model_name: Registered model that gets the new version. Empty: the preset's.
        champion: Model in production to compare with: models:/NAME@champion. Empty: the preset's, or none.
        preset: Shipped preset, such as llama-3.1-minitron-4b-width. Empty: all defaults.
        settings: Settings that win over the preset's, with the budget: {"search": {"parameters": 4500000000}}.
        stop_after_race: End with the report of the race. Run it again without this to continue with the winner: the
            race is not repeated.
        experiment: MLflow experiment.
        workspace: Where results are kept: a directory on the volume, or gs://bucket/path (work in progress stays on
            the volume).
        workspace_claim: Persistent volume claim that all tasks share; ReadWriteMany if they run on several nodes.
        trainer_image: Container image of all other tasks.
        tools_image: Container image of plan and register.
        image_pull_secret: Secret for pulling the images, if they are private.
        credentials_secret: Secret with credentials, all optional: HF_TOKEN, NGC_API_KEY, MLFLOW_TRACKING_USERNAME,
            MLFLOW_TRACKING_PASSWORD.
    """
    pod = (image_pull_secret, credentials_secret, workspace_claim)
    where = {"tracking_uri": tracking_uri, "experiment": experiment, "workspace": workspace}
    form = {"teacher": teacher, "corpus": corpus, "model_name": model_name, "champion": champion, "preset": preset}
    run = where | {"pipeline_run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
    plan_task = plan(**form, settings=settings, needs_budget=True, **run)
    set_resources(plan_task, TOOLS_CPU, TOOLS_MEMORY)
    set_pod(plan_task, "plan", tools_image, *pod)  # no retries: a wrong setting must fail within the first minute
    planned = plan_task.outputs
    nodes = {name: planned[name] for name in ("gpu_tolerations", "gpu_node_selector")}
    rules = {"planned": planned["planned"], "document": settings, **run}

    selections = [select(**rules)]
    base, data = planned["teacher"], {"corpus": planned["corpus"], "settings": planned["prepare"]}
    tasks = {"prepare": prepare(teacher=base, **data, **run).after(selections[0])}
    dataset = tasks["prepare"].outputs["dataset"]
    tasks["finetune"] = finetune(dataset=dataset, teacher=base, settings=planned["finetune"], **run)
    for stage, task in tasks.items():
        set_resources(task, planned[f"{stage}_cpu"], planned[f"{stage}_memory"])
        set_retries(task)
        set_pod(task, stage, trainer_image, *pod)
    set_gpus(tasks["finetune"], planned["finetune_gpus"], *nodes.values())
    for _ in range(3):
        with dsl.ParallelFor(selections[-1].outputs["Output"], parallelism=PARALLEL_TRIALS) as candidate:
            tried = try_candidate(
                candidate=candidate, dataset=dataset, teacher=tasks["finetune"].outputs["corrected"],
                planned=planned["planned"], cpu=planned["trial_cpu"], memory=planned["trial_memory"],
                gpus=planned["trial_gpus"], **nodes, **where, workspace_claim=workspace_claim,
                trainer_image=trainer_image, image_pull_secret=image_pull_secret,
                credentials_secret=credentials_secret,
            )  # fmt: skip
        results = dsl.Collected(tried.output)
        selections.append(select(**rules, results=results, rest=selections[-1].outputs["rest"]))
    for task in selections:
        set_resources(task, TOOLS_CPU, TOOLS_MEMORY)
        set_retries(task)
        set_pod(task, "select", trainer_image, *pod)
    set_gpus(selections[0], planned["select_gpus"], *nodes.values())  # it may measure latency
    with dsl.If(stop_after_race == False):  # noqa: E712  (KFP's condition)
        compress(
            **form, settings=selections[-1].outputs["settings"], **where, workspace_claim=workspace_claim,
            trainer_image=trainer_image, tools_image=tools_image, image_pull_secret=image_pull_secret,
            credentials_secret=credentials_secret,
        )  # fmt: skip


if __name__ == "__main__":
    write_compiled(search, COMPILED)
