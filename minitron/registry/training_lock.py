"""The training lock: two overlapping pipeline runs do not train the same model.

A run writes a claim as its own tag: the model that it makes, and the time. It waits a moment and looks for other runs
with the same claim. The earliest live run continues, the others end. A run is live until it has an outcome, or gives no
sign of life for ten minutes.
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
"""Tag of a pipeline run: the digest of the model that it makes, and the time of its claim in seconds since 1970."""

_SETTLING_SECONDS = 2
"""Seconds between writing a claim and reading other claims, so that two simultaneous claims see each other."""

SILENCE_SECONDS = 600
"""After so long without a sign of life a run is lost, or waits for a node; a stage gives a sign every minute."""


def claim_training(client: "MlflowClient", run: "Run", made_from: dict[str, str]) -> str | None:
    """Claim the training of a model for a pipeline run; the same run may claim again.

    Args:
        client: MLflow's.
        run: MLflow's run of the pipeline, in the experiment that its rivals use.
        made_from: fingerprint and name of the model.

    Returns:
        None, or a description of the other run that has the claim.
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
                return f"run {rival.info.run_name}, last sign of life {seconds / 60:.0f} minutes ago,"
    return None


def _read_claim_time(run: "Run") -> float:
    return float(run.data.tags[_CLAIM_TAG].split()[1])


def _read_last_sign_of_life(client: "MlflowClient", run: "Run") -> float:
    stages = list_stage_runs(client, run)
    moments = [moment / 1000 for entry in stages for moment in (entry.info.start_time, entry.info.end_time) if moment]
    signs = [float(entry.data.tags[ALIVE_TAG]) for entry in stages if ALIVE_TAG in entry.data.tags]
    return max([_read_claim_time(run), *moments, *signs])
