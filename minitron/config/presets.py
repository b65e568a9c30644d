"""Presets: YAML files with a settings document, those that ship with the package and the user's own."""

import importlib.util
from pathlib import Path
from typing import Any

from minitron.config.parse import read_yaml, suggest
from minitron.errors import ConfigError


def pipelines_directory() -> Path:
    """Return the directory of the compiled pipelines; their Python sources are not imported."""
    spec = importlib.util.find_spec("minitron.pipelines")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def read_preset(preset: str) -> dict[str, Any]:
    """Return the document of a preset that ships with the package, or of a YAML file.

    Raises:
        ConfigError: there is no such preset or file, or it is not YAML.
    """
    shipped = pipelines_directory() / "presets"
    if (path := shipped / f"{preset}.yaml").is_file():
        return read_yaml(path)
    if (path := Path(preset)).is_file():
        return read_yaml(path)
    known = sorted(file.stem for file in shipped.glob("*.yaml"))
    raise ConfigError(f"preset {preset}: no such file or preset; {suggest(preset, known)}")
