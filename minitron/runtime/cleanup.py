"""List the items in a workspace and in the cache, judge which may be deleted and why the others stay, and delete them.

An item stays if a registered version was made from it, if a running MLflow run reads it, if a process holds its lock,
or if it was used more recently than a given age. A result counts as used when it is made or reused.
"""

import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minitron.config.stages import STAGES
from minitron.registry.lineage import read_all_lineages
from minitron.storage import bucket
from minitron.storage.files import delete_path
from minitron.storage.hashing import NOTES
from minitron.storage.layout import FAILURE, MEASUREMENTS, SCORES, TEACHER_CACHE, read_json_object, read_record
from minitron.storage.staging import KEY, InUse, is_locked, lock_output
from minitron.tracking.client import connect, fail_fast, one_line_errors, search_running_runs
from minitron.tracking.stage_run import KEY_TAG

__all__ = ["Item", "Rules", "delete_item", "find_users", "format_age", "list_items"]

_FRESH = 3600
"""Seconds after its last use in which any item may still be in use, because a run goes from stage to stage."""

Users = dict[str, str]
"""The reason why a result is needed, by its key, its content's hash, or the snapshot that it was fetched from."""


@dataclass(frozen=True)
class Item:
    """Something that takes space: a result, work in progress, a fetched model, a note, a message.

    Attributes:
        address: a path, or gs://bucket/path.
        kind: kind of the item, for people.
        size: bytes; a file with several hard links counts in equal parts under each.
        used: time of its last use, in seconds since 1970.
        names: names of the item in `Users`.
        run: the pipeline run that made it.
        stays: why it must stay, whatever its age; empty: it may be deleted.
        delete: function that deletes it; it returns False if the item has come into use.
    """

    address: str
    kind: str
    size: int
    used: float
    names: frozenset[str] = frozenset()
    run: str | None = None
    stays: str = ""
    delete: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Rules:
    """The rules for deletion; `users` is None if it is unknown which results are needed."""

    seconds: float
    users: Users | None
    run: str | None = None

    def judge(self, item: Item) -> tuple[bool, str]:
        """Say whether an item may be deleted, and why or why not."""
        user = next((self.users[name] for name in item.names if name in self.users), "") if self.users else ""
        age = time.time() - item.used
        if self.run is not None and item.run != self.run:
            return False, "not made by this pipeline run"
        if reason := item.stays or user:
            return False, reason
        if age < max(self.seconds, _FRESH):
            return False, f"used in the last {format_age(max(self.seconds, _FRESH))}"
        if item.names and self.users is None:
            return False, "unknown whether a registered version was made from it"
        return True, f"not needed, unused for {format_age(age)}"


def format_age(seconds: float) -> str:
    """Return a time span in days, or hours if it is shorter than two days."""
    return f"{seconds / 86400:.0f} d" if seconds >= 2 * 86400 else f"{seconds / 3600:.0f} h"


def find_users(uri: str) -> Users:
    """Return the results that are needed: by registered versions, according to their lineage, and by running runs.

    Raises:
        ConfigError: the address is not MLflow's.
        RunError: MLflow cannot be reached, or the lineage of a version cannot be read.
    """
    users: Users = {}
    for version, student, records in read_all_lineages(uri):
        inputs = [entry["sha256"] for record in records for entry in record["inputs"].values()]
        made = [record[name] for record in records for name in ("key", "output_sha256") if name in record]
        users |= dict.fromkeys([student, *inputs, *made], f"{version} was made from it")
    with one_line_errors(uri), fail_fast():
        for run in search_running_runs(connect(uri)):
            names = [value for tag, value in run.data.tags.items() if tag == KEY_TAG or tag.startswith("input.")]
            users |= dict.fromkeys(names, f"MLflow run {run.info.run_id} is running")
    return users


