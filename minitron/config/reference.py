"""The reference of all settings, generated from the models: docs/reference/parameters.md and the help texts.

`python -m minitron.config.reference` prints the page; `make docs` writes it.
"""

import inspect
from collections.abc import Collection, Iterator
from typing import NamedTuple

from pydantic import BaseModel

from minitron.config.document import SEARCH, SHARED, PipelineSettings
from minitron.config.pipelines import compiled_pipeline, get_parameters
from minitron.config.settings import RESOURCES, ClusterConfig, StageSettings
from minitron.config.shapes import SearchSettings
from minitron.config.stages import SETTINGS, STAGES, StageConfig

PIPELINES = ("compress", "retrain", "promote", "search")


class Row(NamedTuple):
    """One setting: name, default as text, meaning."""

    name: str
    default: str
    meaning: str


def collect_sections() -> dict[str, list[Row]]:
    """Return the settings of a preset by section; the top level has an empty name."""
    rows = {"": list(_make_rows(PipelineSettings))}
    for stage, model in SETTINGS.items():
        resources = {name: str(value) for name, value in RESOURCES[stage].model_dump().items()}
        rows[stage] = list(_make_rows(model, left_out=(*SHARED, "gpus")))
        rows[stage] += [row._replace(default=resources[row.name]) for row in _make_rows(type(RESOURCES[stage]))]
    return rows | {SEARCH: list(_make_rows(SearchSettings)), "cluster": list(_make_rows(ClusterConfig))}


def help_text() -> str:
    """Return the settings as the end of a help text, in paragraphs that click does not rewrap."""
    parts = ["Settings, for --set and presets:"]
    for section, rows in collect_sections().items():
        prefix = f"{section}." if section else ""
        lines = [_format_line(row, prefix) for row in rows]
        parts.append("\b\n" + "\n".join(lines))
    return "\n\n".join(parts)


def stage_help_text(stage: str) -> str:
    """Return the keys of a stage's configuration file as the end of a help text."""
    settings = SETTINGS[stage].model_fields
    lines = ["example:", f"  python -m minitron.{stage} --config {stage}.yaml", ""]
    lines += ["settings in the configuration file:", *map(_format_line, _make_rows(SETTINGS[stage]))]
    lines += ["", "inputs and outputs in the file:", *map(_format_line, _make_rows(STAGES[stage], left_out=settings))]
    return "\n".join(lines)


def reference_page() -> str:
    """Return docs/reference/parameters.md."""
    parts = [
        "# Parameters",
        "Generated from the models in `minitron/config` by `make docs`.",
        "## Settings of a preset",
    ]
    parts.append("The top level of a preset has the settings that all stages share. Each stage has a section.")
    for section, rows in collect_sections().items():
        parts.append(_format_table(f"`{section}`" if section else "All stages", rows))
    parts.append("## Parameters of the pipelines")
    for name in PIPELINES:
        parts.append(_format_table(f"`{name}`", list(_make_pipeline_rows(name))))
    parts.append("## Configuration of a stage run alone")
    parts.append("FILE in `python -m minitron.STAGE --config FILE` has the stage's settings, inputs and these keys.")
    parts.append(_format_table("Every stage", list(_make_rows(StageConfig, left_out=StageSettings.model_fields))))
    for stage, model in STAGES.items():
        left_out = {*StageConfig.model_fields, *SETTINGS[stage].model_fields}
        parts.append(_format_table(f"Inputs of `{stage}`", list(_make_rows(model, left_out=left_out))))
    return "\n\n".join(parts) + "\n"


def _make_rows(model: type[BaseModel], left_out: Collection[str] = ()) -> Iterator[Row]:
    for name, field in model.model_fields.items():
        if name not in left_out:
            yield Row(name, "required" if field.is_required() else str(field.default), field.description or "")


def _make_pipeline_rows(pipeline: str) -> Iterator[Row]:
    """Yield the parameters of a compiled pipeline."""
    for name, entry in get_parameters(compiled_pipeline(pipeline)).items():
        default = str(entry["defaultValue"]) if "defaultValue" in entry else "none"
        yield Row(name, default if entry.get("isOptional") else "required", inspect.cleandoc(entry["description"]))


def _format_line(row: Row, prefix: str = "") -> str:
    return f"  {prefix}{row.name}={row.default}  {row.meaning}"


def _format_table(title: str, rows: list[Row]) -> str:
    lines = [
        f"| `{name}` | {_format_default(default)} | {' '.join(meaning.split())} |" for name, default, meaning in rows
    ]
    return "\n".join([f"### {title}", "", "| name | default | meaning |", "|---|---|---|", *lines])


def _format_default(default: str) -> str:
    return default if default in ("required", "none") else f"`{default}`" if default else "empty"


if __name__ == "__main__":
    print(reference_page(), end="")
