"""Compiled pipelines, and the arguments of a run, checked before it starts."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from minitron import __version__
from minitron.config import addresses
from minitron.config.document import (
    CLUSTER,
    SAMPLES,
    Plan,
    find_key_faults,
    known_keys,
    merge,
    nest_sections,
    pipelines_directory,
    read_plan,
    read_preset,
)
from minitron.config.fields import Fault, read_scalar
from minitron.config.parse import SectionError, suggest_name, validate_section
from minitron.config.resources import Models, PodRequest, request_pod, request_trial
from minitron.config.settings import QUEUE_LABEL, TRAIN_JOB_QUEUE_LABEL, ClusterConfig, TrainingSettings
from minitron.config.stages import STAGES, PlanConfig, PromoteConfig
from minitron.errors import ConfigError

_KINDS: dict[str, TypeAdapter[Any]] = {
    "STRING": TypeAdapter(str, config=ConfigDict(coerce_numbers_to_str=True)),
    "NUMBER_INTEGER": TypeAdapter(int),
    "NUMBER_DOUBLE": TypeAdapter(float),
    "BOOLEAN": TypeAdapter(bool),
    "LIST": TypeAdapter(list),
    "STRUCT": TypeAdapter(dict),
}
"""Kubeflow's parameter types."""

SETTINGS_PARAMETER = "settings"
"""The parameter of a pipeline that takes a settings document."""

CORPUS_PARAMETER = "corpus"
"""The parameter of a pipeline that takes an address, or a list of corpora in JSON."""

STOP_PARAMETER = "stop_after_race"
"""The parameter that only the pipeline search has; its document needs a budget."""

_FLOW = ("resolve", "plan", "select", "prepare", "finetune", "trial", *STAGES, "promote", "conclude")
"""All tasks of the pipelines, in the order in which they run."""

REGISTRY_VARIABLE = "MINITRON_REGISTRY"
"""Environment variable that says where the images are: registry.example/path."""

_IMAGES = ("trainer_image", "tools_image")

_TTL_SINCE = (2, 17)
"""The first Kubeflow Pipelines that knows _TTLS; an older one would drop the whole platform document."""

_TTLS = ("resourceTtlOnCompletion", "resourceTtlOnSuccess", "resourceTtlOnFailure")

