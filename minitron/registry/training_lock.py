"""The training lock: two pipeline runs that overlap do not train the same model.

A run writes on itself what it makes and since when, waits a moment, and looks who else makes the same: the earliest one
that lives goes on, the others end. It lives until it has an outcome, or gives no sign of life for ten minutes.
"""

import hashlib
import json
import time
from typing import TYPE_CHECKING

from minitron.tracking.pipeline_run import ALIVE_TAG, OUTCOME_TAG, list_stage_runs

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_CLAIM_TAG = "minitron.makes"
"""Tag of a pipeline run: the digest of what it makes, and the time of its claim in seconds since 1970."""

_SETTLING_SECONDS = 2
"""Seconds between writing a claim and reading those of others, so that two that claim at once see each other."""

SILENCE_SECONDS = 600
"""A run without a sign of life for this long is lost, or waits for a node; a stage gives one every minute."""


def claim_training(client: "MlflowClient", run: "Run", made_from: dict[str, str]) -> str | None:
    """Claim the training of a model for a pipeline run; the same run may claim again.

    Args:
        client: MLflow's.
        run: the pipeline run's, in the experiment that its rivals use.
        made_from: fingerprint and name of the model.

    Returns:
        None, or a description of the run that has the claim.
    """
    run_id, now = run.info.run_id, time.time()
    if OUTCOME_TAG in run.data.tags:  # an earlier attempt of the same run ended
        client.delete_tag(run_id, OUTCOME_TAG)
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    client.set_tag(run_id, _CLAIM_TAG, f"{digest} {now}")
    time.sleep(_SETTLING_SECONDS)
    for rival in client.search_runs([run.info.experiment_id], f"tags.`{_CLAIM_TAG}` LIKE '{digest} %'"):
        earlier = (_read_claim_time(rival), rival.info.run_id) < (now, run_id)
        if rival.info.run_id != run_id and earlier and OUTCOME_TAG not in rival.data.tags:
            seconds = time.time() - _read_last_sign_of_life(client, rival)
            if seconds <= SILENCE_SECONDS:
                return f"run {rival.info.run_name}, last heard of {seconds / 60:.0f} minutes ago,"
    return None


def _read_claim_time(run: "Run") -> float:
    return float(run.data.tags[_CLAIM_TAG].split()[1])


def _read_last_sign_of_life(client: "MlflowClient", run: "Run") -> float:
    stages = list_stage_runs(client, run)
    moments = [moment / 1000 for entry in stages for moment in (entry.info.start_time, entry.info.end_time) if moment]
    signs = [float(entry.data.tags[ALIVE_TAG]) for entry in stages if ALIVE_TAG in entry.data.tags]
    return max([_read_claim_time(run), *moments, *signs])
