"""MLflow's registered models: register a directory as a version with an alias, and download a version to a directory.

A version is an unchanged Hugging Face directory with the files that mlflow.pyfunc needs. Its MLflow run is the run of
the pipeline that made it. The model and the version have the key of the stage that registers them. If a registration is
killed, the next one with this key continues it, on any machine; a failed one leaves nothing behind.
"""

import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from minitron.errors import ConfigError, RunError, without_password
from minitron.storage.hashing import list_files
from minitron.tracking.artifacts import check_uploaded, delete_files, list_missing, warn_of_path
from minitron.tracking.client import (
    connect,
    defer_sigterm,
    is_missing,
    is_refusal,
    one_line_errors,
    set_environment,
)
from minitron.tracking.stage_run import KEY_TAG, MlflowTracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

__all__ = [
    "CARD",
    "CARD_BEGINS",
    "GATE_OUTCOME_TAG",
    "complete_version",
    "create_version",
    "download_version",
    "ensure_registered_model",
    "find_version",
    "get_tag",
    "has_version",
    "list_all_versions",
    "pin_version",
    "read_aliases",
    "search_versions",
    "upload_model",
]

CARD, CARD_BEGINS = "README.md", "---\nwritten_by: minitron-pipelines\n"
"""The model card that register adds, and its first lines, which distinguish it from the model's own card."""

_CARDS_BEGIN = (CARD_BEGINS, "---\n# Written by minitron-pipelines\n")
"""MLflow's page showed the comment of the second, which was there until 0.4, as a heading."""

_MACHINE = "minitron."
"""Prefix of the tags of a version that people need not read. Until 0.4 only the key had it."""

GATE_OUTCOME_TAG = "decision"
"""Tag of a version: the outcome of its gates when promote judged them, as text. The tag's name is historical."""

_DESCRIPTION = "Students that minitron-pipelines compressed. `champion` is in use, `challenger` is the newest."

_MODEL = re.compile(r"models:/([^/:@]+)(?:@([\w-]+)|/(\d+))")
_ADDED_BY_MLFLOW = ("MLmodel", "code", "conda.yaml", "python_env.yaml", "requirements.txt", "registered_model_meta")


def pin_version(uri: str, address: str) -> str:
    """Return models:/NAME/VERSION for models:/NAME@alias; a versioned address stays as it is.

    Raises:
        ConfigError: the address has another form.
        RunError: the registry cannot be reached, or has no such alias or version.
    """
    if not (match := _MODEL.fullmatch(address)):
        raise ConfigError(
            f"{address}: not a model in MLflow's registry; give models:/NAME@alias or models:/NAME/VERSION"
        )
    name, alias, number = match.groups()
    with one_line_errors(uri):
        client = connect(uri)
        try:
            version = (
                client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
            )
        except Exception as error:
            if not is_refusal(error):
                raise
            raise RunError(f"{address}: {_explain_missing(client, name, alias)}") from error
    return f"models:/{name}/{version.version}"


def _explain_missing(client: "MlflowClient", name: str, alias: str | None) -> str:
    """Explain why there is no version with this alias or number, and name the existing ones."""
    if not (found := client.search_registered_models(f"name = '{name}'")):
        known = ", ".join(sorted(model.name for model in client.search_registered_models())) or "none"
        return f"no model {name} is registered at {without_password(client.tracking_uri)}; give one of: {known}"
    newest = max((int(version.version) for version in found[0].latest_versions), default=None)
    if alias is None:
        return f"model {name} has no such version; the newest is {newest or 'none'}; give an existing one"
    aliases = ", ".join(sorted(found[0].aliases)) or "none"
    remedy = f"minitron promote {name} makes one" if alias == "champion" else "give one of these, or a version"
    return f"model {name} has no alias {alias}, only: {aliases}; {remedy}"


def read_aliases(client: "MlflowClient", name: str) -> dict[str, str]:
    """Return the numbers of a registered model's versions by their aliases; empty if there is no such model."""
    models = client.search_registered_models(f"name = '{name}'")
    return {alias: str(version) for model in models for alias, version in model.aliases.items()}


def get_tag(tags: Mapping[str, str], name: str) -> str | None:
    """Return a tag of a version, under the name that it had until 0.4, too; None if it is missing."""
    return tags.get(name, tags.get(name.removeprefix(_MACHINE)))


