"""From pydantic's faults to one line: the key, what is wrong with it, the value found, the remedy."""

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from minitron.config.settings import StageSettings
from minitron.config.stages import STAGES, StageConfig
from minitron.config.tasks import TASKS
from minitron.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def validated(section: str, model: type[Model], values: dict[str, Any]) -> Model:
    """Validate the values of one section of a configuration; the top level has an empty name.

    Raises:
        ConfigError: a key is unknown, missing or has a value of the wrong kind; all faults are named.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(section, model, fault) for fault in error.errors())) from None


def _explain(section: str, model: type[BaseModel], fault: Any) -> str:
    """Turn one pydantic fault into 'section.key: what is wrong (found …)'."""
    key = ".".join(str(part) for part in fault["loc"]) if fault["loc"] else ""
    where = ".".join(filter(None, (section, key)))
    match fault["type"]:
        case "extra_forbidden":
            known = list(model.model_fields) if len(fault["loc"]) == 1 else []  # else it is a key within a value
            return f"{where}: unknown key; {suggest(key, known) if known else 'correct or remove it'}"
        case "missing":
            return f"{where}: missing; give it a value"
        case "value_error":
            return f"{where}: {fault['ctx']['error']!s}"
        case _:
            return f"{where}: {fault['msg']} (found {fault['input']!r})"


def suggest(name: str, known: list[str]) -> str:
    """Return the known name that was probably meant, or all of them, as the end of a message."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file is missing or is not a mapping.
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


def fields_marked(model: type[StageSettings], mark: str) -> list[str]:
    """Return the names of the fields that carry INPUT or EXECUTION."""
    return [name for name, field in model.model_fields.items() if mark in field.metadata]


def parse(stage: str, values: dict[str, Any]) -> StageConfig:
    """Validate the values of one stage, or of one of TASKS.

    Raises:
        ConfigError: a key is unknown, missing or has a value of the wrong kind; all faults are named.
    """
    return validated(stage, (STAGES | TASKS)[stage], values)
