"""Validate a configuration, and turn pydantic's errors into one line: key, fault, value found, remedy."""

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from minitron.config.fields import EXECUTION, INPUT, Fault, Faults
from minitron.config.settings import StageSettings
from minitron.config.shapes import Kept, PruneSettings
from minitron.config.stages import STAGES, TASKS, StageConfig
from minitron.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)
Prune = TypeVar("Prune", bound=PruneSettings)


class SectionError(ConfigError):
    """The faults of one section."""

    def __init__(self, faults: list[Fault]) -> None:
        """Hold the faults, each with its dotted key."""
        self.faults = faults
        super().__init__(join_faults(faults))


def join_faults(faults: list[Fault]) -> str:
    """Return all faults in one line."""
    return "; ".join(f"{key}: {text}" for key, text in dict.fromkeys(faults))


def validate_section(section: str, model: type[Model], values: dict[str, Any]) -> Model:
    """Validate one section of a configuration; the top level has an empty name.

    Raises:
        SectionError: a key is unknown or missing, or a value has the wrong type; the message lists all faults.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        faults = [part for fault in error.errors() for part in _list_faults(section, model, fault)]
        raise SectionError(faults) from None


def _list_faults(section: str, model: type[BaseModel], fault: Any) -> Iterator[Fault]:
    """Yield one pydantic error as a key and its fault; an error of our own may have several faults."""
    key = ".".join(str(part) for part in fault["loc"])
    where = ".".join(filter(None, (section, key)))
    match fault["type"]:
        case "extra_forbidden":
            known = list(model.model_fields) if len(fault["loc"]) == 1 else []  # else it is a key within a value
            yield Fault(where, f"unknown key; {suggest_name(key, known) if known else 'correct or remove it'}")
        case "missing":
            yield Fault(where, "missing; give it a value")
        case "value_error" if isinstance(faults := fault["ctx"]["error"], Faults):
            yield from (Fault(".".join(filter(None, (where, name))), text) for name, text in faults.faults)
        case "value_error":
            yield Fault(where, str(fault["ctx"]["error"]))
        case _:
            yield Fault(where, f"{fault['msg']} (found {fault['input']!r})")


def suggest_name(name: str, known: list[str]) -> str:
    """Return the end of a message: the closest known name, or all known names."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give an existing YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text ({error.reason}); give a YAML file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: found {type(values).__name__}, not 'key: value' lines; correct it")
    return values


def read_kept(file: Path | None) -> Kept | None:
    """Read the lists of what to keep that `prune.keep` names; None if the file is not on this machine.

    Raises:
        SectionError: an axis is unknown, or an index is wrong, or lists do not match.
        ConfigError: the file is neither JSON nor YAML.
    """
    if file is None or not file.exists():
        return None
    try:
        values = json.loads(file.read_bytes())  # of half a million indices in a second; YAML takes minutes
    except (OSError, ValueError):
        values = read_yaml(file)
    if isinstance(values, dict):
        values = values.get("kept", values)
    return validate_section("prune.keep", Kept, values)


def apply_kept(prune: Prune) -> Prune:
    """Return prune's settings with the sizes that follow from the lists in `keep`, if they are on this machine."""
    kept = read_kept(prune.keep)
    return prune.with_sizes_of(kept) if kept else prune


def find_marked_fields(model: type[StageSettings], mark: str) -> list[str]:
    """Return the names of the fields with a mark: INPUT, HUB_DATASET or EXECUTION."""
    return [name for name, field in model.model_fields.items() if mark in field.metadata]


NEWER = {
    "messages_field": None,
    "near_duplicates": None,
    "method": "minitron",
    "layers_by": "influence",
    "divergence_beta": 0.0,
    "teacher_cache": None,
    "teacher_cache_size": 50,
    "intermediate_weight": [1.0, 0.0],
    "cut_learning_rate_factor": 1.0,
}
"""Settings that came later than the keys of their stages, and the values that change no result from before."""


def list_decisive_settings(model: type[StageSettings], values: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings that affect a stage's result.

    docs/explanation/caching-and-resume.md explains why, stage by stage.

    Args:
        model: the stage's settings, or its configuration; its inputs count by their content, not here.
        values: the settings. A loss on intermediate layers is balanced within each micro-batch (engine nemo), so
            with such a loss the size of a micro-batch affects the result. NEWER settings at their defaults are in no
            key: their stages had keys before them.
    """
    left_out = {*find_marked_fields(model, EXECUTION), *find_marked_fields(model, INPUT)}
    left_out |= {name for name, default in NEWER.items() if values.get(name) == default}
    names = [name for name in model.model_fields if name not in left_out]
    is_balanced = values.get("intermediate_layers") and values["engine"] == "nemo"
    return [*names, "micro_batch_size"] if is_balanced else names


def parse(stage: str, values: dict[str, Any]) -> StageConfig:
    """Validate the configuration of a stage or a task.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type; the message lists all faults.
    """
    return validate_section(stage, (STAGES | TASKS)[stage], values)
