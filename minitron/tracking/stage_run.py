"""Metrics on their way to MLflow, while a stage runs.

Without a tracking URI nothing is logged and mlflow is not imported. Every stage is a run; the stages of one pipeline
run are nested in one parent run. A server that cannot be reached when a stage starts is an error; one that goes away
later costs the training nothing: what it is to be told waits until it answers again, for a later stage if need be.

Watch a local run:

    mlflow ui --backend-store-uri sqlite:///mlflow.db
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.config.stages import StageConfig
from minitron.storage.cache import persistent_directory
from minitron.storage.layout import RECORD
from minitron.tracking.client import (
    connect,
    default_retries,
    defer_sigterm,
    experiment_id,
    fail_fast,
    is_refusal,
    one_line_errors,
    reason,
    search,
    without_password,
)
from minitron.tracking.outbox import Message, Outbox, deliver
from minitron.tracking.pipeline_run import ALIVE_TAG, ERROR_TAG, pipeline_run
from minitron.tracking.write_once import PARENT_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

KEY_TAG, ATTEMPT_TAG = "minitron.key", "minitron.attempt"
"""Tags of a stage's run: its key, and when the latest process opened it: a status that reaches MLflow late, from an
earlier one, says nothing of it."""

# MLflow's limits: characters of a parameter and of a tag, parameters per request.
_PARAMETER_LENGTH, _TAG_LENGTH, _PARAMETERS_PER_CALL = 6000, 5000, 100


class Tracker:
    """Where a stage reports: this one, used without a tracking URI, keeps nothing.

    Attributes:
        identity: the stage's name, key and inputs, as its record has them.
    """

    def __init__(self, identity: dict[str, Any]) -> None:
        """Remember whose tracker it is."""
        self.identity = identity

    run_id: str | None = None

    def log(self, metrics: dict[str, float], step: int = 0) -> None:
        """Log metrics at a step; they were measured now."""

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

    run_id: str

    def __init__(self, client: "MlflowClient", config: StageConfig, identity: dict[str, Any]) -> None:
        """Join or open the runs, and log the configuration."""
        super().__init__(identity)
        self.client = client
        self._attempt, self._last_step = str(_now()), 0
        parent = pipeline_run(client, config)
        self._owns_parent = parent is not None and "MLFLOW_RUN_ID" not in os.environ
        self.experiment_id = parent.info.experiment_id if parent else experiment_id(client, config.experiment)
        self.run_id = self._open(config, parent.info.run_id if parent else None)
        self.pipeline_run_id = parent.info.run_id if parent else self.run_id
        self._unsent = _unsent(config) / f"{self._attempt}-{self.run_id}.jsonl"
        self._outbox = Outbox(self._unsent, self._send, self._complain)

    def log(self, metrics: dict[str, float], step: int = 0) -> None:
        """Have metrics sent within two seconds; while the server is away they are kept."""
        now = _now()
        points = [[name, float(value), now, step] for name, value in metrics.items() if isinstance(value, int | float)]
        self._outbox.put({"run": self.run_id, "points": points})
        self._last_step = max(self._last_step, step)

    def finish(self, record: dict[str, Any]) -> None:
        """Send the record; with mlflow's own patience (MLFLOW_HTTP_REQUEST_MAX_RETRIES), once it is safe in a file."""
        self.log(record["metrics"], self._last_step)
        self._outbox.put({"run": self.run_id, "file": RECORD, "text": json.dumps(record, indent=2)})
        with defer_sigterm():
            if not self._outbox.flush():
                with default_retries():
                    self._outbox.flush()

    def close(self, status: str, error: BaseException | None = None) -> None:
        """End the run as FINISHED, FAILED or KILLED; a parent run that a stage opened ends with its latest stage.

        The status goes first: the server may take no more than one call before Kubernetes ends the task.
        """
        runs = [self.run_id, *([self.pipeline_run_id] if self._owns_parent else [])]
        last = [{"run": run, "status": status, "end": _now(), "attempt": self._attempt} for run in runs]
        if error:
            tag = [ERROR_TAG, f"{type(error).__name__}: {error}"[:_TAG_LENGTH]]
            last.append({"run": self.run_id, "tag": tag})
        with defer_sigterm():
            if not self._outbox.close(last):
                self._warn(f"not all arrived; {self._unsent} has it, and the next stage that reaches MLflow sends it")

    def _open(self, config: StageConfig, parent_id: str | None) -> str:
        """Continue the run that a killed attempt left, or create one; return its id."""
        tags = {f"input.{name}": entry["sha256"] for name, entry in self.identity["inputs"].items()}
        tags |= {KEY_TAG: self.identity["key"], "minitron.runtime.stage": self.identity["stage"]}
        tags |= {PARENT_TAG: parent_id} if parent_id else {}
        earlier = search(self.client, self.experiment_id, KEY_TAG, self.identity["key"])
        unfinished = [r for r in earlier if r.data.tags.get(PARENT_TAG) == parent_id and r.info.status != "FINISHED"]
        if unfinished:
            run = unfinished[0]
        else:
            run = self.client.create_run(self.experiment_id, tags=tags, run_name=self.identity["stage"])
        self._log_parameters(config, run)
        for run_id in [run.info.run_id, *([parent_id] if self._owns_parent and parent_id else [])]:
            self.client.set_tag(run_id, ATTEMPT_TAG, self._attempt)
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

    def _send(self, message: Message) -> None:
        _tell(self.client, message, self._attempt)

    def _complain(self, error: Exception) -> None:
        self._warn(f"{reason(error)}; what it misses is sent when it answers again")

    def _warn(self, text: str) -> None:
        print(f"warning: {self.identity['stage']}: MLflow: {text}", file=sys.stderr, flush=True)


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
    with fail_fast():  # for the whole stage: the environment must not change under the threads of a training
        with one_line_errors(config.tracking_uri), defer_sigterm():
            client = connect(config.tracking_uri)
            _deliver_left(client, config)
            tracker = MlflowTracker(client, config, identity)
        print(
            f"{identity['stage']}: MLflow run {tracker.run_id} at {without_password(config.tracking_uri)}", flush=True
        )
        try:
            yield tracker
        except BaseException as error:
            tracker.close("FAILED" if isinstance(error, Exception) else "KILLED", error)
            raise
        tracker.close("FINISHED")


