"""Pass results on by reference: a large result moves once, not through every task.

A directory with `reference.json` ({"address", "sha256", "key"}) and a copy of the result's `stage.json` stands for the
result. The result itself is in a volume that all tasks mount, or in a bucket. A machine fetches it from the bucket
once, into its cache (MINITRON_CACHE).
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minitron.config.fields import format_address
from minitron.errors import RunError
from minitron.storage.bucket import is_bucket, take_snapshot
from minitron.storage.cache import result_cache_path
from minitron.storage.files import mark_used, write_atomically
from minitron.storage.hashing import content_hash
from minitron.storage.layout import RECORD, REFERENCE, read_record, result_address
from minitron.storage.staging import delete_leftovers, download_then_publish, replace_directory


@dataclass(frozen=True)
class Reference:
    """The address of a result, the hash of its content, and its key."""

    address: str
    sha256: str
    key: str


def make_reference(location: Path | str, record: dict[str, Any]) -> Reference:
    """Return the reference to a result at a path or in a bucket."""
    return Reference(result_address(format_address(location), record), record["output_sha256"], record["key"])


def write_reference(directory: Path, reference: Reference, record: dict[str, Any]) -> None:
    """Make a directory a reference to a result."""
    record = {name: value for name, value in record.items() if name != "directory"}  # it belongs only beside the result
    if read_reference(directory) == reference and read_record(directory) == record:
        return delete_leftovers(directory)
    with replace_directory(directory) as staging:
        write_atomically(staging / REFERENCE, asdict(reference))
        write_atomically(staging / RECORD, record)


def read_reference(directory: Path) -> Reference | None:
    """Return the reference in a directory; None if there is none.

    Raises:
        RunError: the reference is damaged.
    """
    path = directory / REFERENCE
    try:
        return Reference(**json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise RunError(f"{path}: not a reference to a result; delete the directory and run its stage again") from error


def follow_reference(directory: Path) -> Path:
    """Return the local directory of the result that a directory refers to, or the directory if it is not a reference.

    Raises:
        RunError: the result is missing, or has changed.
    """
    reference = read_reference(directory)
    return locate_result(reference, directory) if reference else directory


def locate_result(reference: Reference, named_by: Path | str) -> Path:
    """Return the local directory of a result; fetch it from its bucket unless it is in the cache.

    Args:
        reference: the result.
        named_by: the holder of the reference, for messages.

    Raises:
        RunError: the result is missing, has changed, or cannot be fetched.
    """
    if is_bucket(reference.address):
        return _find_or_fetch(reference)
    directory = Path(reference.address)
    record = read_record(directory)
    if record is None:
        raise RunError(
            f"{named_by}: refers to {directory}, which holds no result; mount the volume that it was written to, or "
            "run the stage that writes it again"
        )
    if (record["key"], record["output_sha256"]) != (reference.key, reference.sha256):
        raise RunError(
            f"{named_by}: refers to content {reference.sha256[:12]}, but {directory} now holds "
            f"{record['output_sha256'][:12]}; run the stage that writes it again"
        )
    return directory


def _find_or_fetch(reference: Reference) -> Path:
    cached = result_cache_path(reference.sha256, reference.key)
    if read_record(cached) is None:
        _fetch_result(reference, cached)
    delete_leftovers(cached)
    mark_used(cached)
    return cached


def _fetch_result(reference: Reference, target: Path) -> None:
    from minitron.storage import transfers

    identity = take_snapshot(reference.address)

    def fetch_and_verify(directory: Path) -> None:
        transfers.download_objects(identity, directory)
        if (actual := content_hash(directory)) != reference.sha256 or read_record(directory) is None:
            shutil.rmtree(directory)
            raise RunError(
                f"{reference.address}: holds content {actual[:12]}, but the reference is to {reference.sha256[:12]}; "
                "run the stage that writes it again"
            )

    download_then_publish(target, identity, fetch_and_verify, lambda: read_record(target) is not None)
