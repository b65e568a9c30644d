"""The compiled pipelines that ship are what their sources say, and compiling them is light."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron.config.pipelines import TRAINER, apply_cluster_config, compiled_pipeline, list_dags
from minitron.config.settings import RETRIES, ClusterConfig
from minitron.config.shapes import PARALLEL_TRIALS
from minitron.pipelines.tasks import write_compiled
from tests.pipelines import COMPILED, compress, promote, retrain, search

STAGES = ["prepare", "finetune", "prune", "distill", "evaluate", "register"]
GPU_STAGES = ["finetune", "prune", "distill", "evaluate"]


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(COMPILED.read_text()))


@pytest.mark.parametrize("pipeline", [compress, promote, retrain, search], ids=lambda pipeline: pipeline.name)
def test_the_golden_is_what_the_source_compiles_to(pipeline: Any, tmp_path: Path) -> None:
    write_compiled(pipeline, tmp_path / "compiled.yaml")
    golden = COMPILED.with_name(f"{pipeline.name}.yaml")
    assert (tmp_path / "compiled.yaml").read_text() == golden.read_text(), "run 'make compile'"


def test_retraining_is_compress_between_decisions_with_an_end() -> None:
    specification, platform = compiled_pipeline("retrain")
    tasks = [dag["dag"]["tasks"] for dag in list_dags(specification)]
    assert {name for found in tasks for name in found} == {
        *STAGES, "plan", "resolve", "promote", "conclude", "compress", "exit-handler-1", "condition-2",
    }  # fmt: skip
    condition = next(found["condition-2"]["triggerPolicy"]["condition"] for found in tasks if "condition-2" in found)
    assert condition == "inputs.parameter_values['pipelinechannel--resolve-Output'] == true"
    settings = ClusterConfig(retries=7, timeout_hours=2, ttl_hours=3, labels={"team": "llm"})
    apply_cluster_config([specification, platform], settings, (2, 17, 0))
    executors = specification["deploymentSpec"]["executors"]
    executed = [task for found in tasks for name, task in found.items() if f"exec-{name}" in executors]
    retried = [task for task in executed if "retryPolicy" in task]
    assert len(executed) == 10 and len(retried) == 9, "all but plan, which says at once what is wrong"
    assert all(task["retryPolicy"]["maxRetryCount"] == 7 for task in retried)
    kubernetes = platform["platforms"]["kubernetes"]
    for executor in kubernetes["deploymentSpec"]["executors"].values():
        assert executor["activeDeadlineSeconds"] == "7200" and executor["podMetadata"]["labels"]["team"] == "llm"


@pytest.mark.parametrize("pipeline", ["retrain", "search"])
def test_whatever_a_task_names_is_handed_down_to_it(pipeline: str) -> None:
    """Kubeflow's compiler forgets, in a condition or loop, what only a resource limit names; its backend fails."""
    specification, platform = compiled_pipeline(pipeline)
    for dag in list_dags(specification):
        given = dag["inputDefinitions"]["parameters"].keys()
        for task in dag["dag"]["tasks"].values():
            sources = task.get("inputs", {}).get("parameters", {}).values()
            assert {s["componentInputParameter"] for s in sources if "componentInputParameter" in s} <= given
    known = {name for dag in list_dags(specification) for name in dag["inputDefinitions"]["parameters"]}
    named = re.findall(r"componentInputParameter: (\S+)", yaml.safe_dump(platform))
    assert named and set(named) <= known