def _unsent(config: StageConfig) -> Path:
    """Return the directory of what a server missed: beside the results, so that the next stage finds it."""
    server = hashlib.sha256(without_password(config.tracking_uri or "").encode()).hexdigest()[:16]
    return persistent_directory(config.workspace) / "unsent" / server


def _deliver_left(client: "MlflowClient", config: StageConfig) -> None:
    """Send what earlier stages could not; whatever goes wrong, this one begins."""
    try:
        deliver(_unsent(config), partial(_tell, client))
    except Exception as error:
        print(f"warning: MLflow: {reason(error)}; what {_unsent(config)} holds is sent later", file=sys.stderr)


def _tell(client: "MlflowClient", message: Message, attempt: str | None = None) -> None:
    """Make the request that a message stands for; one that MLflow refuses is dropped with a warning.

    Args:
        client: makes it.
        message: of this process or an earlier one.
        attempt: this process's.
    """
    try:
        _request(client, message, attempt)
    except Exception as error:
        if "text" in message:
            client.get_run(message["run"])  # the server is there: it is the place of its files that fails
        elif not is_refusal(error):
            raise
        kind = next(name for name in message if name != "run")
        print(f"warning: MLflow: run {message['run']}: {kind} dropped: {reason(error)}", file=sys.stderr)


def _request(client: "MlflowClient", message: Message, attempt: str | None) -> None:
    from mlflow.entities import Metric, RunTag

    run = message["run"]
    match message:
        case {"points": points}:
            metrics = [Metric(*point) for point in points]
            sign = RunTag(ALIVE_TAG, str(max(metric.timestamp for metric in metrics) / 1000))
            client.log_batch(run, metrics=metrics, tags=[sign])
        case {"file": name, "text": text}:
            client.log_text(run, text, name)
        case {"tag": [name, value]}:
            client.set_tag(run, name, value)
        case {"status": status, "end": end, "attempt": began}:
            if began == attempt or client.get_run(run).data.tags.get(ATTEMPT_TAG) == began:
                client.set_terminated(run, status, end)


def _now() -> int:
    return int(time.time() * 1000)
