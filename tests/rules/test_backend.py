"""The compiled pipelines keep the rules of Kubeflow's backend, from the oldest version that runs them.

Each rule is a function that yields what breaks it. It names the file that it comes from, of kubeflow/pipelines unless
another project is named, as it is in 2.15.0 and in 2.17.0. Each finds its breach in a pipeline that was changed.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import kfp
import pytest
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import Message
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec, PlatformSpec

from minitron.config.document import read_preset
from minitron.config.pipelines import apply_cluster_config, compiled_pipeline, list_dags
from minitron.config.settings import ClusterConfig

Documents = list[dict[str, Any]]

PIPELINES = ("compress", "retrain", "promote", "search")

NEWER_FIELDS = {
    "PipelineConfig": {
        "resource_ttl_on_completion", "resource_ttl_on_success", "resource_ttl_on_failure", "active_deadline_seconds",
    },
    "ParameterSpec": {"literals"},
    "KubernetesExecutorConfig": {"security_context"},
    "PvcMount": {"sub_path"},
    "CreatePvc": {"data_source"},
}  # fmt: skip
"""Fields that 2.15.0 does not know: what api/v2alpha1/pipeline_spec.proto and kubernetes_platform/proto/
kubernetes_executor_config.proto of 2.17.0 have more, by message."""

PLACEHOLDERS = {
    "pipeline_job_name", "pipeline_job_resource_name", "pipeline_job_uuid", "pipeline_task_name", "pipeline_task_uuid",
}  # fmt: skip
"""What a constant may stand for: resolveInputParameter in backend/src/v2/driver/resolve.go of 2.15.0."""

MAX_ARGUMENT = 128 << 10
"""Bytes. Linux: MAX_ARG_STRLEN, of one argument of a process."""

MAX_WORKFLOW = 1 << 20
"""Bytes. etcd refuses requests of 1.5 MiB; the workflow's own status grows beside its specification."""


def list_tasks(specification: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, dict[str, Any]]]:
    """Yield each task with its name, and the component that it is in."""
    for dag in list_dags(specification):
        yield from ((dag, name, task) for name, task in dag["dag"]["tasks"].items())


def list_executed(documents: Documents) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any], Any]]:
    """Yield for each task with a container: the component that it is in, the task, its container and its pod."""
    specification, platform = documents
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for dag, _, task in list_tasks(specification):
        if label := specification["components"][task["componentRef"]["name"]].get("executorLabel"):
            yield dag, task, specification["deploymentSpec"]["executors"][label]["container"], pods[label]


def find_kind(specification: dict[str, Any], dag: dict[str, Any], task: dict[str, Any], source: Any) -> str:
    """Return the type of the parameter that a source names, or why the driver does not find it."""
    match source:
        case {"componentInputParameter": name}:
            return dag.get("inputDefinitions", {}).get("parameters", {}).get(name, {}).get("parameterType", "missing")
        case {"taskOutputParameter": {"producerTask": producer, "outputParameterKey": key}}:
            if producer not in task.get("dependentTasks", []):
                return "not computed before"
            component = specification["components"][dag["dag"]["tasks"][producer]["componentRef"]["name"]]
            return component["outputDefinitions"]["parameters"].get(key, {}).get("parameterType", "missing")
        case {"runtimeValue": {"constant": str()}}:
            return "STRING"
        case {"runtimeValue": {"constant": bool()}}:
            return "BOOLEAN"
        case {"taskFinalStatus": {"producerTask": producer}} if producer == task["dependentTasks"][0]:
            return "TASK_FINAL_STATUS"
    return "missing"


def dropped_fields(documents: Documents) -> Iterator[str]:
    """A field that the server does not know drops the whole platform document, without a word.

    backend/src/apiserver/template/v2_template.go: IsPlatformSpecWithKubernetesConfig.
    """
    specification, platform = documents
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    models = [(PipelineSpec, specification), (PlatformSpec, platform)]
    for model, content in [*models, *((KubernetesExecutorConfig, executor) for executor in executors)]:
        try:
            yield from find_newer_fields(ParseDict(content, model()))
        except ParseError as error:
            yield str(error)


