"""What this machine keeps when a task ends: the cache, and the results in it by their content's hash."""

import os
import shutil
from pathlib import Path

from minitron.storage.bucket import is_bucket
from minitron.storage.layout import read_record


def cache_directory() -> Path:
    """Return where this machine keeps what it fetched or made for a bucket: MINITRON_CACHE, or ~/.cache/minitron."""
    return Path(os.environ.get("MINITRON_CACHE") or Path.home() / ".cache" / "minitron").absolute()


def persistent_directory(workspace: Path | str | None) -> Path:
    """Return where a task keeps what outlives it: the workspace, or the cache if that is a bucket or there is none."""
    return cache_directory() if workspace is None or is_bucket(workspace) else Path(workspace)


def move_to_cache(home: Path) -> Path:
    """Put a result into the cache, where references find it by its content's hash; return its place there."""
    record = read_record(home)
    assert record is not None
    kept = place_in_cache(record["output_sha256"], record["key"])
    if read_record(kept):
        shutil.rmtree(home)
    else:
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(kept, ignore_errors=True)
        home.rename(kept)
    return kept


def place_in_cache(sha256: str, key: str) -> Path:
    """Return a place in the cache; equal content has as many places as records, which tell different stories."""
    return cache_directory() / "results" / f"{sha256[:32]}-{key[:16]}"
