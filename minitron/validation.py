"""From pydantic's faults to one line: the key, what is wrong with it, the value found, the remedy."""

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from minitron.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def validated(section: str, model: type[Model], values: dict[str, Any]) -> Model:
    """Validate the values of one section of a configuration.

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
    where = f"{section}.{key}" if key else section
    match fault["type"]:
        case "extra_forbidden":
            known = list(model.model_fields) if len(fault["loc"]) == 1 else []  # else it is a key within a value
            close = difflib.get_close_matches(key, known, n=1)
            listed = f"known: {', '.join(known)}" if known else "correct or remove it"
            return f"{where}: unknown key; " + (f"did you mean '{close[0]}'?" if close else listed)
        case "missing":
            return f"{where}: missing; give it a value"
        case "value_error":
            return f"{where}: {fault['ctx']['error']!s}"
        case _:
            return f"{where}: {fault['msg']} (found {fault['input']!r})"