def list_items(root: str | Path) -> Iterator[Item]:
    """Yield the items of a workspace, a cache, or the directory of a `minitron run`; other files are left out.

    Raises:
        RunError: a bucket cannot be read.
    """
    if bucket.is_bucket(root):
        yield from _list_bucket(str(root))
        return
    directory = Path(root)
    if (directory / "cache").is_dir():
        yield from list_items(directory / "cache")
    if (directory / "workspace").is_dir():  # of `minitron run`
        for path in _list_folder(directory / "results"):
            yield _make_item(path, "outputs of a run", delete=partial(_delete_plain, path))
        yield from list_items(directory / "workspace")
        return
    for stage in STAGES:
        yield from _list_results(directory / stage, "result")
    yield from _list_results(directory / "results", "result, fetched")
    yield from _list_models(directory / "models")
    for path in _list_folder(directory / MEASUREMENTS):
        yield _make_item(path, "measurements of evaluate", delete=partial(_delete_plain, path))
    for path in _list_folder(directory / TEACHER_CACHE):
        if path.suffix == ".partial":
            yield _make_partial(path)
        else:
            yield _make_item(path, "a teacher's distributions", delete=partial(_delete_locked, path))
    for path in sorted(directory.glob(f"{SCORES}/*")):
        yield _make_item(path, "scores of prune", delete=partial(_delete_plain, path))
    for path in sorted(directory.glob("unsent/*/*")):
        yield _make_item(path, "messages for MLflow", stays="not sent yet; the next stage sends them")
    for path in (*sorted(directory.glob("models/resolved/*.json")), directory / FAILURE):
        if path.is_file():
            yield _make_item(path, "note of a pipeline run", delete=partial(_delete_plain, path))
    for path in sorted(directory.glob(f"{NOTES}/*.json")):
        yield _make_item(path, "hash of a file", delete=partial(_delete_plain, path))


def _list_results(folder: Path, kind: str) -> Iterator[Item]:
    for path in _list_folder(folder):
        if path.suffix == ".partial":
            yield _make_partial(path)
        elif path.suffix == ".last-good":
            yield _make_item(path, "last state before a divergence", delete=partial(_delete_plain, path))
        elif record := read_record(path):
            yield _make_item(
                path, kind, names=frozenset({record["key"], record["output_sha256"]}),
                run=record.get("pipeline_run_id"), delete=partial(_delete_locked, path),
            )  # fmt: skip


def _list_models(folder: Path) -> Iterator[Item]:
    for path in _list_folder(folder):
        note = path.with_name(f"{path.name}.json")
        content = read_json_object(note)
        if path.suffix == ".partial":
            yield _make_partial(path)
        elif {"identity", "sha256"} <= content.keys():
            names = frozenset({content["sha256"], content["identity"].rpartition("#")[2]})
            yield _make_item(path, "input, fetched", names=names, delete=partial(_delete_locked, path, note))


def _list_folder(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _make_partial(path: Path) -> Item:
    output = path.with_suffix("")
    stays = "a process works there" if is_locked(output) else ""
    return _make_item(path, "work in progress", stays=stays, delete=partial(_delete_partial, output))


def _make_item(path: Path, kind: str, **details: Any) -> Item:
    """Return the item of a path. Work in progress was used when its newest file was written, a result when reused."""
    stats = [entry.lstat() for entry in (path, *path.rglob("*"))]
    newest = max(entry.st_mtime for entry in stats) if path.suffix == ".partial" else stats[0].st_mtime
    size = sum(entry.st_size // entry.st_nlink for entry in stats if stat.S_ISREG(entry.st_mode))
    return Item(str(path), kind, size, newest, **details)


def delete_item(item: Item) -> bool:
    """Delete an item; return False if it was used since it was listed, or if another process deleted it."""
    try:
        if not bucket.is_bucket(item.address) and Path(item.address).stat().st_mtime > item.used:
            return False
        return item.delete()
    except (FileNotFoundError, InUse):
        return False


def _delete_plain(path: Path) -> bool:
    delete_path(path)
    return True


def _delete_locked(directory: Path, note: Path | None = None) -> bool:
    """Delete a complete directory so that no reader sees half of it: first its note, then rename it away."""
    with lock_output(directory) as work:
        if note:
            note.unlink(missing_ok=True)
        directory.rename(work / "deleted")
        delete_path(work / "deleted")
    return True


def _delete_partial(output: Path) -> bool:
    with lock_output(output) as work:  # this publishes a finished result first, which stays
        for path in work.iterdir():
            if path.name != KEY:
                delete_path(path)
    return True


def _list_bucket(workspace: str) -> Iterator[Item]:
    from minitron.storage import bucket_results

    objects = bucket.list_objects(workspace)
    for stored in bucket_results.list_stored(workspace, objects):
        record = stored.record or {}
        yield Item(
            stored.address,
            "result" if stored.named else "upload that no record names",
            sum(blob.size for blob in stored.objects),
            max(blob.updated.timestamp() for blob in stored.objects),
            names=frozenset(record[name] for name in ("key", "output_sha256") if name in record),
            run=record.get("pipeline_run_id"),
            delete=partial(bucket_results.delete_stored, stored),
        )
    small = {r"resolved/\w+\.json": "note of a pipeline run", rf"{SCORES}/\w+\.\w+": "scores of prune"}
    for name, blob in sorted(objects.items()):
        for pattern, kind in small.items():
            if re.fullmatch(pattern, name):
                yield Item(
                    f"{workspace}/{name}", kind, blob.size, blob.updated.timestamp(),
                    delete=partial(bucket.delete_object, blob),
                )  # fmt: skip
