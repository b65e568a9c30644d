"""The sources of models: turn an address into a verified local Hugging Face directory, fetched once.

    /models/llama                     a directory: a Hugging Face model or a NeMo 2 checkpoint
    hf://org/name[@revision]          Hugging Face's hub
    gs://bucket/path                  Google Cloud Storage
    models:/NAME@alias, models:/NAME/VERSION        MLflow's registry
    ngc://org/team/model:version      NVIDIA's catalog (its key in NGC_API_KEY)
    sample://tiny/teacher             made from a seed by the first task that needs it

Fetched models are kept in `models` in the workspace (in the cache, if the workspace is a bucket). A killed download is
resumed, and all stages of a run share one copy. A movable address (alias, branch, prefix) is resolved once per
pipeline run.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minitron.config.addresses import SAMPLES
from minitron.config.fields import format_address
from minitron.config.stages import StageConfig
from minitron.engines import samples
from minitron.errors import ConfigError, RunError
from minitron.registry import versions
from minitron.storage import bucket, ngc
from minitron.storage.cache import persistent_directory
from minitron.storage.files import mark_used, write_atomically
from minitron.storage.hashing import content_hash
from minitron.storage.hub import fetch_hub_file, pin_hub_model, read_hub_json, resolve_local_path
from minitron.storage.layout import select_model_files
from minitron.storage.references import follow_reference, read_reference
from minitron.storage.staging import download_then_publish
from minitron.tracking.client import default_retries

__all__ = ["check_unchanged", "fetch_corpus", "local_model", "pin_address", "pinned_local_model", "read_architecture"]

_COMMIT = re.compile(r"@[0-9a-f]{40}$")


def local_model(address: str | Path, config: StageConfig) -> Path:
    """Return the local directory of a model or another input; fetch and convert it if necessary.

    Args:
        address: one of the forms above; a reference to a result is followed.
        config: its workspace keeps fetched models, its tracking_uri is the registry of models:/.

    Raises:
        ConfigError: the address does not exist, the scheme is unknown, or a key or server is missing.
        RunError: the source cannot be reached, or the model is damaged.
    """
    return pinned_local_model(address, config)[0]


def pinned_local_model(address: str | Path, config: StageConfig) -> tuple[Path, str]:
    """Return the local directory, and the fixed address of its content: a commit, a version or a snapshot.

    Arguments and errors: see `local_model`.
    """
    scheme, separator, _ = str(address).partition(":/")
    pinned = str(address)
    if not separator or scheme == "file":
        path = resolve_local_path(address)
    elif scheme == "hf":
        pinned = _resolve_once(pinned, pin_hub_model, config)
        path = resolve_local_path(pinned)
    else:
        path, pinned = _fetch_model(pinned, config)
    path = follow_reference(path)
    return _export_nemo(path, config) if _is_nemo(path) else path, pinned


def pin_address(address: str, config: StageConfig) -> str | None:
    """Return the commit, version or snapshot that identifies a remote model's content, without fetching the model.

    None if only a hash of the content can: the model is a directory, or on a hub that does not answer.
    """
    scheme, separator, _ = address.partition(":/")
    if not separator or scheme == "file":
        return None
    if scheme == "hf":
        pinned = _resolve_once(address, pin_hub_model, config)
        return pinned if _COMMIT.search(pinned) else None
    find, _ = _choose_source(address, config)
    with default_retries():
        return _resolve_once(address, find, config)


def read_architecture(address: str, ask_once: bool = False) -> dict[str, Any]:
    """Return the config.json of a model, without fetching its weights; `ask_once`: do not ask a hub again.

    Raises:
        ConfigError: single files cannot be read from the source, or there is no such model.
        RunError: the source cannot be reached.
    """
    scheme, separator, _ = address.partition(":/")
    match scheme if separator else "file":
        case "file":
            path = resolve_local_path(address)
            if reference := read_reference(path):
                return read_architecture(reference.address)
            content = _read_json(path / "config.json")
        case "hf":
            hub_file = "config.json"
            content = read_hub_json(address, hub_file) if ask_once else _read_json(fetch_hub_file(address, hub_file))
        case "gs":
            from minitron.storage import bucket_results

            content, _ = bucket.read_json(bucket_results.find_files(address), "config.json")
        case "sample":
            content = dict(samples.TEACHER)
        case _:
            raise ConfigError(f"{address}: the config.json of a {scheme}:/ model is unknown until a stage fetches it")
    if not isinstance(content, dict):
        raise ConfigError(f"{address}: its config.json is missing or not a JSON object; give a model that has one")
    return content


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def fetch_corpus(address: str, config: StageConfig) -> str:
    """Return the address of a corpus; fetch a corpus in a bucket, and return the path of the copy.

    Raises:
        ConfigError: there are no objects at the address.
        RunError: the corpus cannot be fetched.
    """
    if not bucket.is_bucket(address):
        return address
    return str(_fetch_once(bucket.pin_objects(address)[0], _fetch_objects, config))


def check_unchanged(path: Path, sha256: str) -> None:
    """Compare a model's content hash with that of the fetched files.

    Raises:
        RunError: the hash differs.
    """
    record = _record_path(path)
    if record.is_file() and (expected := json.loads(record.read_text())["sha256"]) != sha256:
        raise RunError(
            f"{path}: content hash {sha256[:12]} is not the {expected[:12]} that was fetched: a file is damaged or was "
            "changed; delete the directory and run the stage again"
        )


def _fetch_model(address: str, config: StageConfig) -> tuple[Path, str]:
    find, fetch = _choose_source(address, config)
    with default_retries():  # a stage cannot run without its inputs
        identity = _resolve_once(address, find, config)
        return _fetch_once(identity, fetch, config), identity


def _choose_source(address: str, config: StageConfig) -> tuple[Callable[[str], str], Callable[[str, Path], None]]:
    """Return two functions for a scheme: one pins an address, the other fetches the pinned address."""
    match address.partition(":/")[0]:
        case "gs":
            return _take_snapshot, partial(_fetch_objects, select=select_model_files)
        case "models":
            if not (uri := config.tracking_uri):
                raise ConfigError(f"{address}: a model in MLflow's registry needs tracking_uri; give its server's")
            return partial(versions.pin_version, uri), partial(versions.download_version, uri)
        case "ngc":
            return ngc.check_address, ngc.download_model
        case "sample":
            return samples.check_address, samples.make_sample
        case scheme:
            raise ConfigError(
                f"{address}: unknown scheme '{scheme}:'; give a directory, hf://org/name, gs://bucket/path, "
                "models:/NAME@alias or ngc://org/team/model:version"
            )


def _resolve_once(address: str, find: Callable[[str], str], config: StageConfig) -> str:
    """Return the fixed address behind a movable one; within one pipeline run the first answer is kept."""
    if not config.pipeline_run_id or address in SAMPLES:  # nobody to agree with, or nothing that moves
        return find(address)
    note = _models_directory(config) / "resolved" / f"{_hash_text(f'{config.pipeline_run_id} {address}')}.json"
    if bucket.is_bucket(config.workspace):
        workspace = format_address(config.workspace or "")
        name = f"resolved/{note.name}"
        content = bucket.get_or_create_json(workspace, name, lambda: {"address": address, "identity": find(address)})
        return content["identity"]
    if note.is_file():
        return json.loads(note.read_text())["identity"]
    identity = find(address)
    write_atomically(note, {"address": address, "identity": identity})
    return identity


def _fetch_once(identity: str, fetch: Callable[[str, Path], None], config: StageConfig) -> Path:
    """Return the directory of an identity's files; fetch missing files, and publish them in one rename."""
    directory = _models_directory(config) / _hash_text(identity)

    def fetch_and_hash(downloads: Path) -> None:
        fetch(identity, downloads)
        write_atomically(_record_path(directory), {"identity": identity, "sha256": content_hash(downloads)})

    download_then_publish(directory, identity, fetch_and_hash, lambda: _is_complete(directory))
    mark_used(directory)
    return directory


