"""Log metrics to MLflow while a stage runs.

Without a tracking URI nothing is logged and mlflow is not imported. Every stage is a run; the stages of one pipeline
run are nested in one parent run. If the server cannot be reached when a stage starts, the stage fails. If it becomes
unavailable later, the training continues: messages wait until the server answers again, if necessary for a later stage.

Watch a local run:

    mlflow ui --backend-store-uri sqlite:///mlflow.db
"""

import hashlib
import json
import math
import os
import posixpath
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.config.stages import StageConfig
from minitron.errors import without_password
from minitron.storage.cache import persistent_directory
from minitron.storage.layout import RECORD
from minitron.tracking.client import (
    connect,
    default_retries,
    defer_sigterm,
    error_reason,
    fail_fast,
    find_or_create_experiment,
    is_refusal,
    one_line_errors,
    search_runs,
)
from minitron.tracking.outbox import Message, Outbox, deliver_messages
from minitron.tracking.pipeline_run import ALIVE_TAG, ERROR_TAG, PARENT_TAG, STAGE_TAG, join_pipeline_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run

KEY_TAG, ATTEMPT_TAG = "minitron.key", "minitron.attempt"
"""Tags of a stage's run: its key, and the time when the latest process opened it. A status that arrives late from an
earlier process is ignored."""

# MLflow's limits: characters of a parameter and of a tag, parameters per request; of a metric's name and of a digest.
_PARAMETER_LENGTH, _TAG_LENGTH, _PARAMETERS_PER_CALL = 6000, 5000, 100
_METRIC_LENGTH, _DIGEST_LENGTH = 250, 36


class Tracker:
    """The tracker of a stage without a tracking URI: it logs nothing.

    Attributes:
        identity: the stage's name, key and inputs, as in its record.
    """

    def __init__(self, identity: dict[str, Any]) -> None:
        """Set the stage's identity."""
        self.identity = identity

    run_id: str | None = None

    def log(self, metrics: dict[str, float], step: int = 0) -> None:
        """Log metrics at a step, with the current time."""

    def finish(self, record: dict[str, Any]) -> None:
        """Log the finished stage's record: its metrics and stage.json. From now on the messages survive any failure."""


