"""Files from and to a bucket: many at a time, large ones in chunks, checked by CRC32C, kept when the next one fails.

What is fetched has the generations of its snapshot. It lies in `NAME.part` until size and CRC32C are right, so that a
file is never half there. What is uploaded replaces only what was listed before.
"""

import base64
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
from google.api_core.exceptions import NotFound, PreconditionFailed
from google.cloud.storage import transfer_manager
from google.cloud.storage.retry import DEFAULT_RETRY
from tqdm import tqdm

from minitron.errors import RunError
from minitron.storage.bucket import CHUNK, Objects, handles, one_line_errors, snapshot_of, some_objects

RETRY = DEFAULT_RETRY
"""The library's: connections that break and 408, 429, 5xx are tried again for two minutes, with growing pauses."""

WORKERS = 8
_BATCH_FILES, _BATCH_BYTES = 64, 256 << 20
"""Small objects come in batches: a kill loses at most one."""

_Transfers = list[tuple[Any, Path]]


def download(identity: str, target: Path) -> None:
    """Put the objects of a snapshot into a directory; those that are there are kept.

    Raises:
        RunError: an object changed since the snapshot, did not come as its CRC32C says, or the bucket cannot be read.
    """
    address = identity.rpartition("#")[0]
    found = some_objects(address)
    if snapshot_of(address, found) != identity:
        raise _changed(address)
    missing = [(blob, target / name) for name, blob in found.items() if not _is_there(target / name, blob)]
    for _, path in missing:
        path.parent.mkdir(parents=True, exist_ok=True)
    with one_line_errors(address, "fetched"), _progress(address, sum(blob.size for blob, _ in missing)) as bar:
        for batch in _batches(missing):
            _fetch(address, batch)
            bar.update(sum(blob.size for blob, _ in batch))


def upload(files: dict[str, Path], address: str, there: Objects) -> dict[str, int]:
    """Put files below an address, each only if what lies there still is what was listed; equal ones are left.

    Args:
        files: what to put there, by its path below the address.
        address: gs://bucket/path.
        there: what lies there, as `objects` found it.

    Returns:
        The generation of every file's object.

    Raises:
        RunError: another process writes there, the bucket may not be written, or the connection broke off.
    """
    missing = [name for name, path in files.items() if not (name in there and _is_same(path, there[name]))]
    found = {name: there[name].generation for name in files.keys() - missing}
    sizes = {name: files[name].stat().st_size for name in missing}
    by_generation: dict[int, list[str]] = defaultdict(list)
    for name in sorted(missing, key=lambda name: -sizes[name]):
        by_generation[there[name].generation if name in there else 0].append(name)
    with one_line_errors(address, "uploaded"), _progress(address, sum(sizes.values())) as bar:
        for generation, names in by_generation.items():
            blobs = handles(address, names)
            for batch in _upload_batches(names, sizes):
                _send([(blobs[name], files[name]) for name in batch], generation)
                bar.update(sum(sizes[name] for name in batch))
            found |= {name: blobs[name].generation for name in names}
    return found


def _upload_batches(names: list[str], sizes: dict[str, int]) -> Iterator[list[str]]:
    """Yield names for the bar's steps: enough of them, and of their bytes, to keep all workers busy."""
    batch: list[str] = []
    size = 0
    for name in names:
        batch.append(name)
        size += sizes[name]
        if len(batch) >= WORKERS and size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _is_same(path: Path, blob: Any) -> bool:
    """Say whether a file has an object's size and CRC32C."""
    return path.stat().st_size == blob.size and _crc32c(path) == blob.crc32c


def _is_there(path: Path, blob: Any) -> bool:
    """Say whether an object was fetched: a file has its name only when size and CRC32C were right."""
    return path.is_file() and path.stat().st_size == blob.size


def _batches(missing: _Transfers) -> Iterator[_Transfers]:
    """Yield the large objects one by one, the others in batches."""
    batch: _Transfers = []
    size = 0
    for blob, path in sorted(missing, key=lambda transfer: transfer[0].size):
        full = len(batch) == _BATCH_FILES or size + blob.size > _BATCH_BYTES
        if batch and (full or blob.size > CHUNK):
            yield batch
            batch, size = [], 0
        batch.append((blob, path))
        size += blob.size
    if batch:
        yield batch


def _fetch(address: str, batch: _Transfers) -> None:
    """Fetch some objects; those that came keep their names when others fail."""
    large = len(batch) == 1 and batch[0][0].size > CHUNK
    failures = [_fetch_large(*batch[0])] if large else _fetch_small(batch)
    for (blob, path), failure in zip(batch, failures, strict=True):
        if failure is None:
            _finish(address, blob, path)
    for failure in failures:
        match failure:
            case NotFound() | PreconditionFailed():
                raise _changed(address) from failure
            case Exception():
                raise failure


def _fetch_small(batch: _Transfers) -> list[Exception | None]:
    return transfer_manager.download_many(
        [(blob, str(_part(path))) for blob, path in batch],
        # Google sends a checksum of what it sends; this one is compared with the listing's in the end.
        download_kwargs={"raw_download": True, "checksum": None, "retry": RETRY},
        worker_type=transfer_manager.THREAD,
        max_workers=WORKERS,
    )


def _fetch_large(blob: Any, path: Path) -> Exception | None:
    try:
        transfer_manager.download_chunks_concurrently(
            blob,
            str(_part(path)),
            chunk_size=CHUNK,
            download_kwargs={"raw_download": True, "retry": RETRY},
            worker_type=transfer_manager.THREAD,
            max_workers=WORKERS,
            crc32c_checksum=False,  # as above
        )
    except Exception as error:
        return error
    return None


def _finish(address: str, blob: Any, path: Path) -> None:
    part = _part(path)
    if not _is_same(part, blob):
        part.unlink()
        raise RunError(f"{address}: {path.name} did not come as its size and CRC32C say; run it again")
    part.rename(path)


def _send(batch: list[tuple[Any, Path]], generation: int) -> None:
    transfer_manager.upload_many(
        [(str(path), blob) for blob, path in batch],
        upload_kwargs={"checksum": "crc32c", "if_generation_match": generation, "retry": RETRY},
        worker_type=transfer_manager.THREAD,
        max_workers=WORKERS,
        raise_exception=True,
    )


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _crc32c(path: Path) -> str:
    checksum = google_crc32c.Checksum()
    with path.open("rb") as stream:
        for _ in checksum.consume(stream, 1 << 20):
            pass
    return base64.b64encode(checksum.digest()).decode()


def _progress(address: str, size: int) -> Any:
    hidden: dict[str, Any] = {} if size else {"disable": True}  # TQDM_DISABLE has its say, too
    return tqdm(total=size, desc=address, unit="B", unit_scale=True, **hidden)


def _changed(address: str) -> RunError:
    return RunError(f"{address}: an object there changed while it was fetched; run it again")