def find_newer_fields(message: Message) -> Iterator[str]:
    """Yield the fields of a message, at any depth, that 2.15.0 does not know."""
    for field, value in message.ListFields():
        if field.name in NEWER_FIELDS.get(message.DESCRIPTOR.name, ()):
            yield f"{message.DESCRIPTOR.name}.{field.name} is newer than 2.15.0"
        is_map = field.message_type and field.message_type.GetOptions().map_entry
        for part in value.values() if is_map else value if field.is_repeated else [value]:
            if isinstance(part, Message):
                yield from find_newer_fields(part)


def lost_limits(documents: Documents) -> Iterator[str]:
    """A limit or image by parameter is read as text; of any other type the driver makes "", and skips the limit.

    backend/src/v2/driver/resolve.go: resolvePodSpecInputRuntimeParameter; driver.go: initPodSpecPatch.
    """
    for dag, task, container, _ in list_executed(documents):
        resources = container.get("resources", {})
        values = {"image": container["image"], **resources, **resources.get("accelerator", {})}
        for field, value in values.items():
            if match := re.search(r"\$.inputs.parameters\['(.+?)'\]", str(value)):
                source = task["inputs"]["parameters"].get(match[1])
                if field != "accelerator" and (kind := find_kind(documents[0], dag, task, source)) != "STRING":
                    yield f"{task['taskInfo']['name']}: {field} is {kind}, not STRING"


def unresolved_pods(documents: Documents) -> Iterator[str]:
    """The driver fails on a parameter of a pod that its DAG has not, or that is of another type.

    backend/src/v2/driver/k8s.go: extendPodSpecPatch, makeVolumeMountPatch; resolve.go: resolveK8sJsonParameter.
    """
    for dag, task, _, pod in list_executed(documents):
        named = [(entry.get("secretNameParameter"), {"STRING"}) for entry in pod.get("secretAsEnv", [])]
        named += [(entry.get("secretNameParameter"), {"STRING"}) for entry in pod.get("imagePullSecret", [])]
        named += [(entry.get("pvcNameParameter"), {"STRING"}) for entry in pod.get("pvcMount", [])]
        named += [(entry.get("tolerationJson"), {"LIST", "STRUCT"}) for entry in pod.get("tolerations", [])]
        named += [(pod[key].get("nodeSelectorJson"), {"STRUCT"}) for key in ("nodeSelector",) if key in pod]
        for source, kinds in named:
            if (kind := find_kind(documents[0], dag, task, source)) not in kinds:
                yield f"{task['taskInfo']['name']}: {source} is {kind}, not {' or '.join(sorted(kinds))}"


def unresolved_inputs(documents: Documents) -> Iterator[str]:
    """A task's inputs come from its DAG or from a task that it waits for, and a constant stands for what 2.15.0 knows.

    backend/src/v2/driver/resolve.go: resolveInputParameter.
    """
    for dag, name, task in list_tasks(documents[0]):
        for parameter, source in task.get("inputs", {}).get("parameters", {}).items():
            if (kind := find_kind(documents[0], dag, task, source)) in ("missing", "not computed before"):
                yield f"{name}: {parameter} is {kind}"
            constant = str(source.get("runtimeValue", {}).get("constant", ""))
            if (match := re.search(r"\{\{\$\.(\w+)\}\}", constant)) and match[1] not in PLACEHOLDERS:
                yield f"{name}: {parameter} stands for {match[1]}, which 2.15.0 does not know"


def oversized(documents: Documents) -> Iterator[str]:
    """Each component is an argument of the driver, and all are in the workflow.

    backend/src/v2/compiler/argocompiler/argo.go: saveComponentSpec; container.go and dag.go: "--component", "--task".
    """
    specification, _ = documents
    parts = {**specification["components"], "root": specification["root"]}
    parts |= {f"task {name}": task for _, name, task in list_tasks(specification)}
    for name, part in parts.items():
        if (size := len(json.dumps(part))) > MAX_ARGUMENT:
            yield f"{name}: {size} bytes in one argument"
    if (size := 2 * sum(len(json.dumps(document)) for document in documents)) > MAX_WORKFLOW:
        yield f"the workflow: about {size} bytes"


