"""The fingerprint of a model: hashes of the corpus, the teacher, and the settings that affect its weights.

register writes it as a tag of the version. resolve compares it with the fingerprint of the present inputs before an
expensive stage starts.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from minitron import METHOD_VERSION
from minitron.config.document import Plan
from minitron.config.parse import list_decisive_settings
from minitron.config.stages import SETTINGS
from minitron.registry.versions import get_tag

MADE_BY = ("prepare", "finetune", "prune", "distill")
"""The stages that affect a student's weights."""

TAG = "minitron.made_from"
"""Tag of a version in MLflow's registry: its fingerprint, as JSON."""

KEPT = "keep_sha256"
"""Entry of prune's settings in a fingerprint: the hash of the lists of what to keep, if there are any."""

_DECISIVE_UNTIL_0_3 = ("micro_batch_size", "gradient_checkpointing", "checkpoint_interval")

Fingerprint = dict[str, str]
"""Hashes of `corpus`, `teacher` and `settings`, and the version of the method as `minitron`."""


def fingerprint_records(records: dict[str, dict[str, Any]]) -> Fingerprint | None:
    """Return the fingerprint of a student from the records of its stages; None if one of them is missing."""
    if not records.keys() >= set(MADE_BY):
        return None
    prepare = records["prepare"]
    hashes = {name: entry["sha256"] for name, entry in prepare["inputs"].items()}
    configs = {stage: records[stage]["config"] for stage in MADE_BY}
    if kept := records["prune"]["inputs"].get("keep"):
        configs["prune"] = configs["prune"] | {KEPT: kept["sha256"]}
    versions = prepare["versions"]
    method = versions.get("method", versions["minitron"])  # records of 0.1.0 have one version for both
    return _build_fingerprint(configs, hashes["corpus"], hashes["teacher"], method)


def fingerprint_plan(plan: Plan, corpus: str, teacher: str, kept: str | None = None) -> Fingerprint:
    """Return the fingerprint that a run of the pipeline would give its student.

    Args:
        plan: the settings of the run.
        corpus: hash of the corpus's content, or its snapshot.
        teacher: hash of the teacher's content.
        kept: hash of the lists of what to keep, if `prune.keep` is set.
    """
    return _build_fingerprint(_list_configs(plan, kept), corpus, teacher, METHOD_VERSION)


def read_fingerprint(tags: Mapping[str, str], plan: Plan) -> Fingerprint | None:
    """Return the fingerprint in a version's tags; None if there is none.

    Until 0.3 the digest of the settings also covered settings without an effect. A digest that 0.3 would have given the
    plan is converted to the present one, so that an upgrade alone trains nothing.
    """
    try:
        content = json.loads(get_tag(tags, TAG) or "null")
    except ValueError:  # not written by register
        return None
    if not isinstance(content, dict):
        return None
    configs = _list_configs(plan)
    if content.get("settings") == _hash_settings(configs, also=_DECISIVE_UNTIL_0_3):
        content["settings"] = _hash_settings(configs)
    return content


def _list_configs(plan: Plan, kept: str | None = None) -> dict[str, dict[str, Any]]:
    configs = {stage: plan.stages[stage].model_dump(mode="json") for stage in MADE_BY}
    if kept:
        configs["prune"][KEPT] = kept
    return configs


def _build_fingerprint(configs: dict[str, dict[str, Any]], corpus: str, teacher: str, method: str) -> Fingerprint:
    return {"corpus": corpus, "teacher": teacher, "settings": _hash_settings(configs), "minitron": method}


def _hash_settings(configs: dict[str, dict[str, Any]], also: tuple[str, ...] = ()) -> str:
    settings = {  # a record of an earlier version lacks later settings
        stage: {
            name: config[name]
            for name in (*list_decisive_settings(SETTINGS[stage], config), KEPT, *also)
            if name in config
        }
        for stage, config in configs.items()
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
