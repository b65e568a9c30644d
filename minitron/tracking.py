"""Metrics on their way to MLflow, while a stage runs, and the form in which a model goes to its registry.

The only user of mlflow: without a tracking URI nothing is logged and mlflow is not imported. Every stage is a run; the
stages of one pipeline run are nested in one parent run. A server that cannot be reached when a stage starts is an
error; one that goes away later costs the training nothing: metrics wait until it answers again.

Watch a local run:

    mlflow ui --backend-store-uri sqlite:///mlflow.db
"""

import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from minitron.config import StageConfig
from minitron.errors import ConfigError, RunError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_TAG, KEY_TAG, PARENT_TAG = "kfp.run_id", "minitron.key", "mlflow.parentRunId"

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_HURRY = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_PAUSE_SECONDS = 30
_MODEL = re.compile(r"models:/([^/:@]+)(?:@([\w-]+)|/(\d+))")
_ADDED_BY_MLFLOW = ("MLmodel", "code", "conda.yaml", "python_env.yaml", "requirements.txt", "registered_model_meta")
CARD, CARD_BEGINS = "README.md", "---\n# Written by minitron-pipelines\n"
"""The model card that register adds, and by which line a download knows it from one that the model had before."""

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
# MLflow's limits: characters of a parameter and of a tag, parameters and metrics per request.
_PARAMETER_LENGTH, _TAG_LENGTH, _PARAMETERS_PER_CALL, _METRICS_PER_CALL = 6000, 5000, 100, 1000


class Tracker:
    """Where a stage reports: this one, used without a tracking URI, keeps nothing."""

    run_id: str | None = None

    def log(self, metrics: dict[str, float], step: int = 0) -> None:
        """Log metrics at a step, now."""

    def finish(self, record: dict[str, Any]) -> None:
        """Log the finished stage's record: its metrics and stage.json."""


class MlflowTracker(Tracker):
    """A stage's run in MLflow.

    Attributes:
        client: what every call goes through; mlflow's global state is never used.
        identity: the stage's name, key and inputs, as its record has them.
        experiment_id: experiment of both runs.
        run_id: the stage's own run.
        pipeline_run_id: the parent run, where the whole pipeline's results go; the stage's own when it has no parent.
    """

    run_id: str

    def __init__(self, client: "MlflowClient", config: StageConfig, identity: dict[str, Any]) -> None:
        """Join or open the runs, and log the configuration."""
        self.client, self.identity = client, identity
        parent = _parent(client, config)
        self._owns_parent = parent is not None and "MLFLOW_RUN_ID" not in os.environ
        self.experiment_id = parent.info.experiment_id if parent else _experiment_id(client, config)
        self.run_id = self._open(config, parent.info.run_id if parent else None)
        self.pipeline_run_id = parent.info.run_id if parent else self.run_id
        self._pending: list[Any] = []
        self._last_step, self._silent_until = 0, 0.0

    def log(self, metrics: dict[str, float], step: int = 0) -> None:
        """Send metrics now; while the server is away they are kept, and sent with the first call that succeeds."""
        self._add(metrics, step)
        if time.monotonic() >= self._silent_until:
            with self._unharmed("its metrics are sent when it answers again"), _hurry():
                self._send()

    def finish(self, record: dict[str, Any]) -> None:
        """Send the record, with mlflow's own patience (MLFLOW_HTTP_REQUEST_MAX_RETRIES): it is the run's end."""
        self._add(record["metrics"], self._last_step)
        with self._unharmed("the end of its run is missing there; stage.json has it"):
            self._send()
            self.client.log_text(self.run_id, json.dumps(record, indent=2), "stage.json")

    def create_version(self, name: str, model_id: str, tags: dict[str, str]) -> int:
        """Make a logged model a version of a registered one, shown on the pipeline's run; return its number."""
        from mlflow.entities import LoggedModelOutput

        self.client.log_outputs(self.pipeline_run_id, [LoggedModelOutput(model_id, step=0)])
        source, run_id = f"models:/{model_id}", self.pipeline_run_id
        # A registry in a database looks the model up where the environment says, not where it is itself.
        with patch.dict(os.environ, {"MLFLOW_TRACKING_URI": self.client.tracking_uri}):
            return int(self.client.create_model_version(name, source, run_id, tags=tags, model_id=model_id).version)

    def close(self, status: str, error: BaseException | None = None) -> None:
        """End the run as FINISHED, FAILED or KILLED; a parent run that a stage opened ends with its latest stage.

        The status goes first: the server may take no more than one call before Kubernetes ends the task.
        """
        with self._unharmed(f"its run could not be marked {status}"), _hurry():
            self.client.set_terminated(self.run_id, status)
            if self._owns_parent:
                self.client.set_terminated(self.pipeline_run_id, status)
            if error:
                self.client.set_tag(self.run_id, "minitron.error", f"{type(error).__name__}: {error}"[:_TAG_LENGTH])
                self._send()

    def _open(self, config: StageConfig, parent_id: str | None) -> str:
        """Continue the run that a killed attempt left, or create one; return its id."""
        tags = {f"input.{name}": entry["sha256"] for name, entry in self.identity["inputs"].items()}
        tags |= {KEY_TAG: self.identity["key"], "minitron.stage": self.identity["stage"]}
        tags |= {PARENT_TAG: parent_id} if parent_id else {}
        earlier = _search(self.client, self.experiment_id, KEY_TAG, self.identity["key"])
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
        yield Tracker()
        return
    with explained(config.tracking_uri), _hurry(), undisturbed():
        tracker = MlflowTracker(connect(config.tracking_uri), config, identity)
    print(f"{identity['stage']}: MLflow run {tracker.run_id} at {shown(config.tracking_uri)}", flush=True)
    try:
        yield tracker
    except BaseException as error:
        tracker.close("FAILED" if isinstance(error, Exception) else "KILLED", error)
        raise
    tracker.close("FINISHED")


