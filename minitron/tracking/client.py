"""Access MLflow: make clients, set retries, report errors in one line, find runs and experiments.

MLflow's global state is never used. mlflow is imported only when a tracking URI is given.
"""

import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.errors import ConfigError, RunError, without_password
from minitron.fast_imports import many_imports

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = [
    "annotate_run",
    "connect",
    "default_retries",
    "defer_sigterm",
    "error_reason",
    "fail_fast",
    "find_active_run",
    "find_or_create_experiment",
    "is_missing",
    "is_refusal",
    "one_line_errors",
    "read_artifact",
    "search_running_runs",
    "search_runs",
    "set_environment",
]

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_FAIL_FAST = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_set_by_fail_fast: set[str] = set()
"""The variables that `fail_fast` has set."""

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def connect(uri: str, *, create: bool = False) -> "MlflowClient":
    """Return a silent client of a tracking server or database, and of its registry.

    Args:
        uri: http(s)://HOST, or sqlite:///FILE.
        create: make the file of a database that does not exist. Who only reads would never find out about a typo.

    Raises:
        ConfigError: MLflow cannot write to this URI, or there is no such file, or a package for it is missing.
    """
    scheme = uri.partition("://")[0].partition("+")[0] if "://" in uri else "path"
    if scheme not in ("http", "https", *_DATABASES):
        raise ConfigError(
            f"tracking_uri {without_password(uri)}: MLflow cannot write there; give http(s)://HOST or sqlite:///FILE"
        )
    if database := _sqlite_file(uri):
        if found := next((character for character in "?%" if character in uri), None):
            raise ConfigError(
                f"tracking_uri {uri}: MLflow would create another file, because of {found!r} in the URI; "
                "give a --work-dir or tracking_uri without it"
            )
        if not create and not database.is_file():
            raise ConfigError(
                f"tracking_uri {uri}: no such database; give the file of a run, such as "
                "sqlite:///runs/demo/mlflow.db, or a server's http(s)://HOST"
            )
        database.parent.mkdir(parents=True, exist_ok=True)
    mlflow = _import_mlflow()
    try:
        with many_imports():  # the imports of a database
            return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    except ImportError as error:
        remedy = "pip install mlflow, or give a server's http(s)://HOST"
        raise ConfigError(f"tracking_uri {without_password(uri)}: needs the package {error.name}; {remedy}") from error


@contextmanager
def one_line_errors(uri: str | None) -> Iterator[None]:
    """Turn errors of MLflow, its database and its connections into one line.

    Raises:
        RunError: MLflow cannot be reached, or refuses the request.
    """
    refusal = _import_mlflow().exceptions.MlflowException
    try:
        yield
    except Exception as error:
        of_database = type(error).__module__.startswith("sqlalchemy")
        if not of_database and not isinstance(error, (refusal, OSError)):  # requests' errors are OSErrors
            raise
        raise RunError(
            f"MLflow at {without_password(uri or '')}: {error_reason(error)}; {_suggest_remedy(error)}"
        ) from error


def _suggest_remedy(error: BaseException) -> str:
    match getattr(error, "error_code", ""):
        case "UNAUTHENTICATED" | "CUSTOMER_UNAUTHORIZED":
            return "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to a user that the server knows"
        case "PERMISSION_DENIED":
            return "give the user permission; if the error is about the host, start the server with --allowed-hosts"
        case "RESOURCE_DOES_NOT_EXIST":
            return "give an existing one"
        case "INVALID_PARAMETER_VALUE" if "deleted" in str(error):
            return "restore it with mlflow experiments restore or mlflow runs restore"
        case _ if "disk is full" in str(error):
            return "free some space on the disk of its file, then run it again"
        case _:
            return "check tracking_uri and that the server runs"


def is_refusal(error: BaseException) -> bool:
    """Say whether MLflow refused a request for good; a proxy, a lost connection and a wrong password do not count."""
    return getattr(error, "error_code", "") in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")


def is_missing(error: BaseException) -> bool:
    """Say whether the requested object does not exist in MLflow."""
    return getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST"


def error_reason(error: BaseException) -> str:
    """Return the innermost cause of an error in one line of at most 300 characters, without the server's URI."""
    text = without_password(" ".join(str(error).split())) or type(error).__name__
    if "Caused by" in text:
        text = text.rpartition("Caused by ")[2].rpartition(": ")[2].strip("\"')(")
    return text[:300]