def bad_names(documents: Documents) -> Iterator[str]:
    """Names are those of Kubernetes objects, tasks those of Argo, labels those of pods.

    backend/src/apiserver/template/v2_template.go: NewV2SpecTemplate; argo-workflows, workflow/validate/validate.go:
    workflowFieldNameFmt; Kubernetes' rules of labels.
    """
    specification, platform = documents
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?", specification["pipelineInfo"]["name"]):
        yield f"pipeline {specification['pipelineInfo']['name']}"
    for name in {name for _, name, _ in list_tasks(specification)}:
        if not re.fullmatch(r"[a-zA-Z0-9]([-a-zA-Z0-9]{0,61}[a-zA-Z0-9])?", name):
            yield f"task {name}"
    for executor in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        for key, value in executor["podMetadata"]["labels"].items():
            if not re.fullmatch(r"([\w.-]{1,253}/)?[\w.-]{1,63}", key) or not re.fullmatch(r"[\w.-]{0,63}", value):
                yield f"label {key}: {value}"


def unreachable_retries(documents: Documents) -> Iterator[str]:
    """Only tasks with a container are tried again, and all attempts must start before maxDuration has passed.

    backend/src/v2/compiler/argocompiler/container.go: getTaskRetryStrategyFromInput; argo-workflows, workflow/
    controller/operator.go: processNodeRetries (a pause is duration x factor^n, without a cap).
    """
    executed = [task for _, task, _, _ in list_executed(documents)]
    for _, name, task in list_tasks(documents[0]):
        if "retryPolicy" not in task:
            continue
        policy = task["retryPolicy"]
        if task not in executed or not {"backoffDuration", "backoffMaxDuration"} <= policy.keys():
            yield f"{name}: its retries are no part of the workflow, or never end"
            continue
        pause, longest = (int(policy[key].removesuffix("s")) for key in ("backoffDuration", "backoffMaxDuration"))
        pauses = sum(pause * policy["backoffFactor"] ** attempt for attempt in range(policy["maxRetryCount"]))
        if pauses > longest / 2:
            yield f"{name}: {policy['maxRetryCount']} retries pause for {pauses} of {longest} seconds"


def wrong_defaults(documents: Documents) -> Iterator[str]:
    """A default has its parameter's type, and a parameter without one is optional or must be given.

    backend/src/apiserver/template/v2_template.go: validatePipelineJobInputs.
    """
    numbers = dict.fromkeys(("NUMBER_INTEGER", "NUMBER_DOUBLE"), (int, float))
    kinds = numbers | {"STRING": str, "BOOLEAN": bool, "LIST": list, "STRUCT": dict}
    for dag in list_dags(documents[0]):
        for name, entry in dag.get("inputDefinitions", {}).get("parameters", {}).items():
            if "defaultValue" in entry and not isinstance(entry["defaultValue"], kinds[entry["parameterType"]]):
                yield f"{name}: {entry['defaultValue']!r} is not {entry['parameterType']}"


Rule = Callable[[Documents], Iterator[str]]
RULES: tuple[Rule, ...] = (
    dropped_fields, lost_limits, unresolved_pods, unresolved_inputs, oversized, bad_names, unreachable_retries,
    wrong_defaults,
)  # fmt: skip


def find_breaches(documents: Documents) -> list[str]:
    """Return the rules that a pipeline breaks, with what breaks them."""
    return [f"{rule.__name__}: {breach}" for rule in RULES for breach in rule(documents)]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_compiled_pipelines_keep_the_rules(pipeline: str) -> None:
    assert find_breaches(compiled_pipeline(pipeline)) == []


def test_the_presets_of_a_cluster_keep_the_rules() -> None:
    """With most retries: those of spot nodes."""
    cluster = ClusterConfig(**read_preset("gke-spot")["cluster"])
    assert cluster.retries == 20
    for pipeline in PIPELINES:
        documents = apply_cluster_config(compiled_pipeline(pipeline), cluster, (2, 15, 0))
        assert find_breaches(documents) == []


def test_the_newer_fields_are_those_of_the_kfp_that_is_installed() -> None:
    assert kfp.__version__.startswith("2.17."), "compare the protocols again: NEWER_FIELDS lists what 2.17.0 has more"