def search_versions(client: "MlflowClient", name: str, tag: str, *parts: str) -> "list[ModelVersion]":
    """Return the versions, the newest first, whose tag has these parts, in this order, and perhaps others like them.

    A model may have thousands of versions, so the server searches. A character that its filter cannot express matches
    any character.
    """
    pattern = "%".join(["", *(re.sub(r"[^\w/:@.#=-]", "_", part) for part in parts), ""])
    versions: list[ModelVersion] = []
    for key in dict.fromkeys((tag, tag.removeprefix(_MACHINE))):
        condition = f"name = '{name}' AND tags.`{key}` LIKE '{pattern}'"
        token: str | None = ""
        while token is not None:
            page = client.search_model_versions(condition, 1000, ["version_number DESC"], token or None)
            versions, token = [*versions, *page], page.token or None
    return sorted(versions, key=lambda version: -int(version.version))


def list_all_versions(client: "MlflowClient") -> "Iterator[ModelVersion]":
    """Yield the versions of all registered models."""
    page = client.search_model_versions(max_results=1000)
    yield from page
    while page.token:
        page = client.search_model_versions(max_results=1000, page_token=page.token)
        yield from page


def has_version(uri: str, name: str, version: int, student_sha256: str) -> bool:
    """Say whether a version exists and has this student."""
    with one_line_errors(uri):
        try:
            tags = connect(uri).get_model_version(name, str(version)).tags
        except Exception as error:
            if not is_missing(error):
                raise
            return False
    return get_tag(tags, "minitron.student_sha256") == student_sha256


def download_version(uri: str, identity: str, target: Path) -> None:
    """Download the files of a model version into a directory, as they were before the registration.

    Raises:
        RunError: the registry cannot be reached.
    """
    with one_line_errors(uri):
        from mlflow.artifacts import download_artifacts

        connect(uri)
        # MLflow asks both stores; without an address it would create a database in the working directory
        with set_environment(MLFLOW_TRACKING_URI=uri, MLFLOW_REGISTRY_URI=uri):
            download_artifacts(artifact_uri=identity, dst_path=str(target), tracking_uri=uri)
    for name in _ADDED_BY_MLFLOW:
        path = target / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    card = target / CARD
    if card.is_file() and card.read_text(encoding="utf-8", errors="replace").startswith(_CARDS_BEGIN):
        card.unlink()


@contextmanager
def upload_model(
    tracker: MlflowTracker, directory: Path, card: Path, code: Path, requirements: list[str]
) -> Iterator[str]:
    """Log a directory's files as a model and yield the model's id; delete the model if anything fails.

    Intact files that a killed attempt uploaded are kept; only the others are uploaded.

    Args:
        tracker: the model is logged to its pipeline's run.
        directory: a Hugging Face directory.
        card: a model card, CARD; one in the directory takes its place.
        code: a module with `_load_pyfunc(model_directory)` that needs only `requirements`.
        requirements: packages, as pip takes them.
    """
    client = tracker.client
    model = _find_model(tracker) or client.create_logged_model(
        tracker.experiment_id, "student", tracker.pipeline_run_id, {KEY_TAG: tracker.identity["key"]}
    )
    files = {path.relative_to(directory).as_posix(): path for path in list_files(directory)}
    size = sum(path.stat().st_size for path in files.values())
    try:
        with tempfile.TemporaryDirectory() as name:
            added = Path(name) / "added"
            _write_mlmodel(added, code, model.model_id, tracker.pipeline_run_id, size, requirements)
            first = added / "MLmodel" if card.name in files else card
            client.log_model_artifact(model.model_id, str(first))
            check_uploaded(client, model, {first.name: first})  # before gigabytes are uploaded to a wrong place
            warn_of_path(client, model)
            # Uploaded from the directory itself, so the weights are not copied on this disk.
            for path_name, path in list_missing(client, model, files).items():
                client.log_model_artifact(model.model_id, str(path), path_name.rpartition("/")[0] or None)
            client.log_model_artifacts(model.model_id, str(added))
            files |= {path.relative_to(added).as_posix(): path for path in list_files(added)}
            check_uploaded(client, model, files)
        client.finalize_logged_model(model.model_id, "READY")
        yield model.model_id
    except BaseException:
        with suppress(Exception):  # the server may be gone
            delete_files(client, model)  # MLflow keeps a deleted model's files until `mlflow gc`
            client.delete_logged_model(model.model_id)
        raise


