"""The training lock: two pipeline runs that overlap do not train the same model.

A parameter of an MLflow run can be written only once, in every store that MLflow has. The run that writes it first has
the claim. A claim ends with the outcome of its run, or after a day without a sign of life.
"""

import hashlib
import json
import random
import time
from typing import TYPE_CHECKING

from minitron.tracking.client import find_active_run, search_runs
from minitron.tracking.pipeline_run import ALIVE_TAG, OUTCOME_TAG, list_stage_runs
from minitron.tracking.write_once import write_once

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_CANDIDATE, _ADOPTED = "minitron.registry.training_lock", "minitron.registry.training_lock.adopted"
"""Tags of the run that holds the claims: a candidate for it, and the one that was adopted."""

_MAKER_SECONDS = 120
"""Seconds that a process may take to adopt the run that it created; clocks may differ."""

SILENCE_SECONDS = 24 * 3600
"""A run without a sign of life for this long is lost: as long as a task may wait for its node."""


def claim_training(client: "MlflowClient", run: "Run", made_from: dict[str, str]) -> str | None:
    """Claim the training of a model for a pipeline run; the same run may claim again.

    Args:
        client: MLflow's.
        run: the pipeline run's, in the experiment that its rivals use.
        made_from: fingerprint and name of the model.

    Returns:
        None, or a description of the run that has the claim.
    """
    run_id = run.info.run_id
    if OUTCOME_TAG in run.data.tags:  # an earlier attempt of the same run ended
        client.delete_tag(run_id, OUTCOME_TAG)
    claims_run = _find_or_create_claims_run(client, run.info.experiment_id)
    prefix = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    while True:
        parameters = client.get_run(claims_run).data.params
        claims = sorted(name for name in parameters if name.startswith(f"{prefix}."))
        holder = parameters[claims[-1]] if claims else None
        if holder == run_id:
            return None
        if holder and (rival := _describe_active_run(client, holder)):
            return rival
        if write_once(client, claims_run, f"{prefix}.{len(claims):04d}", run_id) == run_id:
            return None


def _find_or_create_claims_run(client: "MlflowClient", experiment_id: str) -> str:
    """Return the run that holds the claims, the same for all processes; create it if it does not exist.

    A process adopts the run that it created if there is no other one afterwards; a later process then finds it. A run
    whose creator died before adopting it is deleted. A creator that was only slow fails.
    """
    while True:
        if adopted := search_runs(client, experiment_id, _ADOPTED, "yes"):
            return adopted[0].info.run_id
        made = client.create_run(experiment_id, run_name="claims", tags={_CANDIDATE: "yes"}).info.run_id
        others = [run for run in search_runs(client, experiment_id, _CANDIDATE, "yes") if run.info.run_id != made]
        if not others:
            client.set_tag(made, _ADOPTED, "yes")
            client.set_terminated(made)  # nothing runs in it
            return made
        client.delete_run(made)
        for run in others:
            if _ADOPTED not in run.data.tags and time.time() - run.info.start_time / 1000 > _MAKER_SECONDS:
                client.delete_run(run.info.run_id)
        time.sleep(random.uniform(0, 1))


def _describe_active_run(client: "MlflowClient", run_id: str) -> str | None:
    """Describe a run that is active; None if it has ended or is lost."""
    if (run := find_active_run(client, run_id)) is None:
        return None
    seconds = time.time() - _read_last_sign_of_life(client, run)
    if OUTCOME_TAG in run.data.tags or seconds > SILENCE_SECONDS:
        return None
    return f"run {run.info.run_name}, last heard of {seconds / 60:.0f} minutes ago,"


def _read_last_sign_of_life(client: "MlflowClient", run: "Run") -> float:
    runs = [run, *list_stage_runs(client, run)]
    moments = [moment for entry in runs for moment in (entry.info.start_time, entry.info.end_time) if moment]
    signs = [float(entry.data.tags[ALIVE_TAG]) for entry in runs if ALIVE_TAG in entry.data.tags]
    return max([*(moment / 1000 for moment in moments), *signs])
