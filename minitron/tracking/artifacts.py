"""Verify an upload to MLflow by reading it like another client: the sizes of all files, the content of a small one.

An artifact root can be a path. A client of a server then writes to that path on its own disk, without an error, and
nothing reaches the server. Such files are checked through the server.
"""

import hashlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.errors import RunError, without_password
from minitron.tracking.client import set_environment

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

__all__ = ["check_uploaded", "delete_files", "list_missing", "warn_of_path"]

_API = "mlflow/logged-models"


def check_uploaded(client: "MlflowClient", model: "LoggedModel", files: dict[str, Path]) -> None:
    """Compare the files of a logged model with the uploaded files.

    Args:
        client: the client that uploaded them.
        model: the logged model.
        files: the files on this disk, by their names in the model.

    Raises:
        RunError: MLflow lacks a file, or has it with another size or content.
    """
    stored = _list_stored(client, model)
    wrong = [name for name, path in files.items() if stored.get(name, -1) not in (path.stat().st_size, None)]
    small = min(files, key=lambda name: files[name].stat().st_size)
    if not wrong and _hash(_download(client, model, small)) != _hash(files[small].read_bytes()):
        wrong = [small]
    if wrong:
        raise RunError(
            f"MLflow at {without_password(client.tracking_uri)}: {wrong[0]} was uploaded to "
            f"{model.artifact_location}, but cannot be read back; {_suggest_remedy(client, model)}"
        )


def list_missing(client: "MlflowClient", model: "LoggedModel", files: dict[str, Path]) -> dict[str, Path]:
    """Return the files that a logged model lacks, or has with another or an unknown size."""
    stored = _list_stored(client, model)
    return {name: path for name, path in files.items() if stored.get(name) != path.stat().st_size}


def delete_files(client: "MlflowClient", model: "LoggedModel") -> None:
    """Delete the files of a logged model."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    get_artifact_repository(model.artifact_location, tracking_uri=client.tracking_uri).delete_artifacts()


def warn_of_path(client: "MlflowClient", model: "LoggedModel") -> None:
    """Warn if a server keeps a model at a path, even if this machine and the server share the disk."""
    if _lies_on_the_servers_disk(client, model):
        print(
            f"warning: MLflow keeps the model at {model.artifact_location}: "
            "only machines that have this disk can load it",
            file=sys.stderr,
            flush=True,
        )


def _suggest_remedy(client: "MlflowClient", model: "LoggedModel") -> str:
    if _lies_on_the_servers_disk(client, model):
        return (
            "that is a path on the server's disk, but this task wrote to its own disk; start the server with "
            "--serve-artifacts and --artifacts-destination, and give a new experiment, since this one keeps its path"
        )
    return "check the artifact store of the server, then run it again"


def _lies_on_the_servers_disk(client: "MlflowClient", model: "LoggedModel") -> bool:
    """Say whether a server keeps the files at a path: this machine may have another disk at that path."""
    scheme = model.artifact_location.partition(":")[0] if ":" in model.artifact_location else "file"
    return client.tracking_uri.startswith("http") and scheme == "file"


def _list_stored(client: "MlflowClient", model: "LoggedModel", folder: str | None = None) -> dict[str, int | None]:
    """Return the sizes of the files of a logged model by name; None if the store does not report a size."""
    sizes: dict[str, int | None] = {}
    for name, is_folder, size in _list_folder(client, model, folder):
        sizes |= _list_stored(client, model, name) if is_folder else {name: size}
    return sizes


def _list_folder(
    client: "MlflowClient", model: "LoggedModel", folder: str | None
) -> list[tuple[str, bool, int | None]]:
    if not _lies_on_the_servers_disk(client, model):
        entries = client.list_logged_model_artifacts(model.model_id, folder)
        return [(entry.path, entry.is_dir, entry.file_size) for entry in entries]
    parameters = {"artifact_directory_path": folder} if folder else {}
    answer = _ask_server(client, f"/api/2.0/{_API}/{model.model_id}/artifacts/directories", parameters).json()
    return [(entry["path"], entry["is_dir"], int(entry.get("file_size", 0))) for entry in answer.get("files", [])]


def _download(client: "MlflowClient", model: "LoggedModel", name: str) -> bytes:
    if _lies_on_the_servers_disk(client, model):
        address = f"/ajax-api/2.0/{_API}/{model.model_id}/artifacts/files"
        return _ask_server(client, address, {"artifact_file_path": name}).content
    from mlflow.artifacts import download_artifacts

    uri = f"{model.artifact_location}/{name}"
    with tempfile.TemporaryDirectory() as directory, set_environment(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false"):
        path = download_artifacts(artifact_uri=uri, dst_path=directory, tracking_uri=client.tracking_uri)
        return Path(path).read_bytes()


def _ask_server(client: "MlflowClient", address: str, parameters: dict[str, str]) -> Any:
    """Return the server's answer; MLflow's client would read from its own disk instead of asking."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request_safe

    return http_request_safe(get_default_host_creds(client.tracking_uri), address, "GET", params=parameters)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
