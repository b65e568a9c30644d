"""Google Cloud Storage: what lies at an address, small JSON objects, and errors in one line.

This module and storage/transfers.py, which moves files, are the only users of google-cloud-storage. A snapshot is
`gs://bucket/path#digest`, the digest being of the names and generations of the objects below the path, or of the one
object of that name.
"""

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from minitron.errors import ConfigError, MinitronError, RunError

SCHEME = "gs://"

CHUNK = 32 << 20
"""Bytes: a larger object is fetched in chunks of this size, several at a time, and uploaded in such chunks."""

Objects = dict[str, Any]
"""Blobs as they were listed, by their path below an address."""


def is_bucket(place: Path | str | None) -> bool:
    """Say whether a place is a bucket's; pathlib makes gs:/bucket of gs://bucket."""
    return str(place).startswith("gs:/")


def objects(address: str) -> Objects:
    """Return what lies below gs://bucket/path, or the one object of that name; nothing, if nothing is there.

    Raises:
        RunError: the bucket does not exist or cannot be read.
    """
    bucket, path = _split(address)
    prefix = f"{path}/" if path else ""
    with one_line_errors(address, "fetched"):
        client = _client()
        listing = [blob for blob in client.list_blobs(bucket, prefix=prefix) if not blob.name.endswith("/")]
        if not listing and path and (blob := client.bucket(bucket).get_blob(path)):
            return {path.rpartition("/")[2]: blob}
    return {_below(address, blob.name, prefix): blob for blob in listing}


def some_objects(address: str) -> Objects:
    """Return what lies at an address.

    Raises:
        ConfigError: nothing.
        RunError: the bucket does not exist or cannot be read.
    """
    if not (found := objects(address)):
        raise ConfigError(f"{address}: no objects there; give gs://bucket/path of a directory or of an object")
    return found


def snapshot(address: str) -> str:
    """Return a gs:// address with a digest of the objects there; it may be the snapshot of an earlier one.

    Raises:
        ConfigError: there are none.
        RunError: the bucket does not exist or cannot be read.
    """
    return snapshot_of(address, some_objects(address))


def snapshot_of(address: str, found: Objects) -> str:
    """Return the snapshot that objects are."""
    digest = hashlib.sha256("\n".join(generations(found)).encode()).hexdigest()
    return f"{address}#{digest}"


def generations(found: Objects) -> list[str]:
    """Return names and generations, as Google's tools write them: part-1.jsonl#1719500000000000."""
    return sorted(f"{name}#{blob.generation}" for name, blob in found.items())


@cache
def pinned(address: str) -> tuple[str, Objects]:
    """Return the snapshot of an address and its objects, asked once: one process sees one corpus.

    Raises:
        ConfigError: there are none.
        RunError: the bucket does not exist or cannot be read.
    """
    found = some_objects(address)
    return snapshot_of(address, found), found


def handles(address: str, names: Iterable[str]) -> Objects:
    """Return handles of objects below an address, to write them, by one client: they share connections and token."""
    bucket, path = _split(address)
    target = _client().bucket(bucket)
    return {name: target.blob(f"{path}/{name}" if path else name, chunk_size=CHUNK) for name in names}


def read_json(blob: Any) -> Any:
    """Return the content of a JSON object in the generation that was listed; None if it is no JSON."""
    with one_line_errors(f"{SCHEME}{blob.bucket.name}/{blob.name}", "fetched"):
        content = blob.download_as_bytes(checksum="crc32c")
    try:
        return json.loads(content)
    except ValueError:
        return None


def create_json(address: str, name: str, content: Any) -> bool:
    """Write a JSON object if there is none of that name, and say whether there was none."""
    from google.api_core.exceptions import PreconditionFailed

    text = json.dumps(content, indent=2)
    with one_line_errors(address, "uploaded"):
        try:
            handles(address, [name])[name].upload_from_string(
                text, "application/json", checksum="crc32c", if_generation_match=0
            )
        except PreconditionFailed:
            return False
    return True


def agreed_json(address: str, name: str, make: Callable[[], Any]) -> Any:
    """Return what the JSON object of that name says; where there is none, it says from now on what `make` returns."""
    path = f"{address}/{name}"
    if not (there := objects(path)):
        create_json(address, name, make())
        there = objects(path)
    return read_json(next(iter(there.values())))


def delete(blob: Any) -> None:
    """Delete an object if it is still the one that was listed."""
    from google.api_core.exceptions import NotFound

    with one_line_errors(f"{SCHEME}{blob.bucket.name}/{blob.name}", "deleted"):
        try:
            blob.delete(if_generation_match=blob.generation)
        except NotFound:
            return


def check_writable(address: str) -> None:
    """Write an object below a gs:// address, and delete it again.

    Raises:
        RunError: the bucket is missing, or may not be written.
    """
    name = f"minitron-doctor-{uuid.uuid4()}"
    with one_line_errors(address, "written"):
        probe = handles(address, [name])[name]
        probe.upload_from_string(b"")
        probe.delete()


@contextmanager
def one_line_errors(address: str, done: str) -> Iterator[None]:
    """Turn what Google's libraries raise into one line: not `done`, why, and what to do.

    Raises:
        ConfigError: there are no credentials.
        RunError: anything else.
    """
    try:
        yield
    except Exception as error:  # of requests, urllib3, google.auth, google.api_core and the transfer manager
        is_disk = isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError)
        if isinstance(error, MinitronError) or is_disk:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        failure = ConfigError if _lacks_credentials(error) else RunError
        raise failure(f"{address}: not {done} ({reason}); {_remedy(error)}") from error


def _remedy(error: Exception) -> str:
    from google.api_core import exceptions

    if _lacks_credentials(error):
        return "name a service account's key in GOOGLE_APPLICATION_CREDENTIALS, or give the pod a service account"
    match error:
        case exceptions.Forbidden() | exceptions.Unauthorized():
            return "give this account the role Storage Object User (Viewer, to read only) on the bucket"
        case exceptions.PreconditionFailed():
            return "another process writes there: wait for it, and run it again"
        case exceptions.NotFound():
            return "check the bucket's name and the right to read it"
        case _:
            return "check the bucket's name and the network, and run it again: what is there complete is kept"


def _lacks_credentials(error: Exception) -> bool:
    from google.auth.exceptions import DefaultCredentialsError, RefreshError

    return isinstance(error, DefaultCredentialsError | RefreshError)


def _client() -> Any:
    from google.cloud import storage

    return storage.Client()


def _split(address: str) -> tuple[str, str]:
    bucket, _, path = address.removeprefix(SCHEME).partition("/")
    if not bucket:
        raise ConfigError(f"{address}: no bucket; give gs://bucket/path")
    return bucket, path.strip("/")


def _below(address: str, name: str, prefix: str) -> str:
    path = name.removeprefix(prefix)
    if ".." in path.split("/") or path.startswith("/"):
        raise RunError(f"{address}: the object {name} lies outside the directory; delete it")
    return path
