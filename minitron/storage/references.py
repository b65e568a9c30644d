"""Results that are passed on by reference: large ones move once, not through every task.

A directory with `reference.json` ({"address", "sha256", "key"}) and a copy of the result's `stage.json` stands for the
result, which lies in a volume that all tasks mount, or in a bucket. From a bucket it is fetched once per machine, into
the cache, MINITRON_CACHE.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minitron.config.fields import format_address
from minitron.errors import RunError
from minitron.storage.bucket import is_bucket, snapshot
from minitron.storage.cache import place_in_cache
from minitron.storage.files import replaced, write_atomically
from minitron.storage.hashing import content_hash
from minitron.storage.layout import RECORD, REFERENCE, read_record
from minitron.storage.staging import download_then_publish


@dataclass(frozen=True)
class Reference:
    """Where a result lies, the hash of its content, and its key."""

    address: str
    sha256: str
    key: str


def reference_to(place: Path | str, record: dict[str, Any]) -> Reference:
    """Return the reference to a result, from its place and record."""
    return Reference(format_address(place), record["output_sha256"], record["key"])


def write(directory: Path, reference: Reference, record: dict[str, Any]) -> None:
    """Make a directory stand for a result."""
    if read(directory) == reference and read_record(directory) == record:
        return
    with replaced(directory) as staging:
        write_atomically(staging / REFERENCE, asdict(reference))
        write_atomically(staging / RECORD, record)


def read(directory: Path) -> Reference | None:
    """Return the reference that a directory holds; None if it is no reference.

    Raises:
        RunError: it has a reference that is damaged.
    """
    path = directory / REFERENCE
    if not path.is_file():
        return None
    try:
        return Reference(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise RunError(f"{path}: not a reference to a result; delete the directory and run its stage again") from error


def followed(directory: Path) -> Path:
    """Return the local directory of what a directory stands for; itself, if it is no reference.

    Raises:
        RunError: the result is not there, or is another one.
    """
    reference = read(directory)
    return local(reference, directory) if reference else directory


def local(reference: Reference, named_by: Path | str) -> Path:
    """Return the local directory of a result, fetched from its bucket if this machine has not got it.

    Args:
        reference: the result.
        named_by: what holds the reference, for messages.

    Raises:
        RunError: it is not there, is another one, or cannot be fetched.
    """
    if is_bucket(reference.address):
        return _cached(reference)
    home = Path(reference.address)
    record = read_record(home)
    if record is None:
        raise RunError(
            f"{named_by}: refers to {home}, where there is no result: mount the volume it was written to, or run the "
            "stage that writes it again"
        )
    if (record["key"], record["output_sha256"]) != (reference.key, reference.sha256):
        raise RunError(
            f"{named_by}: refers to content {reference.sha256[:12]}, but {home} now holds "
            f"{record['output_sha256'][:12]}: run the stage that writes it again"
        )
    return home


def _cached(reference: Reference) -> Path:
    kept = place_in_cache(reference.sha256, reference.key)
    if read_record(kept) is None:
        _fetch(reference, kept)
    return kept


def _fetch(reference: Reference, kept: Path) -> None:
    from minitron.storage import transfers

    identity = snapshot(reference.address)

    def fetch(arriving: Path) -> None:
        transfers.download(identity, arriving)
        if (found := content_hash(arriving)) != reference.sha256 or read_record(arriving) is None:
            shutil.rmtree(arriving)
            raise RunError(
                f"{reference.address}: holds content {found[:12]}, not the {reference.sha256[:12]} referred to: "
                "run the stage that writes it again"
            )

    download_then_publish(kept, identity, fetch)
