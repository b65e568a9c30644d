"""The scores of a teacher as a file: measured in one pass over the calibration, and read by every further cut.

Used by `python -m minitron.prune --config FILE`. The file has the tensors of `Importance` and their key: everything
that affects them, which the student's sizes do not. prune writes it into the student's directory. With a workspace it
is also kept there, by its key, as soon as it is measured: a cut to other sizes, or one that was killed, finds it.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minitron import METHOD_VERSION
from minitron.config.fields import Fault, format_address
from minitron.config.shapes import PruneSettings
from minitron.config.stages import PruneConfig
from minitron.errors import ConfigError, RunError
from minitron.models.checks import read_config
from minitron.storage import bucket
from minitron.storage.cache import persistent_directory
from minitron.storage.files import mark_used, write_atomically, write_beside
from minitron.storage.hashing import identify_content
from minitron.storage.layout import IMPORTANCE, REFERENCE, SCORES, read_json_object

if TYPE_CHECKING:  # plan's image has no torch
    from minitron.models.pruning.importance import Importance
    from minitron.models.pruning.surgery import Drop, LayerOrder

Key = dict[str, Any]
"""Everything that affects scores, by the names that messages give it."""

_METADATA = "key"
"""Entry of the file's metadata with the key as JSON. One entry: safetensors writes several in no fixed order."""

_REMEDY = "give the scores of this teacher and calibration, or leave prune.importance out"


def make_key(config: PruneConfig) -> Key:
    """Return the key of the scores that a configuration needs; its inputs are local directories."""
    from minitron.data.packed import PackedDataset

    calibration = PackedDataset(config.dataset / "train", config.sequence_length, config.seed)
    return _make_settings_key(config) | {
        "teacher": identify_content(config.teacher),
        "dataset": identify_content(config.dataset),
        "calibration_sequences": min(config.calibration_sequences, len(calibration)),
    }


def _make_settings_key(prune: PruneSettings) -> Key:
    """Return the part of a key that the settings alone decide."""
    return {
        "sequence_length": prune.sequence_length,
        "seed": prune.seed,
        "engine": prune.engine,
        "method version": METHOD_VERSION,
    }


def find_or_measure_importance(config: PruneConfig, measure: "Callable[[], Importance]") -> "Importance":
    """Return the scores of `config.importance`, or else of the workspace; if there are none, measure and keep them.

    Several processes measure together; process 0 finds and keeps.

    Raises:
        ConfigError, RunError: as for `read_given_importance`, or what `measure` raises.
    """
    from minitron.models.processes import ask_first

    if (given := config.importance) is not None:
        return ask_first(lambda: read_given_importance(config, given))
    if config.workspace is None:
        return measure()
    key = ask_first(lambda: make_key(config))
    path = persistent_directory(config.workspace) / SCORES / f"{_hash_key(key)}.safetensors"
    if (found := ask_first(lambda: _find_importance(config, path))) is not None:
        return found
    importance = measure()
    ask_first(lambda: _keep_importance(config, importance, key, path))
    return importance


def find_or_drop_layers(
    config: PruneConfig, count: int, drop: "Callable[[LayerOrder], Iterable[LayerOrder]]"
) -> "list[Drop]":
    """Return the first `count` layers to drop by loss; those that the workspace has not yet are chosen, and kept there.

    Layers go one by one, so a larger cut goes on where a smaller one ended, and so does one that was killed. The order
    depends on the method, which decides whether seams are refitted, but on no size. Several processes choose together;
    process 0 finds and keeps.
    """
    from minitron.models.processes import ask_first

    name, order = ask_first(lambda: _find_order(config))
    if len(order.drops) >= count:
        print(f"prune: layers were chosen by loss before: {name}", flush=True)
        return order.drops[:count]
    for longer in drop(order):
        order = longer
        if name:
            ask_first(partial(_keep_order, config, name, order))
    return order.drops


def _find_order(config: PruneConfig) -> "tuple[str, LayerOrder]":
    """Return the name of the order in the workspace, empty if there is no workspace; and the order so far."""
    from minitron.models.pruning.surgery import LayerOrder

    name = _hash_key(make_key(config) | {"layers by loss": config.method}) + ".json" if config.workspace else ""
    return name, _read_order(config, name)[0] if name and config.caching else LayerOrder([], {})


def _read_order(config: PruneConfig, name: str) -> "tuple[LayerOrder, int]":
    """Return the order in the workspace, empty if there is none, and its generation in a bucket."""
    from minitron.models.pruning.surgery import Drop, LayerOrder

    if remote := _remote_folder(config):
        content, generation = bucket.read_json(remote, name)
    else:
        path = persistent_directory(config.workspace) / SCORES / name
        content, generation = read_json_object(path), 0
        if content:
            mark_used(path)
    found = {"drops": [], "losses": {}} | (content or {})
    losses = {int(layer): loss for layer, loss in found["losses"].items()}
    return LayerOrder([Drop(**entry) for entry in found["drops"]], losses), generation


