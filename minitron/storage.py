"""Where data lies: turns an address (a local path, file://, hf://, gs://) into a verified local path.

The only user of google-cloud-storage.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minitron.errors import ConfigError, RunError

RECORD = "stage.json"
"""The file that makes a stage's directory complete: written last, never part of the directory's content hash."""

_FILES_AT_A_TIME = 8
_HUB_DATASET = re.compile(r"hf://([^/@]+(?:/[^/@]+)?)(?:@([^/@]+))?(?:/([^/@]+))?")
"""hf://org/name[@revision][/config]"""


@dataclass(frozen=True)
class HubDataset:
    """A dataset on a hub, at the commit that its revision names now."""

    repository: str
    commit: str
    config: str | None

    @property
    def identity(self) -> str:
        """What stands for the content where other inputs have a hash: the commit, and which of its data sets."""
        return f"{self.commit}/{self.config}" if self.config else self.commit


def local_path(address: str | Path) -> Path:
    """Return the local path of a model, fetching hf://org/name when it is not local.

    Raises:
        ConfigError: nothing is there, or the scheme is unknown.
        RunError: the hub cannot be reached.
    """
    scheme, separator, rest = str(address).partition("://")
    if not separator or scheme == "file":
        path = Path(rest if separator else address)
        if not path.exists():
            raise ConfigError(f"{address}: no such file or directory; give an existing path or hf://org/name")
        return path
    if scheme == "hf":
        return _from_hub(rest)
    raise ConfigError(f"{address}: unknown scheme '{scheme}://'; give a path, file:// or hf://org/name")


@cache
def hub_dataset(address: str) -> HubDataset | None:
    """Resolve hf://org/name[@revision][/config]; None for an address that is not on a hub.

    The answer is kept: one process sees one commit.

    Raises:
        ConfigError: the address is not of that form.
        RunError: the hub cannot be reached or has no such dataset.
    """
    if not address.startswith("hf://"):
        return None
    if not (match := _HUB_DATASET.fullmatch(address)):
        raise ConfigError(f"{address}: not a dataset's address; give hf://org/name[@revision][/config]")
    from huggingface_hub import dataset_info

    repository, revision, config = match.groups()
    try:
        return HubDataset(repository, str(dataset_info(repository, revision=revision).sha), config)
    except Exception as error:  # which classes there are differs between versions of the library
        raise _hub_error(address, error) from error


def hub_model(address: str) -> str:
    """Return an hf:// address with the commit that its revision names now; where the hub does not answer, as it is."""
    from huggingface_hub import model_info

    name, _, revision = address.removeprefix("hf://").partition("@")
    try:
        return f"hf://{name}@{model_info(name, revision=revision or None).sha}"
    except Exception:  # what is in the cache may do; if not, the download says why
        return address


def snapshot(address: str) -> str:
    """Return a gs:// address with a digest of the objects below it, by name and generation.

    Raises:
        ConfigError: there are none.
        RunError: the bucket cannot be read.
    """
    objects = sorted(f"{blob.name} {blob.generation}" for blob in _blobs(address))
    return f"{address}#{hashlib.sha256(chr(10).join(objects).encode()).hexdigest()[:16]}"


def download_prefix(identity: str, target: Path) -> None:
    """Put the objects of a snapshot into a directory, several at a time; those that are there are kept.

    Raises:
        RunError: an object changed since the snapshot, or did not come as its CRC32C says.
    """
    address = identity.partition("#")[0]
    if snapshot(address) != identity:
        raise RunError(f"{address}: an object there changed while the model was fetched; run it again")
    from google.cloud.storage import transfer_manager

    prefix = _prefix(address)[1]
    pairs = [(blob, target / blob.name.removeprefix(prefix)) for blob in _blobs(address)]
    missing = [(blob, path) for blob, path in pairs if not (path.is_file() and path.stat().st_size == blob.size)]
    for blob, path in missing:
        if not path.resolve().is_relative_to(target.resolve()):
            raise RunError(f"{address}: the object {blob.name} lies outside the model; delete it")
        path.parent.mkdir(parents=True, exist_ok=True)
    bytes_missing = sum(blob.size for blob, _ in missing)
    with _bucket_errors(address), tqdm(total=bytes_missing, desc=address, unit="B", unit_scale=True) as bar:
        for start in range(0, len(missing), _FILES_AT_A_TIME):
            part = missing[start : start + _FILES_AT_A_TIME]
            transfer_manager.download_many(
                [(blob, str(path)) for blob, path in part],
                download_kwargs={"checksum": "crc32c"},
                worker_type=transfer_manager.THREAD,
                raise_exception=True,
            )
            bar.update(sum(blob.size for blob, _ in part))


def check_writable(address: str) -> None:
    """Write an object below a gs:// address, and delete it again.

    Raises:
        RunError: the bucket is missing, or may not be written.
    """
    from google.cloud import storage

    bucket, prefix = _prefix(address)
    with _bucket_errors(address):
        probe = storage.Client().bucket(bucket).blob(f"{prefix}minitron-doctor-{uuid.uuid4()}")
        probe.upload_from_string(b"")
        probe.delete()


def _prefix(address: str) -> tuple[str, str]:
    """Return bucket and prefix, the prefix with its slash."""
    bucket, _, path = address.removeprefix("gs://").partition("/")
    return bucket, f"{path.rstrip('/')}/" if path.strip("/") else ""


def _blobs(address: str) -> list[Any]:
    from google.cloud import storage

    bucket, prefix = _prefix(address)
    with _bucket_errors(address):
        found = [blob for blob in storage.Client().list_blobs(bucket, prefix=prefix) if not blob.name.endswith("/")]
    if not found:
        raise ConfigError(f"{address}: no objects there; give the directory of a model, gs://bucket/path")
    return found


@contextmanager
def _bucket_errors(address: str) -> Iterator[None]:
    """Turn what Google's libraries raise into one line."""
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(
            f"{address}: not fetched ({reason}); check the bucket's name, the right to read it and the network"
        ) from error


def _from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = repository.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None))
    except Exception as error:  # as above
        raise _hub_error(f"hf://{repository}", error) from error


def _hub_error(address: str, error: Exception) -> RunError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RunError(
        f"{address}: not fetched ({reason}); check the name, HF_TOKEN and the network, or give a local path"
    )


def content_hash(path: Path, leave_out: tuple[str, ...] = ()) -> str:
    """Return the sha256 of a file, or of a directory's names and contents: its stage.json and `leave_out` excepted."""
    if path.is_file():
        return _file_hash(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        name = file.relative_to(path)
        if name.parts[0] not in leave_out and str(name) != RECORD:
            digest.update(f"{name}\0{_file_hash(file)}\n".encode())
    return digest.hexdigest()


def verified_hash(path: Path) -> str:
    """Return the content hash of an input, checked against the record of the stage that wrote it.

    Raises:
        RunError: the content is not what the stage wrote.
    """
    found = content_hash(path)
    if record := read_record(path):
        recorded = record["output_sha256"]
        if recorded != found:
            raise RunError(
                f"{path}: content hash {found[:12]} is not the {recorded[:12]} its {RECORD} records: "
                "a file is damaged or was changed; delete the directory and run the stage that writes it again"
            )
    return found


def read_record(directory: Path) -> dict[str, Any] | None:
    """Return the record of a stage's result; None where there is none, or a file of that name that is no record."""
    try:
        record = json.loads((directory / RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if isinstance(record, dict) and {"stage", "key", "output_sha256"} <= record.keys() else None


def _file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