def connect(uri: str) -> "MlflowClient":
    """Return a silent client of a tracking server or database, with its registry.

    Raises:
        ConfigError: MLflow does not write to such a URI, or a package for it is missing.
    """
    scheme = uri.partition("://")[0].partition("+")[0] if "://" in uri else "path"
    if scheme not in ("http", "https", *_DATABASES):
        raise ConfigError(f"tracking_uri {uri}: MLflow does not write there; give http(s)://HOST or sqlite:///FILE")
    if database := _sqlite_file(uri):
        database.parent.mkdir(parents=True, exist_ok=True)
    _silence()
    from mlflow import MlflowClient

    try:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    except ImportError as error:
        remedy = "pip install mlflow, or give a server's http(s)://HOST"
        raise ConfigError(f"tracking_uri {shown(uri)}: needs the package {error.name}; {remedy}") from error


def model_version(uri: str, address: str) -> str:
    """Return models:/NAME/VERSION for models:/NAME@alias, and that itself.

    Raises:
        ConfigError: the address has another form.
        RunError: the registry cannot be reached, or has no such alias or version.
    """
    if not (match := _MODEL.fullmatch(address)):
        raise ConfigError(
            f"{address}: not a model of MLflow's registry; give models:/NAME@alias or models:/NAME/VERSION"
        )
    name, alias, number = match.groups()
    with explained(uri):
        client = connect(uri)
        found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    return f"models:/{name}/{found.version}"


def download_version(uri: str, identity: str, target: Path) -> None:
    """Put the files of a model version into a directory, as they were before it was registered.

    Raises:
        RunError: the registry cannot be reached.
    """
    with explained(uri):
        from mlflow.artifacts import download_artifacts

        connect(uri)
        # it asks both stores; one that is not named would be a new database in the working directory
        with patch.dict(os.environ, {"MLFLOW_TRACKING_URI": uri, "MLFLOW_REGISTRY_URI": uri}):
            download_artifacts(artifact_uri=identity, dst_path=str(target), tracking_uri=uri)
    for name in _ADDED_BY_MLFLOW:
        path = target / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    card = target / CARD
    if card.is_file() and card.read_text(encoding="utf-8", errors="replace").startswith(CARD_BEGINS):
        card.unlink()