def _keep_order(config: PruneConfig, name: str, order: "LayerOrder") -> None:
    """Keep an order in the workspace, unless it has a longer one."""
    present, generation = _read_order(config, name)
    if len(present.drops) >= len(order.drops):
        return
    content = {"drops": [drop._asdict() for drop in order.drops], "losses": order.losses}
    if remote := _remote_folder(config):
        bucket.write_json(remote, name, content, generation)
    else:
        write_atomically(persistent_directory(config.workspace) / SCORES / name, content)


def find_importance_faults(prune: PruneSettings) -> Iterator[Fault]:
    """Find given scores, if they are on this machine, that are of other settings; the stage compares the rest."""
    if prune.importance is None or not prune.importance.exists() or (prune.importance / REFERENCE).exists():
        return
    try:
        key = read_key(_locate_scores(prune.importance))
    except (ConfigError, RunError) as error:
        yield Fault("prune.importance", str(error).removeprefix("prune.importance: "))
        return
    wanted = _make_settings_key(prune)
    if key.get("calibration_sequences", 0) > prune.calibration_sequences:
        wanted |= {"calibration_sequences": prune.calibration_sequences}
    if differences := list(_describe_differences(key, wanted)):
        yield Fault("prune.importance", f"{prune.importance} is of {', '.join(differences)}; {_REMEDY}")


def check_given_importance(config: PruneConfig) -> None:
    """Refuse scores that are given by hand and are of something else, or damaged."""
    if config.importance is not None:
        read_given_importance(config, config.importance)


def read_given_importance(config: PruneConfig, location: Path) -> "Importance":
    """Read the scores in a file, or in a directory that prune wrote.

    Raises:
        ConfigError: there are none, or they have another key; the message names every part that differs.
        RunError: the file is damaged, or its scores do not fit the teacher.
    """
    path = _locate_scores(location)
    if differences := list(_describe_differences(read_key(path), make_key(config))):
        raise ConfigError(f"prune.importance: {path} is of {', '.join(differences)}; {_REMEDY}")
    return _read_importance(path, config)


def _locate_scores(location: Path) -> Path:
    path = location / IMPORTANCE if location.is_dir() else location
    if not path.is_file():
        raise ConfigError(
            f"prune.importance: {location} has no {IMPORTANCE}; give a directory that prune wrote, or such a file"
        )
    return path


def read_key(path: Path) -> Key:
    """Return the key in a file of scores.

    Raises:
        ConfigError: it has none.
        RunError: the file is damaged.
    """
    try:
        with safe_open(path, "numpy") as file:
            key = json.loads((file.metadata() or {}).get(_METADATA, "null"))
    except ValueError:
        key = None
    except (SafetensorError, OSError) as error:
        raise _complain_of_damage(path, error) from error
    if not isinstance(key, dict):
        raise ConfigError(f"prune.importance: {path}: not a file of scores that prune wrote; {_REMEDY}")
    return key


def _read_importance(path: Path, config: PruneConfig) -> "Importance":
    from minitron.models.pruning.importance import Importance

    expected = vars(Importance.zeros(read_config(config.teacher)))
    try:
        with safe_open(path, "pt") as file:
            tensors = {axis: file.get_tensor(axis) for axis in expected}
    except (SafetensorError, OSError) as error:
        raise _complain_of_damage(path, error) from error
    for axis, scores in tensors.items():
        if scores.shape != expected[axis].shape:
            raise _complain_of_damage(path, f"{axis}: {list(scores.shape)}, not {list(expected[axis].shape)}")
    return Importance(**tensors).check_finite()


def _complain_of_damage(path: Path, reason: Any) -> RunError:
    return RunError(f"{path}: scores cannot be read ({str(reason).splitlines()[0]}); give another file, or delete it")


def save_importance(importance: "Importance", key: Key, path: Path) -> None:
    """Write scores and their key so that no reader sees a partial file."""
    tensors = {axis: scores.float().numpy() for axis, scores in vars(importance).items()}
    with write_beside(path) as temporary:
        save_file(tensors, temporary, {_METADATA: json.dumps(key, sort_keys=True)})


def _find_importance(config: PruneConfig, path: Path) -> "Importance | None":
    """Return the scores at a path in the workspace, which may be a bucket; None if they must be measured."""
    if not config.caching:
        return None
    if not path.is_file() and (address := _remote_folder(config)):
        _download(f"{address}/{path.name}", path)
    if not path.is_file():
        return None
    try:
        importance = _read_importance(path, config)
    except RunError as error:
        print(f"warning: prune: {error}; measuring again", file=sys.stderr)
        return None
    mark_used(path)
    print(f"prune: the teacher was scored before: {path}", flush=True)
    return importance


def _keep_importance(config: PruneConfig, importance: "Importance", key: Key, path: Path) -> None:
    """Keep scores in the workspace, which may be a bucket."""
    save_importance(importance, key, path)
    if address := _remote_folder(config):
        _upload(path, address)


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


def _describe_differences(found: Key, key: Key) -> Iterator[str]:
    for name, wanted in key.items():
        if (value := found.get(name)) != wanted:
            yield f"{name} {_shorten(value)} instead of {_shorten(wanted)}"


def _shorten(value: Any) -> str:
    """Return a part of a key for a message; of a hash, its first digits."""
    return str(value)[:12]
