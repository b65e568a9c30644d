"""The fingerprint of a model: hashes of the corpus, the teacher, and the settings that decide its weights.

register writes it on the version. resolve compares it with that of the present inputs before a costly stage starts.
"""

import hashlib
import json
from typing import Any

from minitron import METHOD_VERSION
from minitron.config.document import Plan
from minitron.config.fields import EXECUTION, INPUT
from minitron.config.parse import find_marked_fields
from minitron.config.settings import SETTINGS

MADE_BY = ("prepare", "finetune", "prune", "distill")
"""The stages that decide a student's weights."""

TAG = "made_from"
"""Tag of a version in MLflow's registry: its fingerprint, as JSON."""

Fingerprint = dict[str, str]
"""Hashes of `corpus`, `teacher` and `settings`, and under `minitron` the version of the method."""


def fingerprint_records(records: dict[str, dict[str, Any]]) -> Fingerprint | None:
    """Return the fingerprint of a student from the records of its stages; None if one of them is missing."""
    if not records.keys() >= set(MADE_BY):
        return None
    prepare = records["prepare"]
    hashes = {name: entry["sha256"] for name, entry in prepare["inputs"].items()}
    configs = {stage: records[stage]["config"] for stage in MADE_BY}
    versions = prepare["versions"]
    method = versions.get("method", versions["minitron"])  # records of 0.1.0 have one version for both
    return _build_fingerprint(configs, hashes["corpus"], hashes["teacher"], method)


def fingerprint_plan(plan: Plan, corpus: str, teacher: str) -> Fingerprint:
    """Return the fingerprint that a run of the pipeline would give its student.

    Args:
        plan: the settings of the run.
        corpus: hash of the corpus's content, or its snapshot.
        teacher: hash of the teacher's content.
    """
    configs = {stage: plan.stages[stage].model_dump(mode="json") for stage in MADE_BY}
    return _build_fingerprint(configs, corpus, teacher, METHOD_VERSION)


def _build_fingerprint(configs: dict[str, dict[str, Any]], corpus: str, teacher: str, method: str) -> Fingerprint:
    settings = {  # a record of an earlier version lacks the settings that came later
        stage: {name: config[name] for name in _list_decisive_settings(stage) if name in config}
        for stage, config in configs.items()
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return {"corpus": corpus, "teacher": teacher, "settings": digest, "minitron": method}


def _list_decisive_settings(stage: str) -> list[str]:
    model = SETTINGS[stage]
    left_out = {*find_marked_fields(model, EXECUTION), *find_marked_fields(model, INPUT)}
    return [name for name in model.model_fields if name not in left_out]
