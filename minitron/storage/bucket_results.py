"""Results in a bucket: one small object, the record, names the directory beside it that holds the files.

    gs://bucket/path/stage.json                    the record, with `directory` and the generations of its `objects`
    gs://bucket/path/9f86d081884c7d65-0/…          model.safetensors, config.json, stage.json as the stage wrote it, …

A writer uploads into a directory of its own. The directory's name is the hash of the writer's record and the generation
of the record that it replaces (0: none). The writer then writes its record over that generation. Google Cloud Storage
lets one writer do that; the others use its result. So once a record names a directory `…-0`, no other `…-0` can ever be
named, and these are deleted. Only `minitron gc` deletes a directory that a record has named. Only the record is ever
replaced.
"""

import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.errors import RunError
from minitron.storage import bucket
from minitron.storage.hashing import list_files
from minitron.storage.layout import RECORD, is_record, result_address
from minitron.storage.transfers import upload_files

_DAY = 24 * 3600
_RESULT_OBJECT = re.compile(r"(\w+/[0-9a-f]{16})/(?:([0-9a-f]{16}-[0-9]+)/)?(.+)")
"""An object of a workspace: stage and key, the writer's directory, the name in that directory."""

_DIRECTORY = re.compile(r"([0-9a-f]{16})-([0-9]+)/")
"""A writer's directory: the hash of its record, and the generation of the record that it replaces."""


def read_record_at(address: str) -> dict[str, Any] | None:
    """Return the record of the complete result at an address; None if there is none.

    Raises:
        RunError: the bucket cannot be read.
    """
    return _read_intact_record(address)[0]


def commit_result(directory: Path, address: str, replace: bool) -> dict[str, Any]:
    """Upload a result, then write its record; return the record that is in the bucket afterwards.

    Objects that an interrupted attempt at the same result uploaded are not uploaded again. If another process has
    committed a result with the same key, that result is kept.

    Args:
        directory: a result with its record.
        address: gs://bucket/path, which holds only this result.
        replace: replace a result with the same key, unless that one is committed during this upload.

    Raises:
        RunError: this account may not write to the bucket, or the connection broke.
    """
    text = (directory / RECORD).read_bytes()
    record, name = json.loads(text), hashlib.sha256(text).hexdigest()[:16]
    while True:
        committed, generation = _read_intact_record(address)
        if committed:
            _delete_lost_directories(address, committed)
            is_ours = committed.get("directory", "").startswith(f"{name}-")
            if is_ours or (committed["key"] == record["key"] and not replace):
                return committed
        target = f"{name}-{generation}"
        objects = _upload_directory(directory, f"{address}/{target}")
        bucket.write_json(address, RECORD, record | {"directory": target, "objects": objects}, generation)
        replace = False  # the record is now ours, or that of a faster writer


def _upload_directory(directory: Path, address: str) -> dict[str, int]:
    """Upload a result's files, its record last; return the generations of the objects."""
    files = {str(path.relative_to(directory)): path for path in list_files(directory)}
    record = {RECORD: files.pop(RECORD)}
    return upload_files(files, address) | upload_files(record, address)


def _delete_lost_directories(address: str, record: dict[str, Any]) -> None:
    """Delete the directories that no record can name anymore: the named one replaced the same generation."""
    name, _, generation = record.get("directory", "").partition("-")
    objects = bucket.list_objects(address)
    for path in sorted(objects, key=lambda path: not path.endswith(RECORD)):  # a directory without one is incomplete
        lost = _DIRECTORY.match(path)
        if lost and lost[1] != name and lost[2] == generation:
            bucket.delete_object(objects[path])


@dataclass(frozen=True)
class Stored:
    """A writer's directory in a bucket, or the files of a result of version 0.1.0.

    Attributes:
        address: gs://bucket/path.
        record: the record, as its stage wrote it; None if the upload has not ended.
        named: whether the record of the key names it.
        objects: all its objects and the record that names it, in the order of deletion.
    """

    address: str
    record: dict[str, Any] | None
    named: bool
    objects: list[Any]


