"""Presets: YAML files with a settings document, shipped with the package or written by you."""

import importlib.util
from pathlib import Path
from typing import Any

from minitron.config.parse import read_yaml, suggest_name
from minitron.errors import ConfigError


def pipelines_directory() -> Path:
    """Return the directory of the compiled pipelines without importing their Python sources."""
    spec = importlib.util.find_spec("minitron.pipelines")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def read_preset(preset: str) -> dict[str, Any]:
    """Read the document of a shipped preset or of a YAML file.

    Raises:
        ConfigError: no such preset or file exists, or it is not YAML.
    """
    shipped = pipelines_directory() / "presets"
    if (path := shipped / f"{preset}.yaml").is_file():
        return read_yaml(path)
    if (path := Path(preset)).is_file():
        return read_yaml(path)
    known = sorted(file.stem for file in shipped.glob("*.yaml"))
    raise ConfigError(f"preset {preset}: no such file or preset; {suggest_name(preset, known)}")
