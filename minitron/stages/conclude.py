"""Record how a pipeline run ended, whether it succeeded or failed: the last task of the pipeline `retrain`.

It writes conclusion.html, which Kubeflow shows, and the outcome in MLflow. Then another run may train the same model.
"""

from typing import Any

from minitron.config.stages import ConcludeConfig
from minitron.errors import MinitronError, without_password
from minitron.report import render_page
from minitron.runtime.record import read_failure_note
from minitron.storage.files import write_atomically
from minitron.storage.layout import CONCLUSION, CONCLUSION_PAGE
from minitron.storage.staging import replace_directory
from minitron.tracking import pipeline_run as runs
from minitron.tracking.client import connect, fail_fast, one_line_errors


def run(config: ConcludeConfig) -> dict[str, Any]:
    """Write `conclusion.json` and `conclusion.html` to `config.output`, and the outcome to the pipeline's run.

    Raises:
        ConfigError, RunError: MLflow did not receive the outcome. The page is written nevertheless.
    """
    failure = None
    try:
        with one_line_errors(config.tracking_uri), fail_fast():
            conclusion = _read_or_set_outcome(config)
    except MinitronError as error:  # a failed run needs the page most
        reason = f"{config.message or config.state}; {error}"
        conclusion = {"outcome": "failed", "reason": reason, "run_id": None, "model": None}
        failure = error
    conclusion |= {"pipeline_run_id": config.pipeline_run_id, "mlflow": without_password(config.tracking_uri)}
    print(f"conclude: {conclusion['outcome']}: {conclusion['reason']}", flush=True)
    with replace_directory(config.output) as directory:
        write_atomically(directory / CONCLUSION, conclusion)
        (directory / CONCLUSION_PAGE).write_text(render_page("conclusion.html.j2", conclusion), encoding="utf-8")
    if failure:
        raise failure  # Kubeflow tries again, and the next attempt writes the outcome
    runs.log_pages("conclude", config, CONCLUSION_PAGE)
    return {"metrics": {"failed": int(conclusion["outcome"] == "failed")}} | conclusion


def _read_or_set_outcome(config: ConcludeConfig) -> dict[str, Any]:
    """Return outcome and reason; a run without a recorded outcome failed, whatever state Kubeflow gives it."""
    client = connect(config.tracking_uri, create=True)
    run = runs.join_pipeline_run(client, config)
    assert run is not None  # there is a pipeline_run_id
    run_id, tags = run.info.run_id, run.data.tags
    if runs.OUTCOME_TAG in tags:
        outcome, reason = tags[runs.OUTCOME_TAG], tags[runs.REASON_TAG]
    else:
        reasons = (
            runs.find_failure(client, run),
            _read_failure_note(config),
            config.message,
            runs.NO_REASON,
        )
        outcome, reason = "failed", next(filter(None, reasons))
        runs.record_outcome(client, run_id, outcome, reason)
    return {"outcome": outcome, "reason": reason, "run_id": run_id, "model": tags.get(runs.MODEL_TAG)}


def _read_failure_note(config: ConcludeConfig) -> str | None:
    """Return the message that a failed task left in the workspace; some tasks have no run in MLflow."""
    note = read_failure_note(config.workspace)
    return f"{note['stage']}: {note['message']}" if note.get("pipeline_run_id") == config.pipeline_run_id else None
