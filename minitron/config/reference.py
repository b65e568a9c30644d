"""Every setting with its default and meaning, from the models: docs/reference/parameters.md, and the help texts.

`python -m minitron.config.reference` prints the page; `make docs` writes it.
"""

import inspect
from collections.abc import Collection, Iterator
from typing import NamedTuple

from pydantic import BaseModel

from minitron.config.document import SHARED, PipelineSettings
from minitron.config.pipelines import compiled_pipeline, parameters_of
from minitron.config.settings import RESOURCES, SETTINGS, ClusterConfig, StageSettings
from minitron.config.stages import STAGES, StageConfig

PIPELINES = ("compress", "retrain", "promote")


class Row(NamedTuple):
    """One setting: its name, its default as text, and what it means."""

    name: str
    default: str
    meaning: str


def sections() -> dict[str, list[Row]]:
    """Return the settings of a preset: those that all stages share, each stage's, and those of the cluster."""
    found = {"": list(_rows(PipelineSettings))}
    for stage, model in SETTINGS.items():
        resources = {name: str(value) for name, value in RESOURCES[stage].model_dump().items()}
        found[stage] = list(_rows(model, left_out=(*SHARED, "gpus")))
        found[stage] += [row._replace(default=resources[row.name]) for row in _rows(type(RESOURCES[stage]))]
    return found | {"cluster": list(_rows(ClusterConfig))}


def help_text() -> str:
    """Return the settings as the end of a help text, in paragraphs that are printed as they are."""
    parts = ["Settings, for --set and presets:"]
    for section, rows in sections().items():
        prefix = f"{section}." if section else ""
        lines = [f"  {prefix}{row.name}={row.default}  {row.meaning}" for row in rows]
        parts.append("\b\n" + "\n".join(lines))
    return "\n\n".join(parts)


def reference_page() -> str:
    """Return docs/reference/parameters.md."""
    parts = [
        "# Parameters",
        "Generated from the models in `minitron/config` by `make docs`.",
        "## Settings of a preset",
    ]
    parts.append("A preset has the settings that all stages share at its top level, and a section per stage.")
    for section, rows in sections().items():
        parts.append(_table(f"`{section}`" if section else "All stages", rows))
    parts.append("## Parameters of the pipelines")
    for name in PIPELINES:
        parts.append(_table(f"`{name}`", list(_form(name))))
    parts.append("## Configuration of a stage run alone")
    parts.append("`python -m minitron.STAGE --config FILE` takes the stage's settings, these keys, and its inputs.")
    parts.append(_table("Every stage", list(_rows(StageConfig, left_out=StageSettings.model_fields))))
    for stage, model in STAGES.items():
        left_out = {*StageConfig.model_fields, *SETTINGS[stage].model_fields}
        parts.append(_table(f"Inputs of `{stage}`", list(_rows(model, left_out=left_out))))
    return "\n\n".join(parts) + "\n"


def _rows(model: type[BaseModel], left_out: Collection[str] = ()) -> Iterator[Row]:
    for name, field in model.model_fields.items():
        if name not in left_out:
            yield Row(name, "required" if field.is_required() else str(field.default), field.description or "")


def _form(pipeline: str) -> Iterator[Row]:
    """Yield the parameters of a compiled pipeline."""
    for name, entry in parameters_of(compiled_pipeline(pipeline)).items():
        default = str(entry["defaultValue"]) if "defaultValue" in entry else "none"
        yield Row(name, default if entry.get("isOptional") else "required", inspect.cleandoc(entry["description"]))


def _table(title: str, rows: list[Row]) -> str:
    lines = [f"| `{name}` | {_cell(default)} | {' '.join(meaning.split())} |" for name, default, meaning in rows]
    return "\n".join([f"### {title}", "", "| name | default | meaning |", "|---|---|---|", *lines])


def _cell(default: str) -> str:
    return default if default in ("required", "none") else f"`{default}`" if default else "empty"


if __name__ == "__main__":
    print(reference_page(), end="")
