"""A settings document: what presets, `--set` values and a run's form say together, checked before anything starts.

The top level of a document is `PipelineSettings`, and each stage has a section, `distill: {max_steps: 30}`, with its
settings and the `cpu` and `memory` of its task. Merged, a document is flat: {"seed": 1, "distill.max_steps": 30}.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field, PositiveInt

from minitron.config.fields import Engine
from minitron.config.parse import suggest, validated
from minitron.config.presets import read_preset
from minitron.config.settings import (
    RESOURCES,
    SETTINGS,
    RegisterSettings,
    Resources,
    SequenceSettings,
    Settings,
    StageSettings,
)
from minitron.config.tasks import PlanConfig
from minitron.errors import ConfigError

CLUSTER, SAMPLES = "cluster", "samples"
"""The keys of a preset that are no stage's: what `submit` writes into the pipeline, and inputs that packages ship."""


def _setting(model: type[Settings], name: str) -> Any:
    """Return a field of a stage's settings: its default and its meaning are written there only."""
    return model.model_fields[name]


class PipelineSettings(Settings):
    """The top level of a preset: what all stages share, and where their tasks run."""

    teacher: str = Field(
        description="Base model: a directory every task can read (Hugging Face's or NeMo 2's), hf://org/name, "
        "gs://bucket/path, models:/NAME@alias or ngc://org/team/model:version."
    )
    corpus: str = Field(
        description="Text: .txt, .jsonl(.gz/.zst), .json or .parquet, a directory of them, gs://bucket/path of either, "
        "or hf://dataset[/config]."
    )
    sequence_length: PositiveInt = _setting(SequenceSettings, "sequence_length")
    seed: int = _setting(StageSettings, "seed")
    engine: Engine = "nemo"
    caching: bool = _setting(StageSettings, "caching")
    gpu_tolerations: list[dict[str, Any]] = Field(
        [], description="Tolerations of finetune, prune, distill and evaluate, as in a pod: for spot nodes, say."
    )
    gpu_node_selector: dict[str, str] = Field({}, description="Labels of the nodes that these run on.")


SHARED = ("sequence_length", "seed", "engine", "caching")
"""Settings that all stages have in common: they stand at the top level only."""


@dataclass(frozen=True)
class Plan:
    """What a pipeline is going to do: the top level of its document, and each stage's settings and resources."""

    pipeline: PipelineSettings
    stages: dict[str, StageSettings]
    resources: dict[str, Resources]

    @property
    def model_name(self) -> str:
        """Registered model that gets the new version."""
        register = self.stages["register"]
        assert isinstance(register, RegisterSettings)
        return register.name


def merge(*documents: Mapping[str, Any]) -> dict[str, Any]:
    """Merge documents, nested or flat, into a flat one: the later ones win, and null gives the default back."""
    flat: dict[str, Any] = {}
    for document in documents:
        flat |= dict(_flatten(document))
    return {key: value for key, value in flat.items() if value is not None}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flat document with its sections."""
    document: dict[str, Any] = {}
    for key, value in flat.items():
        section, dot, name = key.partition(".")
        if dot:
            document.setdefault(section, {})[name] = value
        else:
            document[key] = value
    return document


def make_plan(flat: Mapping[str, Any]) -> Plan:
    """Validate a flat document.

    Raises:
        ConfigError: a key is unknown, missing or has a value of the wrong kind.
    """
    known = known_keys()
    for key in flat:
        check_key(key, known)
    document = nest(flat)
    sections = {stage: document.pop(stage, {}) for stage in SETTINGS}
    pipeline = validated("", PipelineSettings, document)
    resources = {stage: _resources(stage, section) for stage, section in sections.items()}
    stages = {stage: _settings(stage, sections[stage], pipeline, resources[stage]) for stage in SETTINGS}
    return Plan(pipeline, stages, resources)


def plan_of(config: PlanConfig) -> Plan:
    """Return the plan of a run from what its form says.

    Raises:
        ConfigError: as for `make_plan`; or the preset has inputs that only `minitron run` can make.
    """
    form = {
        "teacher": config.teacher,
        "corpus": config.corpus,
        "register.name": config.model_name,
        "evaluate.champion": config.champion,
    }
    preset = read_preset(config.preset) if config.preset else {}
    flat = merge(preset, config.document, {key: value for key, value in form.items() if value})
    if sample := flat.pop(SAMPLES, None):
        raise ConfigError(f"preset {config.preset}: minitron run makes its inputs, {sample}, on your machine; use that")
    for key in [key for key in flat if key.startswith(f"{CLUSTER}.")]:
        print(f"warning: plan: {key} has no effect here; minitron submit and minitron schedule set it", flush=True)
        del flat[key]
    return make_plan(flat)


def known_keys() -> list[str]:
    """Return the keys of a flat document."""
    keys = list(PipelineSettings.model_fields)
    for stage, model in SETTINGS.items():
        names = {*model.model_fields} - {*SHARED, "gpus"} | {*type(RESOURCES[stage]).model_fields}
        keys += [f"{stage}.{name}" for name in sorted(names)]
    return keys


def check_key(key: str, known: list[str]) -> None:
    """Refuse a key that is not known.

    Raises:
        ConfigError: it is not; the message names the one that was probably meant.
    """
    if key in known:
        return
    if key.partition(".")[2] in SHARED:
        raise ConfigError(f"{key}: all stages have the same; set {key.partition('.')[2]}")
    raise ConfigError(f"{key}: unknown key; {suggest(key, known)}")


def _flatten(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the entries, those of sections as `section.key`."""
    for key, value in document.items():
        if key in (*SETTINGS, CLUSTER):
            if not isinstance(value, dict):
                raise ConfigError(f"{key}: found {value!r}, not a section; write {key}: {{setting: value}}")
            yield from ((f"{key}.{name}", entry) for name, entry in value.items())
        else:
            yield key, value


def _resources(stage: str, section: dict[str, Any]) -> Resources:
    usual = RESOURCES[stage]
    given = {name: section[name] for name in type(usual).model_fields if name in section}
    return validated(stage, type(usual), usual.model_dump() | given)


def _settings(stage: str, section: dict[str, Any], pipeline: PipelineSettings, resources: Resources) -> StageSettings:
    model = SETTINGS[stage]
    own = {name: value for name, value in section.items() if name not in type(resources).model_fields}
    own |= {name: getattr(pipeline, name) for name in SHARED if name in model.model_fields}
    return validated(stage, model, own | resources.model_dump(include={"gpus"}))
