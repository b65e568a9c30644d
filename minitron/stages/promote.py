"""Make a version of a registered model the champion, if it meets its gates; take that back.

    minitron promote minitron
    minitron rollback minitron --why "wrong licence"

What its gates found is in evaluation.json of the version's MLflow run. They are judged again where the champion has
changed since; who moved which alias when is in the promotion log.
"""

from typing import Any

from minitron.config.tasks import PromoteConfig
from minitron.registry.promotion import GatesFailed, NotJudged, Promotion, find_version, promote
from minitron.registry.versions import GATE_OUTCOME_TAG
from minitron.storage.files import replace_directory, write_atomically
from minitron.storage.layout import PROMOTED
from minitron.tracking.client import connect, one_line_errors
from minitron.tracking.pipeline_run import join_pipeline_run, record_outcome

__all__ = ["run"]


def run(config: PromoteConfig) -> dict[str, Any]:
    """Promote a version within a pipeline run; write `promoted.json` to `config.output`: the outcome, and why.

    A version that does not meet its gates stays what it is: that is an outcome, no failure.
    """
    uri, name, run_id = config.tracking_uri, config.model_name, config.pipeline_run_id
    with one_line_errors(uri):
        client = connect(uri)
        version = find_version(client, name, config.version)
    decision: str | None
    try:
        done = promote(uri, name, version, config.why, run_id)
        outcome, rows, decision = "promoted", done.gates, _decision(done)
        reason = f"version {version} of {name} is the champion: {decision}"
    except GatesFailed as error:
        outcome, rows, reason = "challenger", [], str(error)
        decision = None if isinstance(error, NotJudged) else reason
    with one_line_errors(uri):
        if decision:
            client.set_model_version_tag(name, str(version), GATE_OUTCOME_TAG, decision)
        if (parent := join_pipeline_run(client, config)) is not None:
            record_outcome(client, parent.info.run_id, outcome, reason)
    print(f"promote: {outcome}: {reason}", flush=True)
    found = {"name": name, "version": version, "outcome": outcome, "reason": reason, "gates": rows}
    with replace_directory(config.output) as directory:
        write_atomically(directory / PROMOTED, found)
    return {"metrics": {"promoted": int(outcome == "promoted")}} | found


def _decision(done: Promotion) -> str:
    """Return why a version became the champion: true of it when another one is."""
    if done.move is None:
        return "it was that already"
    return "it met its gates" if done.gates else "no gates were declared"
