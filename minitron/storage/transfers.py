"""Move files to and from a bucket: many at a time, large ones in chunks, each checked by CRC32C.

A download fetches the generations of its snapshot. A file is called `NAME.part` until its size and CRC32C are verified.
If one file fails, the complete ones are kept. An upload never replaces an object; it only creates missing ones.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from google.api_core.exceptions import NotFound, PreconditionFailed
from google.cloud.storage import transfer_manager
from google.cloud.storage.retry import DEFAULT_RETRY
from tqdm import tqdm

from minitron.errors import RunError
from minitron.storage.bucket import (
    CHUNK,
    format_snapshot,
    list_objects,
    make_handles,
    one_line_errors,
    require_objects,
)
from minitron.storage.hashing import file_crc32c

RETRY = DEFAULT_RETRY
"""The library's default: broken connections and 408, 429, 5xx are retried for two minutes, with growing pauses."""

WORKERS = 8
_BATCH_FILES, _BATCH_BYTES = 64, 256 << 20
"""Small objects are fetched in batches of at most this size, so that a kill loses at most one batch."""

_ATTEMPTS = 3
"""How often an object is fetched if its size or CRC32C is not what the bucket lists."""

_Transfers = list[tuple[Any, Path]]


def download_objects(identity: str, target: Path, select: Callable[[Iterable[str]], set[str]] = set) -> None:
    """Download the objects of a snapshot into a directory; existing files are kept.

    Args:
        identity: the snapshot.
        target: the directory.
        select: returns the names to download, out of all names.

    Raises:
        RunError: an object changed since the snapshot, does not match its CRC32C, or the bucket cannot be read.
    """
    address = identity.rpartition("#")[0]
    objects = require_objects(address)
    if format_snapshot(address, objects) != identity:
        raise _changed_error(address)
    wanted = {name: objects[name] for name in sorted(select(objects))}
    missing = [(blob, target / name) for name, blob in wanted.items() if not _is_there(target / name, blob)]
    for _, path in missing:
        path.parent.mkdir(parents=True, exist_ok=True)
    with one_line_errors(address, "fetched"), _progress_bar(address, sum(blob.size for blob, _ in missing)) as bar:
        for batch in _batch_downloads(missing):
            _fetch_batch(address, batch)
            bar.update(sum(blob.size for blob, _ in batch))


def upload_files(files: dict[str, Path], address: str) -> dict[str, int]:
    """Create the objects of files below an address, except those that exist already and are equal.

    Args:
        files: the files by their paths below the address.
        address: gs://bucket/path.

    Returns:
        The generation of every file's object.

    Raises:
        RunError: an object exists with other content, this account may not write to the bucket, or the connection
            broke.
    """
    objects = list_objects(address)
    for name in sorted(files.keys() & objects.keys()):
        _check_same(files[name], objects[name])
    sizes = {name: path.stat().st_size for name, path in files.items() if name not in objects}
    blobs = make_handles(address, sizes)
    with one_line_errors(address, "uploaded"), _progress_bar(address, sum(sizes.values())) as bar:
        for batch in _batch_uploads(sorted(sizes, key=lambda name: -sizes[name]), sizes):
            _send_batch([(blobs[name], files[name]) for name in batch])
            bar.update(sum(sizes[name] for name in batch))
    return {name: (objects | blobs)[name].generation for name in files}


def _batch_uploads(names: list[str], sizes: dict[str, int]) -> Iterator[list[str]]:
    """Yield batches of names for the progress bar, each large enough to keep all workers busy."""
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
    return path.stat().st_size == blob.size and file_crc32c(path) == blob.crc32c


def _is_there(path: Path, blob: Any) -> bool:
    """Say whether an object was fetched: a file gets its name only after its size and CRC32C were checked."""
    return path.is_file() and path.stat().st_size == blob.size


def _batch_downloads(missing: _Transfers) -> Iterator[_Transfers]:
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


def _fetch_batch(address: str, batch: _Transfers) -> None:
    """Fetch a batch. Objects that arrived get their names even if others fail; corrupt ones are fetched again."""
    for _ in range(_ATTEMPTS):
        large = len(batch) == 1 and batch[0][0].size > CHUNK
        failures = [_fetch_large(*batch[0])] if large else _fetch_small(batch)
        outcomes = list(zip(batch, failures, strict=True))
        batch = [transfer for transfer, failure in outcomes if not failure and not _finish_download(*transfer)]
        for failure in failures:
            match failure:
                case NotFound() | PreconditionFailed():
                    raise _changed_error(address) from failure
                case Exception():
                    raise failure
        if not batch:
            return
    names = ", ".join(path.name for _, path in batch)
    raise RunError(f"{address}: {names}: wrong size or CRC32C in {_ATTEMPTS} downloads; run it again")


def _fetch_small(batch: _Transfers) -> list[Exception | None]:
    return transfer_manager.download_many(
        [(blob, str(_part_path(path))) for blob, path in batch],
        # `_finish_download` compares the checksum of the file with the listing's; here it would be computed twice.
        download_kwargs={"raw_download": True, "checksum": None, "retry": RETRY},
        worker_type=transfer_manager.THREAD,
        max_workers=WORKERS,
    )


def _fetch_large(blob: Any, path: Path) -> Exception | None:
    try:
        transfer_manager.download_chunks_concurrently(
            blob,
            str(_part_path(path)),
            chunk_size=CHUNK,
            download_kwargs={"raw_download": True, "retry": RETRY},
            worker_type=transfer_manager.THREAD,
            max_workers=WORKERS,
            crc32c_checksum=False,  # as above
        )
    except Exception as error:
        return error
    return None


def _finish_download(blob: Any, path: Path) -> bool:
    """Give a fetched file its name if it has the object's size and CRC32C; else delete it, and return False."""
    part = _part_path(path)
    if not _is_same(part, blob):
        part.unlink()
        return False
    part.rename(path)
    return True


def _send_batch(batch: _Transfers) -> None:
    """Create the objects of a batch. An object that exists already is accepted if it is equal.

    It exists if the answer to its upload was lost, or if another process uploads the same result.
    """
    failures = transfer_manager.upload_many(
        [(str(path), blob) for blob, path in batch],
        upload_kwargs={"checksum": "crc32c", "if_generation_match": 0, "retry": RETRY},
        worker_type=transfer_manager.THREAD,
        max_workers=WORKERS,
    )
    for (blob, path), failure in zip(batch, failures, strict=True):
        if isinstance(failure, PreconditionFailed):
            blob.reload()
            _check_same(path, blob)
        elif failure:
            raise failure


def _check_same(path: Path, blob: Any) -> None:
    if not _is_same(path, blob):
        raise RunError(f"gs://{blob.bucket.name}/{blob.name}: exists with other content; delete it and run it again")


def _part_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _progress_bar(address: str, size: int) -> Any:
    hidden: dict[str, Any] = {} if size else {"disable": True}  # else TQDM_DISABLE decides
    return tqdm(total=size, desc=address, unit="B", unit_scale=True, **hidden)


def _changed_error(address: str) -> RunError:
    return RunError(f"{address}: an object changed during the download; run it again")
