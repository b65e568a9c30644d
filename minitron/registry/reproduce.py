"""The preset that runs a registered model's pipeline again, from its lineage.

    minitron reproduce models:/NAME/7 --output again.yaml
    minitron run compress --preset again.yaml --work-dir runs/again

With the same package, inputs and settings every stage has the same key. A result that still exists is reused. Changed
inputs are refused, because the preset has their hashes as `expected_sha256`. The new version gets an alias of its own.
"""

from collections.abc import Iterator
from typing import Any

import yaml

from minitron.config.document import known_keys
from minitron.config.fields import EXECUTION, INPUT
from minitron.config.parse import find_marked_fields
from minitron.config.pipelines import compiled_pipeline, get_parameters
from minitron.config.stages import STAGES
from minitron.errors import ConfigError

PIPELINE = "compress"

ALIAS = "reproduced"
"""Alias of the new version; the alias that `promote` looks for does not move."""

_WHERE = {"output", "workspace", "caching", "expected_sha256", "importance"}
"""Settings that the preset leaves out: the user chooses where results are stored and what is expected, and scores that
another run left behind only saved time."""


_HELD = {"prepare": ("corpus", "teacher"), "finetune": ("teacher", "dataset")}
"""Inputs whose content must not change, beside those in a stage's section. A dataset is the same on every machine, a
model on the same kind of machine."""


def write_preset(lineage: dict[str, Any]) -> str:
    """Return the text of a preset.

    Args:
        lineage: as `lineage.read_lineage` returns it.

    Raises:
        ConfigError: a stage has no record, or the stages do not belong to one run of the pipeline.
    """
    records = lineage["stages"]
    if missing := [stage for stage in STAGES if stage not in records]:
        raise ConfigError(
            f"{lineage['version']}: no record of {', '.join(missing)}, so not all settings are known; give a version "
            "that the whole pipeline made"
        )
    shared, sections = _merge_settings(lineage)
    sections["register"]["alias"] = ALIAS
    parts = ["\n".join(f"# {line}" for line in _list_comments(lineage)), _dump_yaml(shared)]
    for stage, section in sections.items():
        made = records[stage].get("output_sha256")  # register wrote the lineage before its own result
        parts.append((f"# result sha256 {made}\n" if made else "") + _dump_yaml({stage: section}))
    return "\n".join(parts)


def _list_comments(lineage: dict[str, Any]) -> Iterator[str]:
    records = lineage["stages"]
    versions = records["distill"]["versions"]
    yield f"Reproduces {lineage['version']}: minitron run {PIPELINE} --preset FILE"
    package, method = versions["minitron"], versions.get("method", versions["minitron"])
    yield f"Made by minitron-pipelines {package}, method {method}; with another method every stage runs again."
    made = {record.get("output_sha256") for record in records.values()}
    inputs: dict[str, str] = {}
    for record in records.values():
        for name, entry in record["inputs"].items():
            inputs.setdefault(entry["sha256"], f"{name}: {entry.get('pinned', entry['address'])}")
    for sha256, text in inputs.items():
        if sha256 not in made:
            yield text
            yield f"  sha256 {sha256}"
    for image in sorted({record["image"] for record in records.values() if record.get("image")}):
        yield f"image {image}"


def _merge_settings(lineage: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the settings that the stages share, and each stage's own."""
    known = {*known_keys(), *get_parameters(compiled_pipeline(PIPELINE))}
    shared: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for stage, record in lineage["stages"].items():
        # The record of a reused stage names the inputs and the experiment of its own run.
        may_differ = {*find_marked_fields(STAGES[stage], INPUT), *find_marked_fields(STAGES[stage], EXECUTION)}
        for name, value in _read_settings(record).items():
            if f"{stage}.{name}" in known:
                sections.setdefault(stage, {})[name] = value
            elif name in known and shared.setdefault(name, value) != value and name not in may_differ:
                raise ConfigError(
                    f"{lineage['version']}: {name} is {shared[name]} in one stage and {value} in {stage}, but pipeline "
                    f"{PIPELINE} has one for all; run the stages by hand with the settings that minitron lineage shows"
                )
        expected = {
            name: entry["sha256"]
            for name, entry in record["inputs"].items()
            if "pinned" not in entry or "parts" in entry
        }
        given = [name for name in expected if f"{stage}.{name}" in known or name in _HELD.get(stage, ())]
        if given:
            sections.setdefault(stage, {})["expected_sha256"] = {name: expected[name] for name in given}
    return shared, sections


def _read_settings(record: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a stage, with pinned addresses and absolute paths."""
    settings = {name: value for name, value in record["config"].items() if value is not None and name not in _WHERE}
    return settings | {name: entry.get("pinned", entry["address"]) for name, entry in record["inputs"].items()}


def _dump_yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