@contextmanager
def defer_sigterm() -> Iterator[None]:
    """Defer SIGTERM to the end of the block: an exception inside a call of MLflow can leave the database locked."""
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


def annotate_run(
    client: "MlflowClient",
    run_id: str,
    tags: Mapping[str, str],
    metrics: Mapping[str, float] | None = None,
    moment: float = 0,
    model_id: str | None = None,
) -> None:
    """Set tags of a run and log metrics to it, in one request; with the same moment a second time does no harm.

    Args:
        client: MLflow's.
        run_id: the run.
        tags: by name.
        metrics: by name.
        moment: of the metrics, in seconds since 1970.
        model_id: logged model that the metrics are of.
    """
    from mlflow.entities import Metric, RunTag

    points = [Metric(name, value, int(moment * 1000), 0, model_id) for name, value in (metrics or {}).items()]
    client.log_batch(run_id, metrics=points, tags=[RunTag(name, text) for name, text in tags.items()])


def search_runs(client: "MlflowClient", experiment: str, tag: str, value: str) -> list["Run"]:
    """Return the runs of an experiment whose tag has this value."""
    return list(client.search_runs([experiment], f"tags.`{tag}` = '{value}'"))


def search_running_runs(client: "MlflowClient") -> list["Run"]:
    """Return the running runs of all experiments."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, "attributes.status = 'RUNNING'"))


def find_active_run(client: "MlflowClient", run_id: str) -> "Run | None":
    """Return a run; None if it is missing or deleted."""
    try:
        run = client.get_run(run_id)
    except Exception as error:
        if not is_missing(error):
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def read_artifact(client: "MlflowClient", run_id: str, path: str) -> dict[str, Any]:
    """Return the content of a JSON file that a stage logged to a run.

    Raises:
        RunError: the file does not hold a JSON object.
    """
    with tempfile.TemporaryDirectory() as directory, set_environment(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false"):
        text = Path(client.download_artifacts(run_id, path, directory)).read_text(errors="replace")
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise RunError(
            f"runs:/{run_id}/{path}: not what minitron writes (found {text[:40]!r}); register the model again"
        )
    return content


def find_or_create_experiment(client: "MlflowClient", name: str, tags: Mapping[str, str] | None = None) -> str:
    """Return the id of an experiment; create it with these tags if it does not exist."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    database = _sqlite_file(client.tracking_uri)
    # MLflow's default is ./mlruns in the working directory of the stage.
    location = str(database.absolute().parent / "mlartifacts") if database else None
    kind = {"mlflow.experimentKind": "custom_model_development"}  # else MLflow's page asks what its runs are
    try:
        return client.create_experiment(name, artifact_location=location, tags=kind | dict(tags or {}))
    except MlflowException as error:
        experiment = client.get_experiment_by_name(name)  # another process may have been faster
        if experiment is None:
            raise error
        return experiment.experiment_id


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


@cache
def _import_mlflow() -> Any:
    """Import mlflow once, with logging and telemetry off: it reads these settings during its import."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with many_imports():
        import mlflow.exceptions
    return mlflow


@contextmanager
def fail_fast() -> Iterator[None]:
    """Make one attempt of ten seconds per request, unless the environment sets other limits; mlflow's are minutes."""
    added = {name: value for name, value in _FAIL_FAST.items() if name not in os.environ}
    _set_by_fail_fast.update(added)
    try:
        with set_environment(**added):
            yield
    finally:
        _set_by_fail_fast.difference_update(added)


@contextmanager
def default_retries() -> Iterator[None]:
    """Within `fail_fast`, restore mlflow's own retries, for requests that a stage depends on."""
    with set_environment(**dict.fromkeys(_set_by_fail_fast)):
        yield


@contextmanager
def set_environment(**values: str | None) -> Iterator[None]:
    """Set environment variables until the block ends; None unsets one. No other variable changes.

    Only the main thread may call this: code that iterates over the environment fails when another thread adds to it.
    """
    before = {name: os.environ.get(name) for name in values}
    _set_variables(values)
    try:
        yield
    finally:
        _set_variables(before)


def _set_variables(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
