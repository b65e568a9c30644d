"""The tree that `minitron lineage` prints."""

import json
from collections.abc import Iterable
from typing import Any

from rich.text import Text
from rich.tree import Tree

from minitron.config.metrics import format_count, format_duration, format_loss, format_megabytes, format_moment
from minitron.registry.lineage import compute_gpu_hours, count_tokens, format_license
from minitron.registry.promotion_log import FORCED_TAG, PROMOTED_TAG


def make_tree(lineage: dict[str, Any]) -> Tree:
    """Return a lineage as a tree: version, stages, facts of each stage."""
    root = Tree(Text(lineage["version"], "bold"))
    licenses = lineage["licences"]
    root.add(_make_line("licenses", f"corpus {licenses['data']}, teacher {format_license(licenses['teacher'])}"))
    if lineage.get("promotion"):
        root.add(_make_line("promoted", _describe_promotion(lineage["promotion"])))
    for stage, record in lineage["stages"].items():
        branch = root.add(
            Text.assemble((stage, "bold"), f"  {format_moment(record['started'])}, {_format_cost(record)}")
        )
        for label, text in _list_facts(record):
            branch.add(_make_line(label, text))
    return root


def _describe_promotion(tags: dict[str, str]) -> str:
    text = f"{tags[PROMOTED_TAG]} by {tags['promoted_by']}"
    text += f", overruling its gates ({forced})" if (forced := tags.get(FORCED_TAG)) else ""
    return text + (f": {why}" if (why := tags.get("promoted_why")) else "")


def _make_line(label: str, text: str) -> Text:
    return Text.assemble((f"{label}: ", "dim"), text)


def _format_cost(record: dict[str, Any]) -> str:
    parts = [format_duration(record["seconds"]), f"{format_megabytes(record['peak_rss_mb'])} peak memory"]
    if total := count_tokens(record):
        parts.append(f"{format_count(total)} tokens")
    if record.get("gpus"):
        parts.append(f"{compute_gpu_hours(record):.2f} GPU-hours on {record['gpus']} GPUs")
    return ", ".join(parts)


def _list_facts(record: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield label and text of the facts in a record."""
    for name, entry in record["inputs"].items():
        yield name, f"{entry.get('pinned', entry['address'])} sha256 {entry['sha256']}"
    inputs = set(record["inputs"]) | {"output", "workspace", "pipeline_run_id"}
    settings = {name: value for name, value in record["config"].items() if name not in inputs and value is not None}
    yield "settings", " ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())
    yield "versions", " ".join(f"{name} {version}" for name, version in record["versions"].items())
    yield "image", record.get("image") or "none"
    yield "runs", f"pipeline {record.get('pipeline_run_id') or 'none'}, MLflow {record.get('mlflow_run_id') or 'none'}"
    if losses := [row["validation_loss"] for row in record.get("history", []) if "validation_loss" in row]:
        yield "validation loss", " → ".join(map(format_loss, losses))
    if "output_sha256" in record:
        yield "result", f"sha256 {record['output_sha256']}"
