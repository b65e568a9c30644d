"""Metrics on their way to MLflow, while a stage runs.

Without a tracking URI nothing is logged and mlflow is not imported. Every stage is a run; the stages of one pipeline
run are nested in one parent run. A server that cannot be reached when a stage starts is an error; one that goes away
later costs the training nothing: metrics wait until it answers again.

Watch a local run:

    mlflow ui --backend-store-uri sqlite:///mlflow.db
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from minitron.config import StageConfig
from minitron.mlflow_client import connect, experiment_id, explained, hurry, reason, search, shown, undisturbed
from minitron.pipeline_run import ERROR_TAG, PARENT_TAG, pipeline_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

KEY_TAG = "minitron.key"

_PAUSE_SECONDS = 30
# MLflow's limits: characters of a parameter and of a tag, parameters and metrics per request.
_PARAMETER_LENGTH, _TAG_LENGTH, _PARAMETERS_PER_CALL, _METRICS_PER_CALL = 6000, 5000, 100, 1000


class Tracker:
    """Where a stage reports: this one, used without a tracking URI, keeps nothing.

    Attributes:
        identity: the stage's name, key and inputs, as its record has them.
    """

    def __init__(self, identity: dict[str, Any]) -> None:
        """Remember whose tracker it is."""
        self.identity = identity

    def log(self, metrics: dict[str, float], step: int = 0) -> None:
        """Log metrics at a step, now."""

    def finish(self, record: dict[str, Any]) -> None:
        """Log the finished stage's record: its metrics and stage.json."""


class MlflowTracker(Tracker):
    """A stage's run in MLflow.

    Attributes:
        client: what every call goes through; mlflow's global state is never used.
        experiment_id: experiment of both runs.
        run_id: the stage's own run.
        pipeline_run_id: the parent run, where the whole pipeline's results go; the stage's own when it has no parent.
    """

    def __init__(self, client: "MlflowClient", config: StageConfig, identity: dict[str, Any]) -> None:
        """Join or open the runs, and log the configuration."""
        super().__init__(identity)
        self.client = client
        parent = pipeline_run(client, config)
        self._owns_parent = parent is not None and "MLFLOW_RUN_ID" not in os.environ
        self.experiment_id = parent.info.experiment_id if parent else experiment_id(client, config.experiment)
        self.run_id = self._open(config, parent.info.run_id if parent else None)
        self.pipeline_run_id = parent.info.run_id if parent else self.run_id
        self._pending: list[Any] = []
        self._last_step, self._silent_until = 0, 0.0

    def log(self, metrics: dict[str, float], step: int = 0) -> None:
        """Send metrics now; while the server is away they are kept, and sent with the first call that succeeds."""
        self._add(metrics, step)
        if time.monotonic() >= self._silent_until:
            with self._unharmed("its metrics are sent when it answers again"), hurry():
                self._send()

    def finish(self, record: dict[str, Any]) -> None:
        """Send the record, with mlflow's own patience (MLFLOW_HTTP_REQUEST_MAX_RETRIES): it is the run's end."""
        self._add(record["metrics"], self._last_step)
        with self._unharmed("the end of its run is missing there; stage.json has it"):
            self._send()
            self.client.log_text(self.run_id, json.dumps(record, indent=2), "stage.json")

    def close(self, status: str, error: BaseException | None = None) -> None:
        """End the run as FINISHED, FAILED or KILLED; a parent run that a stage opened ends with its latest stage.

        The status goes first: the server may take no more than one call before Kubernetes ends the task.
        """
        with self._unharmed(f"its run could not be marked {status}"), hurry():
            self.client.set_terminated(self.run_id, status)
            if self._owns_parent:
                self.client.set_terminated(self.pipeline_run_id, status)
            if error:
                self.client.set_tag(self.run_id, ERROR_TAG, f"{type(error).__name__}: {error}"[:_TAG_LENGTH])
                self._send()

    def _open(self, config: StageConfig, parent_id: str | None) -> str:
        """Continue the run that a killed attempt left, or create one; return its id."""
        tags = {f"input.{name}": entry["sha256"] for name, entry in self.identity["inputs"].items()}
        tags |= {KEY_TAG: self.identity["key"], "minitron.stage": self.identity["stage"]}
        tags |= {PARENT_TAG: parent_id} if parent_id else {}
        earlier = search(self.client, self.experiment_id, KEY_TAG, self.identity["key"])
        unfinished = [r for r in earlier if r.data.tags.get(PARENT_TAG) == parent_id and r.info.status != "FINISHED"]
        if unfinished:
            run = unfinished[0]
        else:
            run = self.client.create_run(self.experiment_id, tags=tags, run_name=self.identity["stage"])
        self._log_parameters(config, run)
        for run_id in [run.info.run_id, *([parent_id] if self._owns_parent and parent_id else [])]:
            self.client.update_run(run_id, status="RUNNING")
        return run.info.run_id

    def _log_parameters(self, config: StageConfig, run: "Run") -> None:
        """Log the resolved configuration; the URI may hold a password, and a logged parameter cannot change."""
        from mlflow.entities import Param

        settings = config.model_dump(mode="json", exclude={"tracking_uri"})
        parameters = [
            Param(name, (value if isinstance(value, str) else json.dumps(value))[:_PARAMETER_LENGTH])
            for name, value in settings.items()
            if name not in run.data.params
        ]
        for start in range(0, len(parameters), _PARAMETERS_PER_CALL):
            self.client.log_batch(run.info.run_id, params=parameters[start : start + _PARAMETERS_PER_CALL])

    def _add(self, metrics: dict[str, Any], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        self._pending += [Metric(name, float(value), now, step) for name, value in numbers.items()]
        self._last_step = max(self._last_step, step)

    def _send(self) -> None:
        while batch := self._pending[:_METRICS_PER_CALL]:
            self.client.log_batch(self.run_id, metrics=batch)
            del self._pending[: len(batch)]

    @contextmanager
    def _unharmed(self, consequence: str) -> Iterator[None]:
        """Turn whatever goes wrong with MLflow into a warning: hours of training must not end with its server."""
        try:
            with undisturbed():
                yield
        except Exception as error:
            self._silent_until = time.monotonic() + _PAUSE_SECONDS
            print(f"warning: {self.identity['stage']}: MLflow: {reason(error)}; {consequence}", file=sys.stderr)


@contextmanager
def stage_run(config: StageConfig, identity: dict[str, Any]) -> Iterator[Tracker]:
    """Open the tracker of one stage, and end its run with the status the stage ends with.

    Args:
        config: `tracking_uri`, `experiment` and `pipeline_run_id` say where; MLFLOW_RUN_ID overrides the parent run.
        identity: the stage's name, key and inputs: the same key continues the run of a killed attempt.

    Raises:
        ConfigError: MLflow does not write to such a URI.
        RunError: MLflow cannot be reached or refuses.
    """
    if config.tracking_uri is None:
        yield Tracker(identity)
        return
    with explained(config.tracking_uri), hurry(), undisturbed():
        tracker = MlflowTracker(connect(config.tracking_uri), config, identity)
    print(f"{identity['stage']}: MLflow run {tracker.run_id} at {shown(config.tracking_uri)}", flush=True)
    try:
        yield tracker
    except BaseException as error:
        tracker.close("FAILED" if isinstance(error, Exception) else "KILLED", error)
        raise
    tracker.close("FINISHED")
