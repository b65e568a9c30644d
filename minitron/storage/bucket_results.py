"""Results in a bucket: a directory there is complete when its record, `stage.json`, is there, which is uploaded last.

The record names the generations of the objects that belong to it: another upload that came between, or an object that
was changed later, is found without a download. Until the record comes, `stage.json.partial` says that it is awaited.
"""

import json
import sys
from pathlib import Path
from typing import Any

from minitron.errors import RunError
from minitron.storage import bucket
from minitron.storage.layout import AWAITED, RECORD, is_record
from minitron.storage.transfers import upload


def record_at(address: str) -> dict[str, Any] | None:
    """Return the record of the result that lies complete at an address; None where there is none.

    Raises:
        RunError: the bucket cannot be read.
    """
    return _record(address, bucket.objects(address))


def commit(directory: Path, address: str, replace: bool) -> dict[str, Any]:
    """Upload a result, its record last; return the record that is there then.

    What an attempt that broke off has left there is not uploaded again. Where another process has committed a result
    of the same key, that one is kept.

    Args:
        directory: a result with its record.
        address: gs://bucket/path, which is the result's alone.
        replace: give up a committed result of the same key.

    Raises:
        RunError: another process uploads to the same place, the bucket may not be written, or the connection broke.
    """
    record = json.loads((directory / RECORD).read_text())
    there = bucket.objects(address)
    found = _record(address, there)
    if found and found["key"] == record["key"] and not replace:
        return found
    if RECORD in there:  # from here on the directory is not complete
        bucket.delete(there.pop(RECORD))
    bucket.create_json(address, AWAITED, {"key": record["key"]})
    files = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}
    del files[RECORD]
    generations = upload(files, address, there)
    for name in there.keys() - files.keys() - {AWAITED}:
        bucket.delete(there[name])
    return _publish(address, record | {"objects": generations})


def _publish(address: str, record: dict[str, Any]) -> dict[str, Any]:
    """Write the record, if what lies there still is what was uploaded."""
    now = bucket.objects(address)
    marker = now.pop(AWAITED, None)
    if {name: blob.generation for name, blob in now.items() if name != RECORD} != record["objects"]:
        raise _disputed(address)
    if not bucket.create_json(address, RECORD, record):
        found = record_at(address)
        if not found or found["key"] != record["key"]:
            raise _disputed(address)
        return found
    if marker:
        bucket.delete(marker)
    return record


def check_complete(address: str, names: set[str]) -> None:
    """Refuse a result whose upload did not end.

    Raises:
        RunError: it did not.
    """
    if AWAITED in names and RECORD not in names:
        raise RunError(f"{address}: its upload is not complete; wait for it, or run the stage that writes it again")


def content_at(address: str) -> tuple[dict[str, Any] | None, bool]:
    """Return the record at an address, and whether there is nothing else than a result, complete or not."""
    there = bucket.objects(address)
    record = _any_record(there)
    return record, not there or record is not None or AWAITED in there


def _any_record(there: bucket.Objects) -> dict[str, Any] | None:
    found = bucket.read_json(there[RECORD]) if RECORD in there else None
    return found if is_record(found) else None


def _record(address: str, there: bucket.Objects) -> dict[str, Any] | None:
    if (record := _any_record(there)) is None:
        return None
    found = {name: blob.generation for name, blob in there.items() if name not in (RECORD, AWAITED)}
    if record.get("objects", found) == found:
        return record
    print(f"warning: {address}: damaged or changed since it was written; it is made again", file=sys.stderr)
    return None


def _disputed(address: str) -> RunError:
    return RunError(f"{address}: another process writes there; wait for it, and run it again")
