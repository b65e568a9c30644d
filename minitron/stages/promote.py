"""Make a version of a registered model the champion if it meets its gates: a task of the pipeline `retrain`.

Its judged gates are in evaluation.json of the version's MLflow run. registry/promotion.py judges them again if the
champion has changed since.
"""

from typing import Any

from minitron.config.stages import PromoteConfig
from minitron.registry.promotion import GatesFailed, NotJudged, Promotion, find_version, promote
from minitron.registry.versions import GATE_OUTCOME_TAG
from minitron.storage.files import write_atomically
from minitron.storage.layout import PROMOTED
from minitron.storage.staging import replace_directory
from minitron.tracking.client import connect, one_line_errors
from minitron.tracking.pipeline_run import join_pipeline_run, record_outcome

__all__ = ["run"]


def run(config: PromoteConfig) -> dict[str, Any]:
    """Promote a version within a pipeline run; write `promoted.json` to `config.output`: the outcome, and why.

    A version that does not meet its gates stays the challenger; the task succeeds nevertheless.
    """
    uri, name, run_id = config.tracking_uri, config.model_name, config.pipeline_run_id
    with one_line_errors(uri):
        client = connect(uri)
        version = find_version(client, name, config.version)
    gate_outcome: str | None
    try:
        promotion = promote(uri, name, version, config.why, run_id)
        outcome, verdict, rows, gate_outcome = "promoted", "promoted", promotion.gates, _explain_promotion(promotion)
        reason = f"version {version} of {name} is the champion: {gate_outcome}"
    except GatesFailed as error:
        outcome, verdict, rows, reason = "challenger", error.verdict, [], str(error)
        gate_outcome = None if isinstance(error, NotJudged) else reason
    with one_line_errors(uri):
        if gate_outcome:
            client.set_model_version_tag(name, str(version), GATE_OUTCOME_TAG, gate_outcome)
        if (parent := join_pipeline_run(client, config, name)) is not None:
            record_outcome(client, parent.info.run_id, outcome, reason, verdict)
    print(f"promote: {outcome}: {reason}", flush=True)
    result = {"name": name, "version": version, "outcome": outcome, "reason": reason, "gates": rows}
    with replace_directory(config.output) as directory:
        write_atomically(directory / PROMOTED, result)
    return {"metrics": {"promoted": int(outcome == "promoted")}} | result


def _explain_promotion(promotion: Promotion) -> str:
    """Return why a version became the champion, in words that stay true when another version becomes the champion."""
    if promotion.move is None:
        return "it already was"
    return "it met its gates" if promotion.gates else "no gates were declared"
