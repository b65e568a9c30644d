"""The settings document: presets, `--set` values and a run's form, merged and checked before anything starts.

A preset is a YAML file with such a document, shipped with the package or written by you. The top level of a document is
`PipelineSettings`. Each stage has a section, such as `distill: {max_steps: 30}`, with its settings and the `cpu` and
`memory` of its task. A merged document is flat: {"seed": 1, "distill.max_steps": 30}.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt

from minitron.config.fields import INPUT, Engine, Fault
from minitron.config.parse import (
    Model,
    SectionError,
    find_marked_fields,
    read_yaml,
    suggest_name,
    validate_section,
)
from minitron.config.settings import (
    RESOURCES,
    CorpusText,
    EngineSettings,
    EvaluateSettings,
    PrepareSettings,
    RegisterSettings,
    Resources,
    SequenceSettings,
    Settings,
    StageSettings,
)
from minitron.config.shapes import BUDGETS, SearchSettings
from minitron.config.stages import SETTINGS, STAGES, PlanConfig
from minitron.errors import ConfigError

CLUSTER, SAMPLES, SEARCH = "cluster", "samples", "search"
"""Keys of a preset outside the stages: settings that `submit` writes into the pipeline, inputs from packages, and the
section of the pipeline search, which the others ignore."""


def _copy_field(model: type[Settings], name: str) -> Any:
    """Return a field of a stage's settings, so that its default and its meaning are written once."""
    return model.model_fields[name]


class PipelineSettings(Settings):
    """The top level of a preset: settings of all stages, and where their tasks run."""

    teacher: str = Field(
        description="Model to compress: a directory that every task can read (Hugging Face's or NeMo 2's), "
        "hf://org/name, gs://bucket/path, models:/NAME@alias or ngc://org/team/model:version."
    )
    corpus: CorpusText
    sequence_length: PositiveInt = _copy_field(SequenceSettings, "sequence_length")
    seed: int = _copy_field(StageSettings, "seed")
    engine: Engine = _copy_field(EngineSettings, "engine")
    caching: bool = _copy_field(StageSettings, "caching")
    gpu_tolerations: list[dict[str, Any]] = Field(
        [],
        description="Tolerations of finetune, prune, distill and evaluate, written as in a pod; needed for spot nodes.",
    )
    gpu_node_selector: dict[str, str] = Field({}, description="Labels that the nodes of these stages must have.")


SHARED = ("sequence_length", "seed", "engine", "caching")
"""Settings that all stages share; only the top level has them."""


@dataclass(frozen=True)
class Plan:
    """A checked document: its top level, each stage's settings and resources, and the search's settings."""

    pipeline: PipelineSettings
    stages: dict[str, StageSettings]
    resources: dict[str, Resources]
    search: SearchSettings

    @property
    def model_name(self) -> str:
        """Name of the registered model that gets the new version."""
        register = self.stages["register"]
        assert isinstance(register, RegisterSettings)
        return register.name

    @property
    def trial_gpus(self) -> int:
        """GPUs of a task that prunes and distills a candidate."""
        return max(self.stages["prune"].gpus, self.stages["distill"].gpus)