@contextmanager
def explained(uri: str | None) -> Iterator[None]:
    """Turn the errors of MLflow and of its connections into one line.

    Raises:
        RunError: MLflow cannot be reached or refuses.
    """
    _silence()
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:  # requests' errors are OSErrors
        raise RunError(
            f"MLflow at {shown(uri or '')}: {reason(error)}; check tracking_uri and that the server runs"
        ) from error


def reason(error: BaseException) -> str:
    """Return the innermost cause of an error, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "Caused by" in text:
        text = text.rpartition("Caused by ")[2].rpartition(": ")[2].strip("\"')(")
    return text[:300]


def shown(uri: str) -> str:
    """Return a URI without its user and password."""
    return re.sub(r"//[^/@]*@", "//", uri)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let SIGTERM wait for the end of a call: its exception, raised inside one, can leave the database locked."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handler = signal.signal(signal.SIGTERM, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        if arrived:
            signal.raise_signal(signal.SIGTERM)


def write_mlmodel(directory: Path, code: Path, model_id: str, run_id: str, size: int, requirements: list[str]) -> None:
    """Write what makes a Hugging Face directory an MLflow model: MLmodel, environment files and the code that loads it.

    Args:
        directory: empty directory that gets the files.
        code: a module with `_load_pyfunc(model_directory)` that needs nothing but torch and transformers.
        model_id: the logged model that the files belong to.
        run_id: the run that it came from.
        size: bytes of the model's own files.
        requirements: the packages that `code` needs, as pip takes them.
    """
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    text = Schema([ColSpec("string")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no input example
        mlflow.pyfunc.save_model(
            directory,
            loader_module=code.stem,
            code_paths=[str(code)],
            mlflow_model=Model(run_id=run_id, model_id=model_id, model_size_bytes=size),
            signature=ModelSignature(text, text, ParamSchema([ParamSpec("max_new_tokens", "long", 64)])),
            pip_requirements=requirements,
        )


def _parent(client: "MlflowClient", config: StageConfig) -> "Run | None":
    """Join the run in MLFLOW_RUN_ID, or find or create the one with this pipeline run's tag."""
    if run_id := os.environ.get("MLFLOW_RUN_ID"):
        return client.get_run(run_id)
    if config.pipeline_run_id is None:
        return None
    experiment_id = _experiment_id(client, config)
    if parents := _pipeline_runs(client, experiment_id, config.pipeline_run_id):
        return parents[0]
    tags = {RUN_TAG: config.pipeline_run_id}
    created = client.create_run(experiment_id, tags=tags, run_name=config.pipeline_run_id)
    first = _pipeline_runs(client, experiment_id, config.pipeline_run_id)[0]
    if first.info.run_id != created.info.run_id:
        client.delete_run(created.info.run_id)  # another stage of the same pipeline run was faster
    return first


def _pipeline_runs(client: "MlflowClient", experiment_id: str, pipeline_run_id: str) -> list["Run"]:
    """Return the parent runs of a pipeline run, the earliest first: every stage chooses the same one."""
    runs = _search(client, experiment_id, RUN_TAG, pipeline_run_id)
    parents = [run for run in runs if PARENT_TAG not in run.data.tags]
    return sorted(parents, key=lambda run: (run.info.start_time, run.info.run_id))


def _search(client: "MlflowClient", experiment_id: str, tag: str, value: str) -> list["Run"]:
    return list(client.search_runs([experiment_id], f"tags.`{tag}` = '{value}'"))


def _experiment_id(client: "MlflowClient", config: StageConfig) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is not None:
        return experiment.experiment_id
    database = _sqlite_file(config.tracking_uri or "")
    # MLflow's default is ./mlruns, wherever the stage was started.
    location = str(database.absolute().parent / "mlartifacts") if database else None
    try:
        return client.create_experiment(config.experiment, artifact_location=location)
    except MlflowException as error:
        experiment = client.get_experiment_by_name(config.experiment)  # another process may have been faster
        if experiment is None:
            raise error
        return experiment.experiment_id


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _silence() -> None:
    """Keep mlflow from logging and telephoning; it reads this when it is imported."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def _hurry() -> AbstractContextManager[None]:
    """Make one try of ten seconds per request, unless the environment says otherwise: mlflow's own are minutes."""
    return patch.dict(os.environ, {name: value for name, value in _HURRY.items() if name not in os.environ})