def set_value(documents: Documents, path: str, value: Any) -> None:
    """Change the value at a path of keys."""
    *parents, last = path.split("/")
    content: Any = documents[0] if parents[0] != "platforms" else documents[1]
    for part in parents:
        content = content[int(part) if part.isdigit() else part]
    content[last] = value


OUTPUTS = "components/comp-plan/outputDefinitions/parameters"
INPUTS = "root/inputDefinitions/parameters"
DISTILL = "root/dag/tasks/distill"
POD = "platforms/kubernetes/deploymentSpec/executors/exec-distill"
BREACHES: list[tuple[Rule, str, Any]] = [
    (dropped_fields, "platforms/kubernetes/pipelineConfig", {"resourceTtlOnCompletion": 3600}),
    (dropped_fields, "platforms/kubernetes/pipelineConfig", {"resourceTtl": 3600}),
    (dropped_fields, f"{POD}/securityContext", {"runAsUser": 1000}),
    (dropped_fields, f"{POD}/pvcMount/0/subPath", "results"),
    (dropped_fields, f"{POD}/gpus", 8),
    (dropped_fields, f"{INPUTS}/preset/literals", ["tiny"]),
    (lost_limits, f"{OUTPUTS}/distill_gpus", {"parameterType": "NUMBER_INTEGER"}),
    (lost_limits, f"{OUTPUTS}/distill_memory", {"parameterType": "NUMBER_DOUBLE"}),
    (lost_limits, f"{INPUTS}/trainer_image", {"parameterType": "STRUCT"}),
    (unresolved_pods, f"{INPUTS}/workspace_claim", {"parameterType": "NUMBER_INTEGER"}),
    (unresolved_pods, f"{POD}/secretAsEnv/0/secretNameParameter", {"componentInputParameter": "secret"}),
    (unresolved_pods, f"{OUTPUTS}/gpu_tolerations", {"parameterType": "STRING"}),
    (unresolved_pods, f"{OUTPUTS}/gpu_node_selector", {"parameterType": "LIST"}),
    (unresolved_inputs, f"{DISTILL}/dependentTasks", ["prune"]),
    (unresolved_inputs, f"{DISTILL}/inputs/parameters/workspace", {"componentInputParameter": "place"}),
    (
        unresolved_inputs,
        f"{DISTILL}/inputs/parameters/workspace",
        {"runtimeValue": {"constant": "{{$.pipeline_job_create_time_utc}}"}},
    ),
    (oversized, f"{INPUTS}/settings/description", "x" * MAX_ARGUMENT),
    (unresolved_inputs, f"{DISTILL}/inputs/parameters/workspace", {"taskFinalStatus": {"producerTask": "evaluate"}}),
    (bad_names, "pipelineInfo/name", "Compress"),
    (bad_names, "pipelineInfo/name", "x" * 60),
    (bad_names, "root/dag/tasks/prune_width", {"componentRef": {"name": "comp-prune"}}),
    (bad_names, f"{POD}/podMetadata/labels/team", "large language models"),
    (unreachable_retries, f"{DISTILL}/retryPolicy/backoffFactor", 200.0),
    (unreachable_retries, f"{DISTILL}/retryPolicy", {"maxRetryCount": 3}),
    (wrong_defaults, f"{INPUTS}/settings/defaultValue", "{}"),
]


@pytest.mark.parametrize(("rule", "path", "value"), BREACHES)
def test_each_rule_finds_its_breach(rule: Rule, path: str, value: Any) -> None:
    documents = copy.deepcopy(compiled_pipeline("compress"))
    set_value(documents, path, value)
    assert list(rule(documents)), f"{rule.__name__} passes over {path}"


def test_every_rule_has_a_breach() -> None:
    assert {rule for rule, _, _ in BREACHES} == set(RULES)


def test_a_doubling_pause_does_not_reach_the_retries_of_spot_nodes() -> None:
    """60 s, doubled 20 times, is two years."""
    documents = apply_cluster_config(compiled_pipeline("compress"), ClusterConfig(retries=20), None)
    for task in documents[0]["root"]["dag"]["tasks"].values():
        if "retryPolicy" in task:
            task["retryPolicy"] |= {"backoffDuration": "60s", "backoffFactor": 2.0}
    assert len(list(unreachable_retries(documents))) == 6
