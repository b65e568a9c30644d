"""The arguments of a run, checked before it starts."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from minitron.config import addresses
from minitron.config.document import (
    CLUSTER,
    SAMPLES,
    Plan,
    find_key_faults,
    known_keys,
    merge,
    nest_sections,
    read_plan,
    read_preset,
)
from minitron.config.fields import Fault, read_scalar
from minitron.config.parse import SectionError, validate_section
from minitron.config.pipelines.compiled import IMAGES
from minitron.config.settings import ClusterConfig
from minitron.config.stages import PlanConfig, PromoteConfig
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


_CLUSTER_NAMES = (
    dict.fromkeys(("credentials_secret", "image_pull_secret"), r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
    | {"workspace_claim": r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"}
    | dict.fromkeys((*IMAGES, "workspace"), r"\S+")
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
