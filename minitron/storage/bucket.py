"""Google Cloud Storage: list objects, read and write small JSON objects, report errors in one line.

This module and storage/transfers.py, which moves files, are the only users of google-cloud-storage. A snapshot is
`gs://bucket/path#digest`. The digest covers the names and generations of the objects below the path, or of the one
object with that name.
"""

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from minitron.errors import ConfigError, MinitronError, RunError

SCHEME = "gs://"

CHUNK = 32 << 20
"""Bytes. A larger object is fetched and uploaded in chunks of this size, several at a time."""

Objects = dict[str, Any]
"""Listed blobs by their path below an address."""


def is_bucket(address: Path | str | None) -> bool:
    """Say whether an address is in a bucket; pathlib turns gs://bucket into gs:/bucket."""
    return str(address).startswith("gs:/")


def list_objects(address: str) -> Objects:
    """Return the objects below gs://bucket/path, or the one object with that name; empty if there are none.

    Raises:
        RunError: the bucket does not exist or cannot be read.
    """
    bucket, path = _split_address(address)
    prefix = f"{path}/" if path else ""
    with one_line_errors(address, "fetched"):
        client = _make_client()
        listing = [blob for blob in client.list_blobs(bucket, prefix=prefix) if not blob.name.endswith("/")]
        if not listing and path and (blob := client.bucket(bucket).get_blob(path)):
            return {path.rpartition("/")[2]: blob}
    return {_relative_name(address, blob.name, prefix): blob for blob in listing}


def require_objects(address: str) -> Objects:
    """Return the objects at an address.

    Raises:
        ConfigError: there are none.
        RunError: the bucket does not exist or cannot be read.
    """
    if not (objects := list_objects(address)):
        raise ConfigError(f"{address}: no objects there; give gs://bucket/path of a directory or of an object")
    return objects


def take_snapshot(address: str) -> str:
    """Return a gs:// address with a digest of the objects there.

    Raises:
        ConfigError: there are none.
        RunError: the bucket does not exist or cannot be read.
    """
    return format_snapshot(address, require_objects(address))


def format_snapshot(address: str, objects: Objects) -> str:
    """Return the snapshot of listed objects."""
    digest = hashlib.sha256("\n".join(list_generations(objects)).encode()).hexdigest()
    return f"{address}#{digest}"


def list_generations(objects: Objects) -> list[str]:
    """Return names with generations in the notation of Google's tools: part-1.jsonl#1719500000000000."""
    return sorted(f"{name}#{blob.generation}" for name, blob in objects.items())


@cache
def pin_objects(address: str) -> tuple[str, Objects]:
    """Return the snapshot of an address and its objects. The answer is cached: one process sees one corpus.

    Raises:
        ConfigError: there are none.
        RunError: the bucket does not exist or cannot be read.
    """
    objects = require_objects(address)
    return format_snapshot(address, objects), objects


def make_handles(address: str, names: Iterable[str]) -> Objects:
    """Return handles for writing objects below an address. They share one client, with its connections and token."""
    bucket, path = _split_address(address)
    target = _make_client().bucket(bucket)
    return {name: target.blob(f"{path}/{name}" if path else name, chunk_size=CHUNK) for name in names}


def read_json(address: str, name: str) -> tuple[Any, int]:
    """Return the content of a JSON object, None if it is not JSON, and its generation, 0 if there is no such object.

    Raises:
        RunError: the bucket does not exist or cannot be read.
    """
    from google.api_core.exceptions import NotFound

    bucket, path = _split_address(f"{address}/{name}")
    with one_line_errors(address, "fetched"):
        client = _make_client()
        while blob := next((blob for blob in client.list_blobs(bucket, prefix=path) if blob.name == path), None):
            generation = blob.generation
            with suppress(NotFound):  # replaced since it was listed: look again
                return _parse_json(blob.download_as_bytes(checksum="crc32c")), generation
    return None, 0


def _parse_json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def write_json(address: str, name: str, content: Any, generation: int) -> None:
    """Write a JSON object over the given generation (0: there is no object yet), unless the generation has changed.

    If another writer was faster, its content is kept: read the object afterwards.
    """
    from google.api_core.exceptions import PreconditionFailed

    text = json.dumps(content, indent=2)
    blob = make_handles(address, [name])[name]
    with one_line_errors(address, "uploaded"), suppress(PreconditionFailed):
        blob.upload_from_string(text, "application/json", checksum="crc32c", if_generation_match=generation)


def get_or_create_json(address: str, name: str, make: Callable[[], Any]) -> Any:
    """Return the content of a JSON object; if there is none, create it first with what `make` returns."""
    content, generation = read_json(address, name)
    if generation == 0:
        write_json(address, name, make(), 0)
        content, _ = read_json(address, name)
    return content


def delete_object(blob: Any) -> bool:
    """Delete an object unless it was deleted or replaced since it was listed; say whether this call deleted it."""
    from google.api_core.exceptions import NotFound, PreconditionFailed

    with one_line_errors(f"{SCHEME}{blob.bucket.name}/{blob.name}", "deleted"), suppress(NotFound, PreconditionFailed):
        blob.delete(if_generation_match=blob.generation)
        return True
    return False


def check_writable(address: str) -> None:
    """Write an object below a gs:// address, and delete it again.

    Raises:
        RunError: the bucket is missing, or this account may not write to it.
    """
    name = f"minitron-doctor-{uuid.uuid4()}"
    with one_line_errors(address, "written"):
        probe = make_handles(address, [name])[name]
        probe.upload_from_string(b"")
        delete_object(probe)


@contextmanager
def one_line_errors(address: str, done: str) -> Iterator[None]:
    """Turn an error of Google's libraries into one line: the address, "not `done`", the reason and the remedy.

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
        raise failure(f"{address}: not {done} ({reason}); {_suggest_remedy(error)}") from error


def _suggest_remedy(error: Exception) -> str:
    from google.api_core import exceptions

    if _lacks_credentials(error):
        return "set GOOGLE_APPLICATION_CREDENTIALS to a service account's key, or give the pod a service account"
    match error:
        case exceptions.Forbidden() | exceptions.Unauthorized():
            return "give this account the role Storage Object User on the bucket (Storage Object Viewer, to read only)"
        case exceptions.PreconditionFailed():
            return "another process is writing there; wait for it, then run it again"
        case exceptions.NotFound():
            return "check the bucket's name and your permission to read it"
        case _:
            return "check the bucket's name and the network, then run it again; complete files are kept"


def _lacks_credentials(error: Exception) -> bool:
    from google.auth.exceptions import DefaultCredentialsError, RefreshError

    return isinstance(error, DefaultCredentialsError | RefreshError)


def _make_client() -> Any:
    from google.cloud import storage

    return storage.Client()


def _split_address(address: str) -> tuple[str, str]:
    bucket, _, path = address.removeprefix(SCHEME).partition("/")
    if not bucket:
        raise ConfigError(f"{address}: no bucket; give gs://bucket/path")
    return bucket, path.strip("/")


def _relative_name(address: str, name: str, prefix: str) -> str:
    path = name.removeprefix(prefix)
    if ".." in path.split("/") or path.startswith("/"):
        raise RunError(f"{address}: the object {name} lies outside the directory; delete it")
    return path