def pipelines_directory() -> Path:
    """Return the directory of the compiled pipelines without importing their Python sources."""
    spec = importlib.util.find_spec("minitron.pipelines")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def read_preset(preset: str) -> dict[str, Any]:
    """Read the document of a shipped preset or a YAML file.

    Raises:
        ConfigError: no such preset or file exists, or it is not YAML.
    """
    shipped = pipelines_directory() / "presets"
    if (path := shipped / f"{preset}.yaml").is_file():
        return read_yaml(path)
    if (path := Path(preset)).is_file():
        return read_yaml(path)
    if path.suffix or len(path.parts) > 1:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise ConfigError(f"preset {preset}: no such file{where}; give an existing YAML file")
    known = sorted(file.stem for file in shipped.glob("*.yaml"))
    raise ConfigError(f"preset {preset}: no such file or preset; {suggest_name(preset, known)}")


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
        ConfigError: a key is unknown or missing, a value has the wrong type, or sections contradict each other; the
            message lists all faults.
    """
    faults = [fault for key in flat for fault in find_key_faults(key, known_keys())]
    unknown = {key for key, _ in faults}
    document = nest_sections({key: value for key, value in flat.items() if key not in unknown})
    sections = {stage: document.pop(stage, {}) for stage in SETTINGS}
    searched = document.pop(SEARCH, {})

    def validate(section: str, model: type[Model], values: dict[str, Any]) -> Model | None:
        try:
            return validate_section(section, model, values)
        except SectionError as error:
            faults.extend(fault for fault in error.faults if fault[0].partition(".")[2] not in SHARED)
            return None

    pipeline = validate("", PipelineSettings, document)
    shared = {name: getattr(pipeline or PipelineSettings.model_construct(**document), name) for name in SHARED}
    resources, stages = {}, {}
    for stage, section in sections.items():
        default = RESOURCES[stage]
        names = type(default).model_fields
        own = {name: value for name, value in section.items() if name not in names}
        values = default.model_dump() | {name: section[name] for name in names if name in section}
        resources[stage] = validate(stage, type(default), values) or default
        own |= {name: value for name, value in shared.items() if name in SETTINGS[stage].model_fields}
        stages[stage] = validate(stage, SETTINGS[stage], own | resources[stage].model_dump(include={"gpus"}))
    search = validate(SEARCH, SearchSettings, searched)
    if not faults:
        faults += _find_contradictions(stages)
    if faults or pipeline is None or search is None:
        raise SectionError(faults)
    return Plan(pipeline, {stage: settings for stage, settings in stages.items() if settings}, resources, search)


def _find_contradictions(stages: Mapping[str, Any]) -> Iterator[Fault]:
    """Find settings of different sections that contradict each other."""
    prepare, evaluate = stages["prepare"], stages["evaluate"]
    assert isinstance(prepare, PrepareSettings) and isinstance(evaluate, EvaluateSettings)
    for stage, settings in stages.items():
        inputs = find_marked_fields(STAGES[stage], INPUT)
        for name in settings.expected_sha256:
            if name not in inputs:
                yield Fault(
                    f"{stage}.expected_sha256", f"{name} is not an input of {stage}; known: {', '.join(inputs)}"
                )
    if not (prepare.own_splits or prepare.test_fraction):
        for number, gate in enumerate(evaluate.gates):
            if gate.metric == "test_loss":
                yield Fault(
                    f"evaluate.gates.{number}.metric",
                    "test_loss is not measured, because prepare.test_fraction is 0; raise it, or take validation_loss",
                )


def read_plan(config: PlanConfig) -> Plan:
    """Read the plan of a run from the parameters of its form.

    Raises:
        ConfigError: as for `make_plan`, or the preset's inputs can only be made by `minitron run`, or a search has no
            budget or nothing to decide.
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
    plan = make_plan(flat)
    if config.needs_budget and (faults := list(_find_search_faults(plan))):
        raise SectionError(faults)
    return plan


def _find_search_faults(plan: Plan) -> Iterator[Fault]:
    """Find what keeps the pipeline search from its decision: no budget, or a cut that is chosen already."""
    if plan.search.budget is None:
        yield Fault(SEARCH, f"no budget; give one of {', '.join(f'{SEARCH}.{name}' for name in BUDGETS)}")
    for name in ("drop_layers", "keep"):
        if getattr(plan.stages["prune"], name) is not None:
            yield Fault(f"prune.{name}", "a search decides about the sizes; remove it, or run compress")


def known_keys() -> list[str]:
    """Return the keys of a flat document."""
    keys = list(PipelineSettings.model_fields)
    for stage, model in SETTINGS.items():
        names = {*model.model_fields} - {*SHARED, "gpus"} | {*type(RESOURCES[stage]).model_fields}
        keys += [f"{stage}.{name}" for name in sorted(names)]
    return keys + [f"{SEARCH}.{name}" for name in SearchSettings.model_fields]


def find_key_faults(key: str, known: list[str]) -> Iterator[Fault]:
    """Find an unknown key; the fault suggests where a setting of that name stands, or else the closest known key."""
    if key in known:
        return
    section, _, name = key.rpartition(".")
    if name in SHARED:
        yield Fault(key, f"all stages share this setting; set {name}")
    elif name in known:
        yield Fault(key, f"unknown key; {name} stands at the top level: set {name}")
    elif section in ("", *SETTINGS, SEARCH) and (homes := [other for other in known if other.endswith(f".{name}")]):
        yield Fault(key, f"unknown key; set {' or '.join(homes)}")
    else:
        yield Fault(key, f"unknown key; {suggest_name(key, known)}")


def _flatten_sections(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a document; a section's keys become `section.key`."""
    for key, value in document.items():
        if key in (*SETTINGS, SEARCH, CLUSTER):
            if not isinstance(value, dict):
                raise ConfigError(f"{key}: found {value!r}, not a section; write {key}: {{setting: value}}")
            yield from ((f"{key}.{name}", entry) for name, entry in value.items())
        else:
            yield key, value
