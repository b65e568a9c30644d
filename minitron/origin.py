"""What a model is made from: the data, the teacher, and every setting that decides its weights, a hash of each.

register writes it on the version; resolve compares it with what there is today, before anything costly is started.
"""

import hashlib
import json
from typing import Any

from minitron import __version__
from minitron.config import EXECUTION, INPUT, STAGES, fields_marked, parse
from minitron.presets import stage_values

MADE_BY = ("prepare", "finetune", "prune", "distill")
"""The stages that decide a student's weights."""

SHARED = ("sequence_length", "seed", "engine")
"""The pipeline's parameters that several of them get."""

TAG = "made_from"
"""Tag of a version in MLflow's registry: its student's origin, as JSON."""

Origin = dict[str, str]
"""Hashes of `corpus`, `teacher` and `settings`, and the version of `minitron`."""


def of_records(records: dict[str, dict[str, Any]]) -> Origin | None:
    """Return the origin of a student from the records of its stages; None if one of them is missing."""
    if not records.keys() >= set(MADE_BY):
        return None
    prepare = records["prepare"]
    given = {name: entry["sha256"] for name, entry in prepare["inputs"].items()}
    configs = {stage: records[stage]["config"] for stage in MADE_BY}
    return _origin(configs, given["corpus"], given["teacher"], prepare["versions"]["minitron"])


def of_arguments(arguments: dict[str, Any], corpus: str, teacher: str) -> Origin:
    """Return the origin that a run of the pipeline would give its student.

    Args:
        arguments: the pipeline's.
        corpus: hash of the corpus's content, or its snapshot.
        teacher: hash of the base model's content.

    Raises:
        ConfigError: an argument has a value of the wrong kind.
    """
    configs = {stage: parse(stage, stage_values(stage, arguments)).model_dump(mode="json") for stage in MADE_BY}
    return _origin(configs, corpus, teacher, __version__)


def parameters() -> list[str]:
    """Return the pipeline's parameters that decide a student's weights, the addresses of its inputs left out."""
    own = [f"{stage}_{name}" for stage in MADE_BY for name in _settings(stage) if name not in SHARED]
    return [*SHARED, *own]


def _origin(configs: dict[str, dict[str, Any]], corpus: str, teacher: str, version: str) -> Origin:
    settings = {stage: {name: config[name] for name in _settings(stage)} for stage, config in configs.items()}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return {"corpus": corpus, "teacher": teacher, "settings": digest, "minitron": version}


def _settings(stage: str) -> list[str]:
    model = STAGES[stage]
    left_out = {*fields_marked(model, EXECUTION), *fields_marked(model, INPUT)}
    return [name for name in model.model_fields if name not in left_out]