def _is_complete(directory: Path) -> bool:
    return directory.is_dir() and _record_path(directory).is_file()


def _take_snapshot(address: str) -> str:
    from minitron.storage import bucket_results

    return bucket_results.take_snapshot(address)


def _fetch_objects(identity: str, target: Path, select: Callable[[Iterable[str]], set[str]] = set) -> None:
    from minitron.storage import transfers

    transfers.download_objects(identity, target, select)


def _is_nemo(path: Path) -> bool:
    return (path / "context").is_dir() and (path / "weights").is_dir()


def _export_nemo(checkpoint: Path, config: StageConfig) -> Path:
    """Return a NeMo 2 checkpoint as a Hugging Face directory, exported by engine nemo.

    The image of resolve has no engine. It needs none: no version was made from a checkpoint that was never exported.
    """

    def export_checkpoint(identity: str, target: Path) -> None:
        from minitron.engines.nemo import checks
        from minitron.engines.nemo import engine as nemo

        checks.check_installed()
        nemo.export_checkpoint(checkpoint, target)

    identity = f"nemo {content_hash(checkpoint)}"
    if find_spec("torch") is None and not _is_complete(_models_directory(config) / _hash_text(identity)):
        return checkpoint
    return _fetch_once(identity, export_checkpoint, config)


def _models_directory(config: StageConfig) -> Path:
    return persistent_directory(config.workspace) / "models"


def _record_path(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.json")


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
