"""The settings document: presets, `--set` values and a run's form, merged and checked before anything starts.

The top level of a document is `PipelineSettings`. Each stage has a section, `distill: {max_steps: 30}`, with its
settings and the `cpu` and `memory` of its task. A merged document is flat: {"seed": 1, "distill.max_steps": 30}.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field, PositiveInt

from minitron.config.fields import Engine
from minitron.config.parse import suggest_name, validate_section
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
"""Keys of a preset that belong to no stage: what `submit` writes into the pipeline, and inputs that packages ship."""


def _copy_field(model: type[Settings], name: str) -> Any:
    """Return a field of a stage's settings, so that its default and its meaning stand in one place."""
    return model.model_fields[name]


class PipelineSettings(Settings):
    """The top level of a preset: settings of all stages, and where their tasks run."""

    teacher: str = Field(
        description="Model to compress: a directory every task can read (Hugging Face's or NeMo 2's), hf://org/name, "
        "gs://bucket/path, models:/NAME@alias or ngc://org/team/model:version."
    )
    corpus: str = Field(
        description="Text: .txt, .jsonl, .ndjson or .json (also .gz, .bz2, .xz, .zst), .parquet, a directory of them, "
        "gs://bucket/path of either, or hf://dataset[/config]."
    )
    sequence_length: PositiveInt = _copy_field(SequenceSettings, "sequence_length")
    seed: int = _copy_field(StageSettings, "seed")
    engine: Engine = "nemo"
    caching: bool = _copy_field(StageSettings, "caching")
    gpu_tolerations: list[dict[str, Any]] = Field(
        [],
        description="Tolerations of finetune, prune, distill and evaluate, written as in a pod; for spot nodes, say.",
    )
    gpu_node_selector: dict[str, str] = Field({}, description="Labels of the nodes that these stages run on.")


SHARED = ("sequence_length", "seed", "engine", "caching")
"""Settings that all stages share; they stand at the top level only."""


@dataclass(frozen=True)
class Plan:
    """A checked document: its top level, and each stage's settings and resources."""

    pipeline: PipelineSettings
    stages: dict[str, StageSettings]
    resources: dict[str, Resources]

    @property
    def model_name(self) -> str:
        """Name of the registered model that gets the new version."""
        register = self.stages["register"]
        assert isinstance(register, RegisterSettings)
        return register.name


def merge(*documents: Mapping[str, Any]) -> dict[str, Any]:
    """Merge documents, nested or flat, into a flat one; later ones win, and null restores the default."""
    flat: dict[str, Any] = {}
    for document in documents:
        flat |= dict(_flatten_sections(document))
    return {key: value for key, value in flat.items() if value is not None}


def nest_sections(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a flat document into one with sections."""
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
        ConfigError: a key is unknown or missing, or a value has the wrong type.
    """
    known = known_keys()
    for key in flat:
        check_key(key, known)
    document = nest_sections(flat)
    sections = {stage: document.pop(stage, {}) for stage in SETTINGS}
    pipeline = validate_section("", PipelineSettings, document)
    resources = {stage: _make_resources(stage, section) for stage, section in sections.items()}
    stages = {stage: _make_settings(stage, sections[stage], pipeline, resources[stage]) for stage in SETTINGS}
    return Plan(pipeline, stages, resources)


def read_plan(config: PlanConfig) -> Plan:
    """Read the plan of a run from the parameters of its form.

    Raises:
        ConfigError: as for `make_plan`, or only `minitron run` can make the preset's inputs.
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
        raise ConfigError(f"preset {config.preset}: only minitron run can make its inputs ({sample}); use minitron run")
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
    """Refuse an unknown key.

    Raises:
        ConfigError: the key is unknown; the message suggests the closest known one.
    """
    if key in known:
        return
    if key.partition(".")[2] in SHARED:
        raise ConfigError(f"{key}: all stages share this setting; set {key.partition('.')[2]}")
    raise ConfigError(f"{key}: unknown key; {suggest_name(key, known)}")


def _flatten_sections(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a document; a section's keys become `section.key`."""
    for key, value in document.items():
        if key in (*SETTINGS, CLUSTER):
            if not isinstance(value, dict):
                raise ConfigError(f"{key}: found {value!r}, not a section; write {key}: {{setting: value}}")
            yield from ((f"{key}.{name}", entry) for name, entry in value.items())
        else:
            yield key, value


def _make_resources(stage: str, section: dict[str, Any]) -> Resources:
    default = RESOURCES[stage]
    changes = {name: section[name] for name in type(default).model_fields if name in section}
    return validate_section(stage, type(default), default.model_dump() | changes)


def _make_settings(
    stage: str, section: dict[str, Any], pipeline: PipelineSettings, resources: Resources
) -> StageSettings:
    model = SETTINGS[stage]
    own = {name: value for name, value in section.items() if name not in type(resources).model_fields}
    own |= {name: getattr(pipeline, name) for name in SHARED if name in model.model_fields}
    return validate_section(stage, model, own | resources.model_dump(include={"gpus"}))