_CLUSTER_NAMES = (
    dict.fromkeys(("credentials_secret", "image_pull_secret"), r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
    | {"workspace_claim": r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"}
    | dict.fromkeys((*_IMAGES, "workspace"), r"\S+")
    | {"experiment": r"\S(.{0,126}\S)?"}
)
"""Parameters that may not be empty, and their patterns: names of objects in Kubernetes, or any text.

An experiment's name is a VARCHAR(128) (backend/src/apiserver/model/experiment.go).

Kubeflow's driver names the volume in the pod after the claim (backend/src/v2/driver/k8s.go: makeVolumeMountPatch). A
volume's name must be shorter than a claim's, and without dots.
"""


@dataclass(frozen=True)
class Request:
    """Presets and `--set` values, grouped by their targets.

    Attributes:
        arguments: values of the pipeline's parameters.
        document: the flat settings document.
        cluster: settings that `submit` writes into the compiled pipeline.
        samples: name of the inputs that come from packages; None: you give your own.
    """

    arguments: dict[str, Any]
    document: dict[str, Any]
    cluster: ClusterConfig
    samples: str | None

    def with_defaults(self, defaults: Mapping[str, Any], parameters: Mapping[str, Any]) -> "Request":
        """Return the request with default values, by key of a flat document, for its unset keys."""
        arguments = {key: value for key, value in defaults.items() if key in parameters}
        document = {key: value for key, value in defaults.items() if key not in parameters}
        return replace(self, arguments=arguments | self.arguments, document=document | self.document)


def compiled_pipeline(name: str) -> list[dict[str, Any]]:
    """Return the documents of a pipeline's checked-in YAML: the specification and the platform's.

    The defaults of the images are where MINITRON_REGISTRY says.

    Raises:
        ConfigError: there is no such pipeline.
    """
    path = pipelines_directory() / f"{name}.yaml"
    if not path.is_file():
        known = [file.stem for file in pipelines_directory().glob("*.yaml")]
        raise ConfigError(f"pipeline {name}: unknown; {suggest_name(name, known)}")
    documents = list(yaml.load_all(path.read_text(), yaml.CSafeLoader))  # ten times as fast as the Python loader
    for name, entry in get_parameters(documents).items():
        if name in _IMAGES:
            entry["defaultValue"] = locate_image(entry["defaultValue"])
    return documents


def locate_image(image: str) -> str:
    """Return the name that one of our images has where MINITRON_REGISTRY says that they are."""
    registry = os.environ.get(REGISTRY_VARIABLE, "").rstrip("/")
    return f"{registry}/{image.rpartition('/')[2]}" if registry else image


TRAINER = locate_image(f"minitron-pipelines/trainer:{__version__}")
"""Built from images/trainer.Dockerfile: the NeMo image and this package. The registry is read when this is imported."""

TOOLS = locate_image(f"minitron-pipelines/tools:{__version__}")
"""Built from images/tools.Dockerfile, without torch and CUDA, for tasks that only move files and call servers."""


def names_registry(image: str) -> bool:
    """Whether an image's name says which registry it is in; else nodes ask Docker Hub, if they have not got it."""
    first, slash, _ = image.partition("/")
    return bool(slash) and (first == "localhost" or "." in first or ":" in first)


def read_request(
    presets: list[str], settings: list[str], parameters: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> Request:
    """Read presets and `--set` values.

    Args:
        presets: names of presets that ship with the package, or paths of YAML files; the later ones win.
        settings: `key=value` strings, the value in YAML; the key is a parameter of the pipeline, or `stage.key`. They
            win over the presets; null restores the default.
        parameters: the pipeline's parameters, as `get_parameters` returns them.
        defaults: a document that the presets override.

    Raises:
        ConfigError: a preset does not exist, a key is unknown, or a setting is not `key=value`.
    """
    flat = merge(defaults or {}, *map(read_preset, presets), dict(map(_parse_setting, settings)))
    samples = flat.pop(SAMPLES, None)
    cluster = {key.partition(".")[2]: flat.pop(key) for key in list(flat) if key.startswith(f"{CLUSTER}.")}
    arguments = {key: flat.pop(key) for key in list(flat) if key in parameters}
    known = [*parameters, *(known_keys() if SETTINGS_PARAMETER in parameters else ())]
    if faults := [fault for key in flat for fault in find_key_faults(key, known)]:
        raise SectionError(faults)
    return Request(arguments, flat, validate_section(CLUSTER, ClusterConfig, cluster), samples)


def check_arguments(request: Request, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Check the arguments of a run, and convert them to the types that Kubeflow requires: YAML reads `1e-4` as text.

    Returns:
        The pipeline's arguments, `settings` among them.

    Raises:
        ConfigError: an argument is missing or has the wrong type, or the settings document is not valid.
    """
    faults: list[Fault] = []
    arguments: dict[str, Any] = {}
    for name, value in request.arguments.items():
        with _collect_faults(faults):
            arguments[name] = _convert_value(name, value, parameters[name])
    for name, entry in parameters.items():
        if not entry.get("isOptional") and name not in request.arguments:
            faults.append(Fault(name, f"missing; give it in the preset or by --set {name}=…"))
    if not arguments.get("tracking_uri", "unknown"):
        text = "'' is not an MLflow server, which this pipeline needs; give http(s)://HOST or sqlite:///FILE"
        faults.append(Fault("tracking_uri", text))
    if SETTINGS_PARAMETER in parameters:
        with _collect_faults(faults):
            settings = nest_sections(merge(request.document, arguments.get(SETTINGS_PARAMETER, {})))
            arguments[SETTINGS_PARAMETER] = settings
            read_run_plan(arguments, needs_budget=STOP_PARAMETER in parameters)
    elif not faults:  # promote has no settings, only its task's parameters
        form = {name: value for name, value in arguments.items() if name in PromoteConfig.model_fields}
        validate_section("", PromoteConfig, {"output": Path()} | form)
    if faults:
        raise SectionError(faults)
    return arguments


@contextmanager
def _collect_faults(faults: list[Fault]) -> Iterator[None]:
    try:
        yield
    except SectionError as error:
        faults += error.faults


def find_cluster_faults(
    plan: Plan | None, arguments: Mapping[str, Any], parameters: Mapping[str, Any]
) -> Iterator[Fault]:
    """Find faults that matter only if a run's tasks are pods: Kubeflow's driver, or the last task, would fail.

    Args:
        plan: the checked settings of the run; None if the pipeline has none.
        arguments: the pipeline's arguments, as `check_arguments` returns them.
        parameters: the pipeline's parameters, as `get_parameters` returns them.
    """
    values = {name: entry.get("defaultValue") for name, entry in parameters.items()} | dict(arguments)
    text = {name: str(value or "") for name, value in values.items()}
    volume = parameters["workspace"]["defaultValue"]
    if plan:
        yield from addresses.find_cluster_faults(plan, volume)
    for name, pattern in _CLUSTER_NAMES.items():
        if name in text and not re.fullmatch(pattern, text[name]):
            default = parameters[name]["defaultValue"]
            yield Fault(name, f"should match pattern '{pattern}' (found {text[name]!r}); its default is {default}")
    if re.fullmatch(r"\S+", text["workspace"]) and not re.match(rf"gs://\w|{volume}(/|$)", text["workspace"]):
        yield Fault(
            "workspace",
            f"{text['workspace']} is lost with each task's pod; give {volume} (the claim's volume), a directory in it, "
            "or gs://bucket/path",
        )
    yield from _find_server_faults(text["tracking_uri"])


def _find_server_faults(uri: str) -> Iterator[Fault]:
    """Find an MLflow server that the tasks' pods cannot reach: every pipeline needs its registry at the end."""
    host = re.match(r"https?://(?:.*@)?(\[[^]]+\]|[^/:?#]+)", uri)
    if not host:
        yield Fault(
            "tracking_uri",
            f"{uri.rpartition('@')[2]!r} is not an MLflow server, which this pipeline needs; give "
            "http(s)://HOST that the cluster's tasks can reach",
        )
    elif re.fullmatch(r"localhost|127\..*|0\.0\.0\.0|\[::1?\]", host[1]):
        yield Fault(
            "tracking_uri",
            f"{host[1]} is the task's own pod, not this machine; give the server's address in the "
            "cluster, http://SERVICE.NAMESPACE:PORT",
        )


def get_parameters(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the parameters of a compiled pipeline by name."""
    return documents[0]["root"]["inputDefinitions"]["parameters"]


def default_argument(parameter: str) -> Any:
    """Return the default of a parameter of the pipeline `compress`."""
    return get_parameters(compiled_pipeline("compress"))[parameter]["defaultValue"]


def apply_cluster_config(
    documents: list[dict[str, Any]], cluster: ClusterConfig, release: tuple[int, ...] | None
) -> list[dict[str, Any]]:
    """Write settings for which Kubeflow has no parameters into a compiled pipeline, in place.

    Args:
        documents: the two documents of the compiled YAML, specification and platform.
        cluster: the settings.
        release: the server's version; None: unknown; only settings that every supported version knows are written.

    Returns:
        The documents.
    """
    specification, platform = documents
    kubernetes = platform["platforms"]["kubernetes"]
    if release and release >= _TTL_SINCE:
        kubernetes.setdefault("pipelineConfig", {}).update(dict.fromkeys(_TTLS, cluster.ttl_hours * 3600))
    for executor in kubernetes["deploymentSpec"]["executors"].values():
        executor["activeDeadlineSeconds"] = str(cluster.timeout_hours * 3600)
        for mount in executor.get("emptyDirMounts", []):
            mount["sizeLimit"] = cluster.shared_memory
        executor["podMetadata"]["labels"] |= cluster.labels
    for dag in list_dags(specification):
        for task in dag["dag"]["tasks"].values():
            if "retryPolicy" in task:
                task["retryPolicy"]["maxRetryCount"] = cluster.retries
    return documents


def queue_pods(documents: list[dict[str, Any]], queue: str, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Let everything that holds GPUs wait in a queue of Kueue, in place: a task's own pod, or its TrainJob.

    A pod without GPUs does not queue. A pod that waits for its TrainJob would hold quota that the TrainJob needs:
    with enough such pods, no TrainJob would ever start.

    Args:
        documents: the two documents of the compiled YAML, specification and platform.
        queue: name of the LocalQueue.
        arguments: the run's arguments, as `check_arguments` returns them; they say which tasks have GPUs.

    Returns:
        The documents.
    """
    if not (plan := read_run_plan(arguments)):  # no task of this pipeline uses GPUs
        return documents
    for executor in documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        labels = executor["podMetadata"]["labels"]
        if label := _find_queue_label(plan, labels["app.kubernetes.io/component"]):
            labels[label] = queue
    return documents


def _find_queue_label(plan: Plan, task: str) -> str | None:
    """Return the label that names the queue of a task's GPUs; None if the task uses none."""
    if task == "trial":
        return QUEUE_LABEL if plan.trial_gpus else None
    settings = plan.stages.get(task)
    if settings and settings.gpus:
        return QUEUE_LABEL
    return TRAIN_JOB_QUEUE_LABEL if isinstance(settings, TrainingSettings) and settings.num_nodes > 1 else None


def list_pod_requests(
    documents: list[dict[str, Any]], arguments: Mapping[str, Any], plan: Plan | None, models: Models
) -> list[PodRequest]:
    """List what the tasks of a run ask a cluster for, in the order of the flow.

    Args:
        documents: the two documents of the compiled YAML, specification and platform.
        arguments: the pipeline's arguments, as `check_arguments` returns them.
        plan: the checked settings of the run; None if the pipeline has none.
        models: the sizes of its models.
    """
    specification, parameters = documents[0], get_parameters(documents)
    requests = []
    for task in sorted({name_stage(name) for name in list_stages(specification)}, key=_FLOW.index):
        label = specification["components"][f"comp-{task}"]["executorLabel"]
        container = specification["deploymentSpec"]["executors"][label]["container"]
        name = re.sub(r".*pipelinechannel--(\w+)'.*", r"\1", container["image"])
        image = str(arguments.get(name, parameters[name]["defaultValue"]))
        if plan and task in plan.stages:
            requests.append(request_pod(task, image, plan, models))
        elif plan and task == "trial":
            requests.append(request_trial(image, plan, models))
        else:
            limits = container["resources"]
            requests.append(PodRequest(task, image, 1, 0, limits["resourceCpuLimit"], limits["resourceMemoryLimit"]))
    return requests


def list_dags(specification: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the components of a pipeline that consist of tasks: the pipeline, its conditions and exit handlers."""
    return [part for part in [specification["root"], *specification["components"].values()] if "dag" in part]


def list_stages(specification: dict[str, Any]) -> list[str]:
    """Return the names of a pipeline's tasks that run a container, including those of nested pipelines."""
    components = specification["components"]
    return [
        name
        for dag in list_dags(specification)
        for name, task in dag["dag"]["tasks"].items()
        if "executorLabel" in components[task["componentRef"]["name"]]
    ]


def name_stage(task: str) -> str:
    """Return the stage of a task; the second task of a stage is STAGE-2."""
    return re.sub(r"-\d+$", "", task)


def read_run_plan(arguments: Mapping[str, Any], needs_budget: bool = False) -> Plan | None:
    """Read the plan of a run from its arguments; None if the pipeline has no settings."""
    if SETTINGS_PARAMETER not in arguments:
        return None
    form = {name: value for name, value in arguments.items() if name in PlanConfig.model_fields}
    return read_plan(
        PlanConfig(output=Path(), document=arguments[SETTINGS_PARAMETER], needs_budget=needs_budget, **form)
    )


def _parse_setting(setting: str) -> tuple[str, Any]:
    key, separator, text = setting.partition("=")
    if not separator:
        raise ConfigError(f"--set {setting}: no '='; write key=value")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {setting}: the value is not YAML; quote it") from error


def _convert_value(name: str, value: Any, entry: Mapping[str, Any]) -> Any:
    try:
        if isinstance(value, bool):
            read_scalar(bool if entry["parameterType"] == "BOOLEAN" else None, value)
        if name == CORPUS_PARAMETER and isinstance(value, list):  # its parts are checked with the settings
            value = json.dumps(value)
        return _KINDS[entry["parameterType"]].validate_python(value)
    except ValidationError as error:
        raise SectionError([Fault(name, f"{error.errors()[0]['msg']} (found {value!r})")]) from None
    except ValueError as error:
        raise SectionError([Fault(name, str(error))]) from None
