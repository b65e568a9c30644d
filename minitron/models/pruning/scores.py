"""The scores of a teacher as a file: measured in one pass over the calibration, and read by every further cut.

Used by `python -m minitron.prune --config FILE`. The file has the tensors of `Importance` and their key: everything
that affects them, which the student's sizes do not. prune writes it into the student's directory. With a workspace it
is also kept there, by its key, as soon as it is measured: a cut to other sizes, or one that was killed, finds it.
"""

import hashlib
import json
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minitron import METHOD_VERSION
from minitron.config.fields import format_address
from minitron.config.stages import PruneConfig
from minitron.data.packed import PackedDataset
from minitron.errors import ConfigError, RunError
from minitron.models.checks import read_config
from minitron.models.pruning.importance import Importance
from minitron.storage import bucket
from minitron.storage.cache import persistent_directory
from minitron.storage.files import mark_used
from minitron.storage.hashing import content_hash
from minitron.storage.layout import IMPORTANCE, SCORES

Key = dict[str, Any]
"""Everything that affects scores, by the names that messages give it."""

_METADATA = "key"
"""Entry of the file's metadata with the key as JSON. One entry: safetensors writes several in no fixed order."""


def make_key(config: PruneConfig) -> Key:
    """Return the key of the scores that a configuration needs; its inputs are local directories."""
    calibration = PackedDataset(config.dataset / "train", config.sequence_length, config.seed)
    return {
        "teacher": content_hash(config.teacher),
        "dataset": content_hash(config.dataset),
        "calibration_sequences": min(config.calibration_sequences, len(calibration)),
        "sequence_length": config.sequence_length,
        "seed": config.seed,
        "engine": config.engine,
        "method version": METHOD_VERSION,
    }


def find_or_measure_importance(config: PruneConfig, measure: Callable[[], Importance]) -> Importance:
    """Return the scores of `config.importance`, or else of the workspace; if there are none, measure and keep them.

    Raises:
        ConfigError, RunError: as for `read_importance`, or what `measure` raises.
    """
    if config.importance is not None:
        return read_given_importance(config, config.importance)
    if config.workspace is None:
        return measure()
    key = make_key(config)
    path = persistent_directory(config.workspace) / SCORES / f"{_hash_key(key)}.safetensors"
    if (found := _find_importance(config, key, path)) is not None:
        print(f"prune: the teacher was scored before: {path}", flush=True)
        return found
    importance = measure()
    save_importance(importance, key, path)
    if address := _remote_folder(config):
        _upload(path, address)
    return importance


def check_given_importance(config: PruneConfig) -> None:
    """Refuse scores that are given by hand and are of something else, or damaged; see `read_importance`."""
    if config.importance is not None:
        read_given_importance(config, config.importance)


def read_given_importance(config: PruneConfig, location: Path) -> Importance:
    """Read the scores in a file, or in a directory that prune wrote."""
    path = location / IMPORTANCE if location.is_dir() else location
    if not path.is_file():
        raise ConfigError(
            f"prune.importance: {location} has no {IMPORTANCE}; give a directory that prune wrote, or such a file"
        )
    return read_importance(path, make_key(config), config)


def read_importance(path: Path, key: Key, config: PruneConfig) -> Importance:
    """Read scores.

    Raises:
        ConfigError: they have another key; the message names every part that differs. Or they have no key.
        RunError: the file is damaged, or its scores do not fit the teacher.
    """
    remedy = "give the scores of this teacher and calibration, or leave prune.importance out"
    try:
        with safe_open(path, "pt") as file:
            found = _read_key(file.metadata() or {})
            if found is None:
                raise ConfigError(f"prune.importance: {path}: not a file of scores that prune wrote; {remedy}")
            if differences := list(_describe_differences(found, key)):
                raise ConfigError(f"prune.importance: {path} is of {', '.join(differences)}; {remedy}")
            expected = Importance.zeros(read_config(config.teacher))
            names = [field.name for field in fields(Importance)]
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{path}: scores cannot be read ({reason}); give another file, or delete it") from error
    for name, scores in tensors.items():
        if scores.shape != (shape := getattr(expected, name).shape):
            raise RunError(
                f"{path}: the scores of {name} have the shape {list(scores.shape)}, not {list(shape)}; the file is "
                "damaged: give another file, or delete it"
            )
    return Importance(**tensors).check_finite()


def save_importance(importance: Importance, key: Key, path: Path) -> None:
    """Write scores and their key so that no reader sees a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        save_file(
            {name: scores.float().contiguous() for name, scores in vars(importance).items()},
            temporary,
            {_METADATA: json.dumps(key, sort_keys=True)},
        )
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _find_importance(config: PruneConfig, key: Key, path: Path) -> Importance | None:
    """Return the scores at a path in the workspace, which may be a bucket; None if they must be measured."""
    if not config.caching:
        return None
    if not path.is_file() and (address := _remote_folder(config)):
        _download(f"{address}/{path.name}", path)
    if not path.is_file():
        return None
    try:
        importance = read_importance(path, key, config)
    except (ConfigError, RunError) as error:
        print(f"warning: prune: {error}; measuring again", file=sys.stderr)
        return None
    mark_used(path)
    return importance


def _remote_folder(config: PruneConfig) -> str | None:
    """Return the folder of scores of a workspace in a bucket; None if the workspace is a directory."""
    return f"{format_address(config.workspace or '')}/{SCORES}" if bucket.is_bucket(config.workspace) else None


def _download(address: str, path: Path) -> None:
    from minitron.storage import transfers

    if not bucket.list_objects(address):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as directory:
        transfers.download_objects(bucket.take_snapshot(address), Path(directory))
        (Path(directory) / path.name).replace(path)


def _upload(path: Path, address: str) -> None:
    """Upload scores, unless another task has done so meanwhile: its scores are rounded differently at most."""
    from minitron.storage import transfers

    if bucket.list_objects(f"{address}/{path.name}"):
        return
    try:
        transfers.upload_files({path.name: path}, address)
    except RunError as error:  # the student does not depend on it
        print(f"warning: prune: scores not kept for other cuts: {error}", file=sys.stderr)


def _hash_key(key: Key) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _read_key(metadata: dict[str, str]) -> Key | None:
    try:
        key = json.loads(metadata.get(_METADATA, "null"))
    except ValueError:
        return None
    return key if isinstance(key, dict) else None


def _describe_differences(found: Key, key: Key) -> Iterator[str]:
    for name, wanted in key.items():
        if (value := found.get(name)) != wanted:
            yield f"{name} {_shorten(value)} instead of {_shorten(wanted)}"


def _shorten(value: Any) -> str:
    """Return a part of a key for a message; of a hash, its first digits."""
    return str(value)[:12]