def _find_model(tracker: MlflowTracker) -> "LoggedModel | None":
    """Return the logged model that a killed attempt at this key left."""
    ours = f"tags.`{KEY_TAG}` = '{tracker.identity['key']}'"
    return next(iter(tracker.client.search_logged_models([tracker.experiment_id], ours)), None)


@contextmanager
def ensure_registered_model(tracker: MlflowTracker, name: str) -> Iterator[None]:
    """Create the registered model if it does not exist; delete a new one if anything fails."""
    if tracker.client.search_registered_models(f"name = '{name}'"):
        yield
        return
    tracker.client.create_registered_model(name, description=_DESCRIPTION)
    try:
        yield
    except BaseException:
        with suppress(Exception):
            tracker.client.delete_registered_model(name)
        raise


def find_version(tracker: MlflowTracker, name: str) -> "ModelVersion | None":
    """Return the version that an attempt at this key made before it was killed."""
    ours = f"name = '{name}' AND tags.`{KEY_TAG}` = '{tracker.identity['key']}'"
    return next(iter(tracker.client.search_model_versions(ours, 1, ["version_number DESC"])), None)


def create_version(
    tracker: MlflowTracker, name: str, alias: str, model_id: str, tags: dict[str, str], description: str
) -> int:
    """Create a version with the alias and return its number; delete it if the alias cannot be set."""
    version = None
    try:
        with defer_sigterm():
            tags = tags | {KEY_TAG: tracker.identity["key"]}
            version = _add_version(tracker, name, model_id, tags, description)
            complete_version(tracker, version, alias)
    except BaseException:
        if version:
            with suppress(Exception):
                tracker.client.delete_model_version(name, str(version.version))
        raise
    return int(version.version)


def complete_version(tracker: MlflowTracker, version: "ModelVersion", alias: str) -> None:
    """Give a version its alias, and link its model to it; this is idempotent."""
    client, number = tracker.client, str(version.version)
    client.set_registered_model_alias(version.name, alias, number)
    link = json.dumps([{"name": version.name, "version": number}])  # as mlflow.register_model writes it
    client.set_logged_model_tags(str(version.source).removeprefix("models:/"), {"mlflow.modelVersions": link})


def _add_version(
    tracker: MlflowTracker, name: str, model_id: str, tags: dict[str, str], description: str
) -> "ModelVersion":
    """Make a logged model a version of a registered one, and link it to the pipeline's run."""
    from mlflow.entities import LoggedModelOutput

    client, run_id = tracker.client, tracker.pipeline_run_id
    outputs = client.get_run(run_id).outputs
    if model_id not in [output.model_id for output in (outputs.model_outputs if outputs else ())]:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])  # a second time would link it twice
    # A registry in a database looks the model up at the environment's address, not at its own.
    with set_environment(MLFLOW_TRACKING_URI=client.tracking_uri):
        return client.create_model_version(
            name, f"models:/{model_id}", run_id, tags, description=description, model_id=model_id
        )


def _write_mlmodel(directory: Path, code: Path, model_id: str, run_id: str, size: int, requirements: list[str]) -> None:
    """Write the files that make a Hugging Face directory an MLflow model: MLmodel, environment files and loader code.

    Args:
        directory: new directory for the files.
        code: a module with `_load_pyfunc(model_directory)` that needs only torch and transformers.
        model_id: the logged model of the files.
        run_id: the model's run.
        size: bytes of the model's own files.
        requirements: the packages that `code` needs, as pip takes them.
    """
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    text = Schema([ColSpec("string")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # there is no input example
        mlflow.pyfunc.save_model(
            directory,
            loader_module=code.stem,
            code_paths=[str(code)],
            mlflow_model=Model(run_id=run_id, model_id=model_id, model_size_bytes=size),
            signature=ModelSignature(text, text, ParamSchema([ParamSpec("max_new_tokens", "long", 64)])),
            pip_requirements=requirements,
        )