class MlflowTracker(Tracker):
    """A stage's run in MLflow.

    Attributes:
        client: makes all calls; mlflow's global state is never used.
        experiment_id: experiment of both runs.
        run_id: the stage's own run.
        pipeline_run_id: the parent run, for results of the whole pipeline; the stage's own run if there is no parent.
    """

    run_id: str

    def __init__(self, client: "MlflowClient", config: StageConfig, identity: dict[str, Any]) -> None:
        """Join or open the runs, and log the configuration."""
        super().__init__(identity)
        self.client = client
        self._attempt, self._last_step, self._finished = str(_now_milliseconds()), 0, False
        self._steps: dict[str, set[int]] = {}  # of each metric: those that MLflow has
        parent = join_pipeline_run(client, config)
        self._owns_parent = parent is not None and "MLFLOW_RUN_ID" not in os.environ
        self.experiment_id = (
            parent.info.experiment_id if parent else find_or_create_experiment(client, config.experiment)
        )
        self.run_id = self._open_run(config, parent)
        self.pipeline_run_id = parent.info.run_id if parent else self.run_id
        self._unsent = _unsent_directory(config) / f"{self._attempt}-{self.run_id}.jsonl"
        for leftover in self._unsent.parent.glob(f"*-{self.run_id}.tmp"):  # of a killed attempt: it is empty
            leftover.unlink(missing_ok=True)
        self._outbox = Outbox(self._unsent, self._send_message, self._report_outage, self._make_sign_of_life)

    def log(self, metrics: dict[str, float], step: int = 0) -> None:
        """Queue metrics; they are sent within two seconds, or kept while the server is away.

        A step that the metric already has is left out: a resumed training repeats the steps after its last checkpoint.
        """
        now = _now_milliseconds()
        numbers = {
            make_metric_name(name): float(value) for name, value in metrics.items() if isinstance(value, int | float)
        }
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        for name in numbers.keys() - finite.keys():
            self._warn(f"{name} is {numbers[name]} at step {step}: not logged")
        new = {name: value for name, value in finite.items() if step not in self._steps.get(name, ())}
        self._outbox.put({"run": self.run_id, "points": [[name, value, now, step] for name, value in new.items()]})
        for name in new:
            self._steps.setdefault(name, set()).add(step)
        self._last_step = max(self._last_step, step)

    def finish(self, record: dict[str, Any]) -> None:
        """Store the record, the end of the run, and the points that a killed attempt had not sent."""
        for row in record.get("history", []):
            self.log({name: value for name, value in row.items() if name != "step"}, row["step"])
        self.log(self._name_results(record), self._last_step)
        self._outbox.put({"run": self.run_id, "file": RECORD, "text": json.dumps(record, indent=2, allow_nan=False)})
        for message in self._make_statuses("FINISHED"):
            self._outbox.put(message)
        self._outbox.store()
        self._finished = True

    def _name_results(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the record's metrics by their names in MLflow.

        If the history has a curve of a metric, the metric is the curve's best point. Its name gets the prefix `best_`,
        so that the curve does not end with it.
        """
        curves = {name for row in record.get("history", []) for name in row}
        return {f"best_{name}" if name in curves else name: value for name, value in record["metrics"].items()}

    def close(self, status: str, error: BaseException | None = None) -> None:
        """End the run as FINISHED, FAILED or KILLED; a parent run that a stage opened ends with the latest stage.

        The status is sent first, because Kubernetes may end the task after one call. A finished stage tries as often
        as MLFLOW_HTTP_REQUEST_MAX_RETRIES allows.
        """
        last = [] if status == "FINISHED" and self._finished else self._make_statuses(status)
        if error:
            tag = [ERROR_TAG, f"{type(error).__name__}: {error}"[:_TAG_LENGTH]]
            last.append({"run": self.run_id, "tag": tag})
        with defer_sigterm():
            if status == "FINISHED" and not self._outbox.flush():
                with default_retries():
                    self._outbox.flush()
            if not self._outbox.close(last):
                self._warn(f"not all arrived; the next stage that reaches MLflow sends the rest of {self._unsent}")

    def _make_statuses(self, status: str) -> list[Message]:
        runs = [self.run_id, *([self.pipeline_run_id] if self._owns_parent else [])]
        return [{"run": run, "status": status, "end": _now_milliseconds(), "attempt": self._attempt} for run in runs]

    def _open_run(self, config: StageConfig, parent: "Run | None") -> str:
        """Continue the run of a killed attempt, or create one; return its id."""
        stage, parent_id = self.identity["stage"], parent.info.run_id if parent else None
        tags = {f"input.{name}": entry["sha256"] for name, entry in self.identity["inputs"].items()}
        tags |= {KEY_TAG: self.identity["key"], STAGE_TAG: stage, ATTEMPT_TAG: self._attempt}
        tags |= {PARENT_TAG: parent_id} if parent_id else {}
        earlier = search_runs(self.client, self.experiment_id, KEY_TAG, self.identity["key"])
        own = [run for run in earlier if run.data.tags.get(PARENT_TAG) == parent_id]
        # a pipeline run makes a result once, so a run that ended but lost its result in a kill is also continued
        continued = own if parent_id else [run for run in own if run.info.status != "FINISHED"]
        if continued:
            run = continued[0]
            for name in run.data.metrics:
                points = self.client.get_metric_history(run.info.run_id, name)
                self._steps[name] = {point.step for point in points}
            self._last_step = max((step for steps in self._steps.values() for step in steps), default=0)
        else:
            name = f"{stage} · {parent.info.run_name}" if parent else stage
            run = self.client.create_run(self.experiment_id, tags=tags, run_name=name)
        self._log_parameters(config, run)
        self.client.log_inputs(run.info.run_id, make_dataset_inputs(self.identity["inputs"]))  # again does no harm
        reopened = [run.info.run_id] if continued else []
        for run_id in [*reopened, *([parent_id] if self._owns_parent and parent_id else [])]:
            self.client.set_tag(run_id, ATTEMPT_TAG, self._attempt)
            self.client.update_run(run_id, status="RUNNING")
        return run.info.run_id

    def _log_parameters(self, config: StageConfig, run: "Run") -> None:
        """Log the resolved configuration without the URI, which may have a password; MLflow refuses changed values."""
        from mlflow.entities import Param

        settings = config.model_dump(mode="json", exclude={"tracking_uri"})
        parameters = [
            Param(name, (value if isinstance(value, str) else json.dumps(value))[:_PARAMETER_LENGTH])
            for name, value in settings.items()
            if name not in run.data.params
        ]
        for start in range(0, len(parameters), _PARAMETERS_PER_CALL):
            self.client.log_batch(run.info.run_id, params=parameters[start : start + _PARAMETERS_PER_CALL])

    def _send_message(self, message: Message) -> None:
        _send_or_drop(self.client, message, self._attempt)

    def _make_sign_of_life(self) -> Message:
        return {"run": self.run_id, "tag": [ALIVE_TAG, str(time.time())]}

    def _report_outage(self, error: Exception) -> None:
        self._warn(f"{error_reason(error)}; missing data is sent when it answers again")

    def _warn(self, text: str) -> None:
        print(f"warning: {self.identity['stage']}: MLflow: {text}", file=sys.stderr, flush=True)


@contextmanager
def track_stage(config: StageConfig, identity: dict[str, Any]) -> Iterator[Tracker]:
    """Open the tracker of a stage, and end its run with the status of the stage.

    Args:
        config: gives `tracking_uri`, `experiment` and `pipeline_run_id`; MLFLOW_RUN_ID overrides the parent run.
        identity: the stage's name, key and inputs; the same key continues the run of a killed attempt.

    Raises:
        ConfigError: MLflow cannot write to this URI.
        RunError: MLflow cannot be reached, or refuses the request.
    """
    if config.tracking_uri is None:
        yield Tracker(identity)
        return
    with fail_fast():  # for the whole stage, because the environment must not change while training threads run
        with one_line_errors(config.tracking_uri), defer_sigterm():
            client = connect(config.tracking_uri, create=True)
            deliver_unsent(config, client)
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


def _unsent_directory(config: StageConfig) -> Path:
    """Return the directory of a server's unsent messages, beside the results, where the next stage finds it."""
    server = hashlib.sha256(without_password(config.tracking_uri or "").encode()).hexdigest()[:16]
    return persistent_directory(config.workspace) / "unsent" / server


def deliver_unsent(config: StageConfig, client: "MlflowClient | None" = None) -> None:
    """Send the messages that earlier stages could not send; on an error, warn and continue."""
    directory = _unsent_directory(config)
    if not config.tracking_uri or not any(directory.glob("*.jsonl")):
        return
    try:
        with fail_fast():
            deliver_messages(directory, partial(_send_or_drop, client or connect(config.tracking_uri, create=True)))
    except Exception as error:
        print(f"warning: MLflow: {error_reason(error)}; the messages in {directory} are sent later", file=sys.stderr)


def _send_or_drop(client: "MlflowClient", message: Message, attempt: str | None = None) -> None:
    """Send a message; drop it with a warning if MLflow refuses it.

    Args:
        client: sends it.
        message: a message of this process or of an earlier one.
        attempt: the attempt of this process.
    """
    try:
        _make_request(client, message, attempt)
    except Exception as error:
        if "text" in message:
            client.get_run(message["run"])  # the server answers: its artifact store fails
        elif not is_refusal(error):
            raise
        elif len({name for name, *_ in message.get("points", [])}) > 1:
            _send_apart(client, message, attempt)
            return
        kind = next(name for name in message if name != "run")
        what = f"metric {message['points'][0][0]}" if kind == "points" and message["points"] else kind
        print(f"warning: MLflow: run {message['run']}: {what} dropped: {error_reason(error)}", file=sys.stderr)


def _send_apart(client: "MlflowClient", message: Message, attempt: str | None) -> None:
    """Send a refused batch of points one metric at a time, so that only the refused metric is lost."""
    points: dict[str, list[Any]] = {}
    for point in message["points"]:
        points.setdefault(point[0], []).append(point)
    for group in points.values():
        _send_or_drop(client, message | {"points": group}, attempt)


def make_dataset_inputs(inputs: Mapping[str, Mapping[str, Any]]) -> "list[DatasetInput]":
    """Return inputs, including models, as MLflow's datasets: name, digest, address, and the input's role in the run.

    Args:
        inputs: the inputs of a stage by name, as in its record.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    found = []
    entries = [(name, part) for name, entry in inputs.items() for part in entry.get("parts", [entry])]
    for name, entry in entries:
        scheme, _, path = entry["address"].rpartition(":/")
        parts = path.strip("/").split("/")
        title = "/".join(parts[-2:]) if scheme else parts[-1]
        source = json.dumps({"uri": entry.get("pinned", entry["address"])})
        dataset = Dataset(title, entry["sha256"][:_DIGEST_LENGTH], scheme or "local", source)
        found.append(DatasetInput(dataset, [InputTag("mlflow.data.context", name)]))
    return found


def make_metric_name(name: str) -> str:
    """Return a metric's name that MLflow accepts: pass@1 becomes pass_at_1, other characters become underscores.

    MLflow accepts letters, digits, _ . - / : and spaces, at most 250 in all; a name is also a path.
    """
    valid = re.sub(r"[^/\w.\- :]", "_", name.replace("@", "_at_"))[:_METRIC_LENGTH]
    if posixpath.normpath(valid) != valid or valid.startswith(("/", "..")) or valid == ".":
        return valid.replace("/", "_").strip(".") or "_"
    return valid


def _make_request(client: "MlflowClient", message: Message, attempt: str | None) -> None:
    from mlflow.entities import Metric, RunTag

    run = message["run"]
    match message:
        case {"points": points}:
            metrics = [Metric(make_metric_name(name), *point) for name, *point in points]
            sign = RunTag(ALIVE_TAG, str(max(metric.timestamp for metric in metrics) / 1000))
            client.log_batch(run, metrics=metrics, tags=[sign])
        case {"file": name, "text": text}:
            client.log_text(run, text, name)
        case {"tag": [name, value]}:
            client.set_tag(run, name, value)
        case {"status": status, "end": end, "attempt": began}:
            if began == attempt or client.get_run(run).data.tags.get(ATTEMPT_TAG) == began:
                client.set_terminated(run, status, end)


def _now_milliseconds() -> int:
    return int(time.time() * 1000)
