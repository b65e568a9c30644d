"""From a preset and --set values to the arguments of a pipeline, all checked before anything starts.

A preset is YAML: pipeline parameters at the top level, one section per stage (`distill: {max_steps: 30}` is the
parameter distill_max_steps), a section `cluster` for what is no parameter, and `samples: tiny` or `samples: demo` for
inputs that ship in Python packages.
"""

import difflib
import importlib.util
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from minitron.config import STAGES, ClusterConfig, given, parse
from minitron.errors import ConfigError
from minitron.stage import read_yaml

SAMPLES, CLUSTER = "samples", "cluster"

_KINDS: dict[str, TypeAdapter[Any]] = {
    "STRING": TypeAdapter(str, config=ConfigDict(coerce_numbers_to_str=True)),
    "NUMBER_INTEGER": TypeAdapter(int),
    "NUMBER_DOUBLE": TypeAdapter(float),
    "BOOLEAN": TypeAdapter(bool),
    "LIST": TypeAdapter(list),
    "STRUCT": TypeAdapter(dict),
}
"""Kubeflow's parameter types."""


def pipelines_directory() -> Path:
    """Return the directory of the compiled pipelines; their Python sources are not imported."""
    spec = importlib.util.find_spec("minitron.pipelines")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def compiled_pipeline(name: str) -> list[dict[str, Any]]:
    """Return the documents of a pipeline's checked-in YAML: its specification and its platform's.

    Raises:
        ConfigError: there is no such pipeline.
    """
    path = pipelines_directory() / f"{name}.yaml"
    if not path.is_file():
        known = [file.stem for file in pipelines_directory().glob("*.yaml")]
        raise ConfigError(f"pipeline {name}: unknown; {_suggest(name, known)}")
    return list(yaml.load_all(path.read_text(), yaml.CSafeLoader))  # ten times as fast as the one in Python


def read_arguments(presets: list[str], settings: list[str], known: list[str]) -> dict[str, Any]:
    """Return pipeline arguments, and SAMPLES and CLUSTER where a preset has them.

    Args:
        presets: names of presets that ship with the package, or paths of YAML files; the later ones win.
        settings: `key=value` strings, the value in YAML; `stage.key` or a parameter's name. They win over the presets;
            null gives the default back.
        known: the pipeline's parameters.

    Raises:
        ConfigError: the preset does not exist, a key is unknown, or a setting is not `key=value`.
    """
    values: dict[str, Any] = {}
    for preset in presets:
        values |= _flatten(read_yaml(_preset_path(preset)))
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator:
            raise ConfigError(f"--set {setting}: no '='; write key=value")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting}: the value is not YAML; quote it") from error
    cluster = {key: values.pop(key) for key in list(values) if key.startswith(f"{CLUSTER}.")}
    arguments = {key.replace(".", "_", 1) if key.partition(".")[0] in STAGES else key: key for key in values}
    for name, key in arguments.items():
        if name not in [*known, SAMPLES]:
            raise ConfigError(f"{key}: unknown key; {_suggest(name, known)}")
    found = {name: values[key] for name, key in arguments.items() if values[key] is not None}
    if cluster:
        found[CLUSTER] = {key.partition(".")[2]: value for key, value in cluster.items()}
    return found


def configured(documents: list[dict[str, Any]], cluster: ClusterConfig) -> list[dict[str, Any]]:
    """Put the settings that are no parameters into a compiled pipeline, in place.

    Args:
        documents: the two of the compiled YAML: specification and platform.
        cluster: the settings.

    Returns:
        The documents.
    """
    specification, platform = documents
    kubernetes = platform["platforms"]["kubernetes"]
    kubernetes["pipelineConfig"]["resourceTtlOnCompletion"] = cluster.ttl_hours * 3600
    for executor in kubernetes["deploymentSpec"]["executors"].values():
        executor["activeDeadlineSeconds"] = str(cluster.timeout_hours * 3600)
        executor["emptyDirMounts"][0]["sizeLimit"] = cluster.shared_memory
        executor["podMetadata"]["labels"] |= cluster.labels
    for dag in dags(specification):
        for task in dag["dag"]["tasks"].values():
            if "retryPolicy" in task:
                task["retryPolicy"]["maxRetryCount"] = cluster.retries
    return documents


def dags(specification: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the components of a pipeline that consist of tasks: itself, and its conditions and exit handlers."""
    return [part for part in [specification["root"], *specification["components"].values()] if "dag" in part]


def check_arguments(arguments: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """Validate the arguments against the pipeline's parameters and every stage's configuration.

    Args:
        arguments: what `read_arguments` returned, with the paths of the samples.
        parameters: the `inputDefinitions.parameters` of the compiled pipeline.

    Returns:
        The arguments as the types that Kubeflow insists on: YAML reads `1e-4`, without a point, as text.

    Raises:
        ConfigError: one is missing or has a value of the wrong kind.
    """
    for name, entry in parameters.items():
        if not entry.get("isOptional") and name not in arguments:
            raise ConfigError(f"{name}: missing; give it in the preset or by --set {name}=…")
    typed = {name: _typed(name, value, parameters[name]["parameterType"]) for name, value in arguments.items()}
    defaults = {name: entry["defaultValue"] for name, entry in parameters.items() if "defaultValue" in entry}
    for stage in STAGES:
        if any(name.startswith(f"{stage}_") for name in parameters):
            parse(stage, stage_values(stage, defaults | typed))
    return typed


def _typed(name: str, value: Any, kind: str) -> Any:
    try:
        return _KINDS[kind].validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{_dotted(name)}: {error.errors()[0]['msg']} (found {value!r})") from None


def stage_values(stage: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the part of the arguments that a stage gets; paths that other stages write have placeholder values."""
    required = {name for name, field in STAGES[stage].model_fields.items() if field.is_required()}
    values = {name: arguments[parameter] for parameter, name in _parameters(stage, arguments).items()}
    return dict.fromkeys(required, "placeholder") | given(stage, values)


def _parameters(stage: str, arguments: dict[str, Any]) -> dict[str, str]:
    """Map the arguments that a stage gets to its fields: `distill_max_steps` or, shared by all stages, `seed`."""
    fields = STAGES[stage].model_fields
    return {name: name for name in fields if name in arguments} | {
        f"{stage}_{name}": name for name in fields if f"{stage}_{name}" in arguments
    }


def _flatten(preset: dict[str, Any]) -> dict[str, Any]:
    """Turn the sections into `section.key` entries."""
    values: dict[str, Any] = {}
    for key, value in preset.items():
        if key in (*STAGES, CLUSTER) and isinstance(value, dict):
            values |= {f"{key}.{name}": entry for name, entry in value.items()}
        else:
            values[key] = value
    return values


def _preset_path(preset: str) -> Path:
    shipped = pipelines_directory() / "presets"
    if (path := shipped / f"{preset}.yaml").is_file():
        return path
    if (path := Path(preset)).is_file():
        return path
    known = sorted(file.stem for file in shipped.glob("*.yaml"))
    raise ConfigError(f"preset {preset}: no such file or preset; {_suggest(preset, known)}")


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{_dotted(close[0])}'?" if close else f"known: {', '.join(map(_dotted, known))}"


def _dotted(parameter: str) -> str:
    """Return a parameter's name as it is written in a preset: finetune_max_steps → finetune.max_steps."""
    stage, _, key = parameter.partition("_")
    return f"{stage}.{key}" if stage in STAGES else parameter
