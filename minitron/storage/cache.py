"""The cache of this machine. It outlives a task, and holds results by the hash of their content."""

import os
from pathlib import Path

from minitron.storage.bucket import is_bucket
from minitron.storage.files import delete_path
from minitron.storage.layout import read_record
from minitron.storage.staging import lock_output, publish_directory


def cache_directory() -> Path:
    """Return the directory of downloaded inputs and of results for a bucket: MINITRON_CACHE, or ~/.cache/minitron."""
    return Path(os.environ.get("MINITRON_CACHE") or Path.home() / ".cache" / "minitron").absolute()


def persistent_directory(workspace: Path | str | None) -> Path:
    """Return the directory that outlives a task: the workspace, or the cache if there is no workspace on a disk."""
    return cache_directory() if workspace is None or is_bucket(workspace) else Path(workspace)


def move_to_cache(directory: Path) -> Path:
    """Move a result into the cache, where references find it by its content's hash; return its new directory.

    The caller holds the result's lock.
    """
    record = read_record(directory)
    assert record is not None
    cached = result_cache_path(record["output_sha256"], record["key"])
    with lock_output(cached, wait=True):  # another process may be fetching it
        if read_record(cached):
            delete_path(directory)
        else:
            publish_directory(directory, cached)
    return cached


def result_cache_path(sha256: str, key: str) -> Path:
    """Return the directory of a result in the cache. It includes the key, because each key has a record of its own."""
    return cache_directory() / "results" / f"{sha256[:32]}-{key[:16]}"