def list_stored(workspace: str, objects: bucket.Objects) -> Iterator[Stored]:
    """Yield the directories of all results of a workspace, given its listed objects."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for path, blob in objects.items():
        if match := _RESULT_OBJECT.fullmatch(path):
            key, directory, name = match.groups()
            groups.setdefault((key, directory or ""), {})[name] = blob
    for (key, directory), blobs in sorted(groups.items()):
        record_blob = groups.get((key, ""), {}).get(RECORD)
        record = bucket.read_json(f"{workspace}/{key}", RECORD)[0] if record_blob else None
        named = is_record(record) and record.get("directory", "") == directory
        if not directory and not named:
            continue  # the record alone, which belongs to the directory that it names
        address = f"{workspace}/{key}/{directory}".rstrip("/")
        own = record if named else bucket.read_json(address, RECORD)[0] if RECORD in blobs else None
        first = [record_blob] if named and directory else []
        rest = [blobs[name] for name in sorted(blobs, key=lambda name: (name != RECORD, name))]
        yield Stored(address, own if is_record(own) else None, named, first + rest)


def delete_stored(stored: Stored) -> bool:
    """Delete a result, its record first. If it was used meanwhile, leave it and return False."""
    first, *rest = stored.objects
    if not bucket.delete_object(first):
        return False
    for blob in rest:
        bucket.delete_object(blob)
    return True


def mark_used(address: str, record: dict[str, Any]) -> None:
    """Write a record again if it is older than a day: its time tells `minitron gc` when the result was last used."""
    blob = bucket.list_objects(f"{address}/{RECORD}").get(RECORD)
    if blob and time.time() - blob.updated.timestamp() > _DAY:
        with suppress(RunError):  # this account has only read access
            if (current := bucket.read_json(address, RECORD)) == (record, blob.generation):
                bucket.write_json(address, RECORD, *current)


def find_files(address: str) -> str:
    """Return the address of a result's files, which its record names. Any other address is returned unchanged."""
    address = address.rstrip("/")
    record, _ = bucket.read_json(address, RECORD)
    return result_address(address, record) if is_record(record) else address


def take_snapshot(address: str) -> str:
    """Return the snapshot of a directory in a bucket; for a result, that of the directory that its record names.

    Raises:
        ConfigError: there are no objects.
        RunError: the upload of the result is not complete, or the bucket cannot be read.
    """
    address = find_files(address)
    objects = bucket.require_objects(address)
    paths = {f"{address.rpartition('/')[2]}/"} if RECORD not in objects else set()
    if any(_DIRECTORY.match(path) for path in paths | objects.keys()):
        raise RunError(f"{address}: its upload is not complete; wait for it, or run the stage that writes it again")
    return bucket.format_snapshot(address, objects)


def inspect_output(address: str) -> tuple[dict[str, Any] | None, bool]:
    """Return the record at an address, and whether a stage may write there: it is empty or holds a result."""
    paths = bucket.list_objects(address)  # before the record: an object that is written meanwhile is not foreign
    record, _ = bucket.read_json(address, RECORD)
    if is_record(record):
        return record, True
    return None, all(_DIRECTORY.match(path) for path in paths)


def _read_intact_record(address: str) -> tuple[dict[str, Any] | None, int]:
    """Return the record, None unless its objects have the generations that it lists; and the record's generation."""
    record, generation = bucket.read_json(address, RECORD)
    if not is_record(record):
        return None, generation
    objects = bucket.list_objects(result_address(address, record))
    if "directory" not in record:
        objects = {path: blob for path, blob in objects.items() if path != RECORD and not _DIRECTORY.match(path)}
    generations = {path: blob.generation for path, blob in objects.items()}
    if record.get("objects", generations) == generations:
        return record, generation
    print(f"warning: {address}: damaged or changed since it was written; making it again", file=sys.stderr)
    return None, generation
