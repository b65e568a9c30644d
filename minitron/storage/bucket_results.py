"""Results in a bucket: a directory is complete when it has its record, `stage.json`, which is uploaded last.

The record lists the generations of its objects. A concurrent upload or a later change is detected without a download.
`stage.json.partial` marks a directory whose upload has not ended.
"""

import json
import sys
from pathlib import Path
from typing import Any

from minitron.errors import RunError
from minitron.storage import bucket
from minitron.storage.layout import AWAITED, RECORD, is_record
from minitron.storage.transfers import upload_files


def read_record_at(address: str) -> dict[str, Any] | None:
    """Return the record of the complete result at an address; None if there is none.

    Raises:
        RunError: the bucket cannot be read.
    """
    return _read_intact_record(address, bucket.list_objects(address))


def commit_result(directory: Path, address: str, replace: bool) -> dict[str, Any]:
    """Upload a result, its record last; return the record that is in the bucket afterwards.

    Objects that an interrupted attempt has uploaded are not uploaded again. If another process has committed a result
    with the same key, that result is kept.

    Args:
        directory: a result with its record.
        address: gs://bucket/path; it holds this result alone.
        replace: replace a committed result with the same key.

    Raises:
        RunError: another process uploads there, this account may not write to the bucket, or the connection broke.
    """
    record = json.loads((directory / RECORD).read_text())
    objects = bucket.list_objects(address)
    committed = _read_intact_record(address, objects)
    if committed and committed["key"] == record["key"] and not replace:
        return committed
    if RECORD in objects:  # from here on the directory is not complete
        bucket.delete_object(objects.pop(RECORD))
    bucket.create_json(address, AWAITED, {"key": record["key"]})
    files = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}
    del files[RECORD]
    generations = upload_files(files, address, objects)
    for name in objects.keys() - files.keys() - {AWAITED}:
        bucket.delete_object(objects[name])
    return _publish_record(address, record | {"objects": generations})


def _publish_record(address: str, record: dict[str, Any]) -> dict[str, Any]:
    """Write the record unless the uploaded objects have changed meanwhile."""
    objects = bucket.list_objects(address)
    marker = objects.pop(AWAITED, None)
    if {name: blob.generation for name, blob in objects.items() if name != RECORD} != record["objects"]:
        raise _conflict_error(address)
    if not bucket.create_json(address, RECORD, record):
        committed = read_record_at(address)
        if not committed or committed["key"] != record["key"]:
            raise _conflict_error(address)
        return committed
    if marker:
        bucket.delete_object(marker)
    return record


def check_complete(address: str, names: set[str]) -> None:
    """Check that the upload of a result has ended.

    Raises:
        RunError: it has not.
    """
    if AWAITED in names and RECORD not in names:
        raise RunError(f"{address}: its upload is not complete; wait for it, or run the stage that writes it again")


def inspect_output(address: str) -> tuple[dict[str, Any] | None, bool]:
    """Return the record at an address, and whether a stage may write there: it is empty or holds a result."""
    objects = bucket.list_objects(address)
    record = _read_any_record(objects)
    return record, not objects or record is not None or AWAITED in objects


def _read_any_record(objects: bucket.Objects) -> dict[str, Any] | None:
    content = bucket.read_json(objects[RECORD]) if RECORD in objects else None
    return content if is_record(content) else None


def _read_intact_record(address: str, objects: bucket.Objects) -> dict[str, Any] | None:
    """Return the record if its objects still have the generations that it lists; else warn, and return None."""
    if (record := _read_any_record(objects)) is None:
        return None
    generations = {name: blob.generation for name, blob in objects.items() if name not in (RECORD, AWAITED)}
    if record.get("objects", generations) == generations:
        return record
    print(f"warning: {address}: damaged or changed since it was written; it is made again", file=sys.stderr)
    return None


def _conflict_error(address: str) -> RunError:
    return RunError(f"{address}: another process writes there; wait for it, and run it again")