def test_a_search_is_three_rounds_and_compress() -> None:
    specification, platform = compiled_pipeline("search")
    tasks = specification["root"]["dag"]["tasks"]
    loops = [f"for-loop-{number}" for number in (1, 2, 3)]
    assert {*tasks} == {
        "plan",
        "prepare",
        "finetune",
        "select",
        "select-2",
        "select-3",
        "select-4",
        *loops,
        "condition-4",
    }
    assert {tasks[name]["iteratorPolicy"]["parallelismLimit"] for name in loops} == {PARALLEL_TRIALS}
    assert tasks["condition-4"]["triggerPolicy"]["condition"] == (
        "inputs.parameter_values['pipelinechannel--stop_after_race'] == false"
    )
    for number, loop in enumerate(loops, 2):
        source = {"outputParameterKey": "pipelinechannel--try-candidate", "producerTask": loop}
        found = tasks[f"select-{number}"]["inputs"]["parameters"]["results"]["taskOutputParameter"]
        assert found["producerTask"] == loop and found["outputParameterKey"].startswith(source["outputParameterKey"])
    executors = specification["deploymentSpec"]["executors"]
    for name in ("exec-trial", "exec-trial-2", "exec-trial-3"):
        resources = executors[name]["container"]["resources"]
        limits = (
            resources["resourceCpuLimit"],
            resources["resourceMemoryLimit"],
            resources["accelerator"]["resourceCount"],
        )
        assert limits == tuple(
            f"{{{{$.inputs.parameters['pipelinechannel--{key}']}}}}" for key in ("cpu", "memory", "gpus")
        )
        pod = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][name]
        assert {"tolerations", "nodeSelector", "pvcMount", "secretAsEnv", "emptyDirMounts"} <= pod.keys()
        assert pod["podMetadata"]["labels"]["app.kubernetes.io/component"] == "trial"
    for component in specification["components"].values():
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            assert name != "trial" or task["retryPolicy"]["maxRetryCount"] == 3


def test_the_flow(documents: list[dict[str, Any]]) -> None:
    tasks = documents[0]["root"]["dag"]["tasks"]
    dependencies = {name: set(task.get("dependentTasks", [])) for name, task in tasks.items()}
    assert dependencies == {
        "plan": set(),
        "prepare": {"plan"},
        "finetune": {"plan", "prepare"},
        "prune": {"plan", "prepare", "finetune"},
        "distill": {"plan", "prepare", "finetune", "prune"},
        "evaluate": {"plan", "prepare", "finetune", "prune", "distill"},
        "register": {"plan", "prepare", "distill", "evaluate"},
    }


def test_every_task_has_its_image_gpus_memory_retries_and_no_kfp_cache(documents: list[dict[str, Any]]) -> None:
    """All limits are text from the plan: Kubeflow's driver reads an accelerator count with GetStringValue()."""
    specification, platform = documents
    outputs = specification["components"]["comp-plan"]["outputDefinitions"]["parameters"]
    assert specification["root"]["inputDefinitions"]["parameters"]["trainer_image"]["defaultValue"] == TRAINER
    for stage in STAGES:
        resources = specification["deploymentSpec"]["executors"][f"exec-{stage}"]["container"]["resources"]
        task = specification["root"]["dag"]["tasks"][stage]
        limits = {"cpu": resources["resourceCpuLimit"], "memory": resources["resourceMemoryLimit"]}
        if stage in GPU_STAGES:
            assert resources["accelerator"]["resourceType"] == "nvidia.com/gpu"
            limits["gpus"] = resources["accelerator"]["resourceCount"]
        for name, limit in limits.items():
            channel = f"pipelinechannel--plan-{stage}_{name}"
            assert limit == f"{{{{$.inputs.parameters['{channel}']}}}}"
            source = {"outputParameterKey": f"{stage}_{name}", "producerTask": "plan"}
            assert task["inputs"]["parameters"][channel] == {"taskOutputParameter": source}
            assert outputs[f"{stage}_{name}"] == {"parameterType": "STRING"}
        assert ("accelerator" in resources) == (stage in GPU_STAGES)
        assert task["retryPolicy"] == {
            "maxRetryCount": 3, "backoffDuration": "120s", "backoffFactor": 1.0, "backoffMaxDuration": "2592000s",
        }  # fmt: skip
        assert not task["cachingOptions"].get("enableCache", False)
        settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{stage}"]
        mounts = [mount | {"sizeLimit": ""} for mount in settings.get("emptyDirMounts", [])]
        memory = {"medium": "Memory", "mountPath": "/dev/shm", "volumeName": "shared-memory", "sizeLimit": ""}
        assert mounts == ([memory] if stage in GPU_STAGES else [])


def test_every_task_has_volume_credentials_labels_and_an_end(documents: list[dict[str, Any]]) -> None:
    kubernetes = documents[1]["platforms"]["kubernetes"]
    assert "pipelineConfig" not in kubernetes, "its fields are not those of 2.15, which would drop the whole document"

    def parameter(name: str) -> dict[str, str]:
        return {"componentInputParameter": name}

    def planned(name: str) -> dict[str, Any]:
        return {"taskOutputParameter": {"outputParameterKey": name, "producerTask": "plan"}}

    for stage in ["plan", *STAGES]:
        settings = kubernetes["deploymentSpec"]["executors"][f"exec-{stage}"]
        (volume,) = settings["pvcMount"]
        assert volume["mountPath"] == "/workspace" and volume["pvcNameParameter"] == parameter("workspace_claim")
        (secret,) = settings["secretAsEnv"]
        assert secret["optional"] and secret["secretNameParameter"] == parameter("credentials_secret")
        assert settings["imagePullSecret"] == [{"secretNameParameter": parameter("image_pull_secret")}]
        assert settings["podMetadata"]["labels"]["app.kubernetes.io/component"] == stage
        assert int(settings["activeDeadlineSeconds"]) == 168 * 3600
        on_gpu_nodes = stage in GPU_STAGES
        assert ("tolerations" in settings, "nodeSelector" in settings) == (on_gpu_nodes, on_gpu_nodes)
        if on_gpu_nodes:
            assert settings["tolerations"] == [{"tolerationJson": planned("gpu_tolerations")}]
            assert settings["nodeSelector"] == {"nodeSelectorJson": planned("gpu_node_selector")}


@pytest.mark.parametrize("pipeline", ["compress", "promote", "retrain", "search"])
def test_what_a_task_fetches_lies_in_the_volume(pipeline: str) -> None:
    executors = compiled_pipeline(pipeline)[0]["deploymentSpec"]["executors"].values()
    for executor in executors:
        places = {entry["name"]: entry["value"] for entry in executor["container"]["env"] if entry["name"] != RETRIES}
        assert places == {"MINITRON_CACHE": "/workspace/cache", "HF_HOME": "/workspace/cache/huggingface"}


def test_a_trial_knows_its_retries() -> None:
    """The last attempt at a trial notes that the others were killed, so that the race goes on."""
    documents = compiled_pipeline("search")
    for retries in (ClusterConfig().retries, 7):
        apply_cluster_config(documents, ClusterConfig(retries=retries), (2, 17, 0))
        executors = documents[0]["deploymentSpec"]["executors"]
        known = {
            (re.sub(r"-\d$", "", name), entry["value"])
            for name, executor in executors.items()
            for entry in executor["container"]["env"]
            if entry["name"] == RETRIES
        }
        assert known == {("exec-trial", str(retries))}


def test_artifacts_are_typed(documents: list[dict[str, Any]]) -> None:
    kinds = {
        stage: {
            name: artifact["artifactType"]["schemaTitle"]
            for name, artifact in documents[0]["components"][f"comp-{stage}"]["outputDefinitions"]["artifacts"].items()
        }
        for stage in STAGES
    }
    assert kinds == {
        "prepare": {"dataset": "system.Dataset", "metrics": "system.Metrics"},
        "finetune": {"corrected": "system.Model", "metrics": "system.Metrics"},
        "prune": {"pruned": "system.Model", "metrics": "system.Metrics"},
        "distill": {"distilled": "system.Model", "metrics": "system.Metrics"},
        "evaluate": {"evaluation": "system.Artifact", "report": "system.HTML", "metrics": "system.Metrics"},
        "register": {"registered": "system.Artifact", "metrics": "system.Metrics"},
    }


def test_compiling_imports_no_heavy_package() -> None:
    """In a process of its own: this one has imported them."""
    program = (
        "import sys, minitron.pipelines.compress\n"
        "heavy = {'torch', 'transformers', 'nemo', 'mlflow'} & {name.partition('.')[0] for name in sys.modules}\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(("pipeline", "most"), [("compress", 900), ("retrain", 1400), ("search", 2450)])
def test_the_compiled_pipeline_is_short_enough_to_read(pipeline: str, most: int) -> None:
    assert len(COMPILED.with_name(f"{pipeline}.yaml").read_text().splitlines()) < most
