"""The location of a stage's result, and its publication to `output`.

    workspace                 the result is in                           output, if it cannot be linked
    none                      output                                     -
    /volume                   /volume/STAGE/KEY                          refers there; small ones are copied
    gs://bucket/path          gs://bucket/path/STAGE/KEY and the cache   refers there; small ones are copied

An output gs://bucket/path gets the whole result or, with a workspace in a bucket, a reference to it.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.config.fields import format_address
from minitron.config.stages import LARGE, StageConfig
from minitron.errors import ConfigError
from minitron.storage import cache, references
from minitron.storage.bucket import is_bucket
from minitron.storage.files import mark_used
from minitron.storage.layout import partial_path, read_record, result_path
from minitron.storage.staging import InUse, delete_leftovers, lock_output, publish_copy, publish_links, read_intact


@dataclass(frozen=True)
class ResultLocation:
    """The location of a result: on this machine and, if the workspace or the output is in a bucket, in that bucket."""

    directory: Path
    remote: str | None


def result_location(stage: str, config: StageConfig, key: str) -> ResultLocation:
    """Return the location of the result with a key."""
    inner = result_path(stage, key)
    if is_bucket(config.workspace):
        return ResultLocation(cache.cache_directory() / inner, f"{format_address(config.workspace or '')}/{inner}")
    remote = format_address(config.output) if is_bucket(config.output) else None
    if config.workspace:
        return ResultLocation(config.workspace.absolute() / inner, remote)
    return ResultLocation(cache.cache_directory() / inner if remote else config.output, remote)


def find_result(location: ResultLocation, key: str) -> dict[str, Any] | None:
    """Return the record of the finished result with a key, or None; first complete a result that a kill interrupted.

    Raises:
        InUse: another process is working there.
    """
    record = _read_result(location, key, warn=True)
    is_begun = partial_path(location.directory).exists() or (location.remote and location.directory.exists())
    if record is None and is_begun:
        with lock_result(location, key, reuse=True) as record:
            return record
    delete_leftovers(location.directory)
    return record


@contextmanager
def lock_result(location: ResultLocation, key: str, reuse: bool) -> Iterator[dict[str, Any] | None]:
    """Hold the lock that all writers of a result take; yield its record, or None if the result must be made.

    Args:
        location: the location of the result.
        key: the key of the result.
        reuse: use an existing result: another process may just have finished it.

    Raises:
        InUse: another process is working there.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_output(location.directory))
            record = _complete_result(location, key) if reuse else None
        except InUse:
            record = _read_result(location, key) if reuse else None
            if record is None:
                raise
        yield record


def _complete_result(location: ResultLocation, key: str) -> dict[str, Any] | None:
    """Return the record of a result, or None; commit it to its bucket if a kill interrupted that."""
    record = _read_result(location, key)
    if record is None and location.remote and read_intact(location.directory, key):
        return commit_result(location, replace=False)
    return record


def _read_result(location: ResultLocation, key: str, warn: bool = False) -> dict[str, Any] | None:
    if location.remote is None:
        if record := read_intact(location.directory, key, warn):
            mark_used(location.directory)
        return record
    from minitron.storage import bucket_results

    record = bucket_results.read_record_at(location.remote)
    if record is None or record["key"] != key:
        return None
    bucket_results.mark_used(location.remote, record)
    return record


def commit_result(location: ResultLocation, replace: bool) -> dict[str, Any]:
    """Upload a result from this machine to its bucket, and move it to the cache, where references find it.

    The caller holds the lock.
    """
    from minitron.storage import bucket_results

    assert location.remote is not None
    record = bucket_results.commit_result(location.directory, location.remote, replace)
    if location.directory.is_relative_to(cache.cache_directory()):
        cache.move_to_cache(location.directory)
    return record


def publish_output(stage: str, config: StageConfig, location: ResultLocation, record: dict[str, Any]) -> None:
    """Make `output` the result or, if the result is large and cannot be linked, a reference to it."""
    if is_bucket(config.output):
        if format_address(config.output) != location.remote:
            _publish_to_bucket(stage, config, location, record)
    elif location.remote:
        reference = references.make_reference(location.remote, record)
        if stage in LARGE:
            references.write_reference(config.output, reference, record)
        else:
            publish_copy(references.locate_result(reference, location.remote), config.output, record["key"])
    elif location.directory != config.output:
        _publish_from_volume(stage, config, location, record)


def _publish_from_volume(stage: str, config: StageConfig, location: ResultLocation, record: dict[str, Any]) -> None:
    if stage not in LARGE:
        publish_copy(location.directory, config.output, record["key"])
    elif not publish_links(location.directory, config.output, record["key"]):
        references.write_reference(config.output, references.make_reference(location.directory, record), record)


def _publish_to_bucket(stage: str, config: StageConfig, location: ResultLocation, record: dict[str, Any]) -> None:
    """Commit a reference, or a small result, to an output in a bucket; the result is in the workspace's bucket."""
    from minitron.storage import bucket_results

    assert location.remote is not None
    reference = references.make_reference(location.remote, record)
    if stage not in LARGE:
        bucket_results.commit_result(
            references.locate_result(reference, location.remote), format_address(config.output), replace=False
        )
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / stage
        references.write_reference(directory, reference, record)
        bucket_results.commit_result(directory, format_address(config.output), replace=True)


def refuse_foreign(stage: str, config: StageConfig) -> None:
    """Refuse an output with anything but an earlier result of the same stage, because it would be deleted.

    Raises:
        ConfigError: the output holds something else.
    """
    output = format_address(config.output)
    record, is_result = _read_bucket_content(output) if is_bucket(output) else _read_content(config.output)
    if record and record["stage"] != stage:
        raise ConfigError(
            f"output {output}: holds a result of {record['stage']}, not of {stage}; give another directory"
        )
    if not is_result:
        raise ConfigError(f"output {output}: exists, and is not a stage's result; give a new directory, or delete it")


def _read_content(output: Path) -> tuple[dict[str, Any] | None, bool]:
    record = read_record(output) if output.is_dir() else None
    return record, not output.exists() or record is not None or (output.is_dir() and not any(output.iterdir()))


def _read_bucket_content(output: str) -> tuple[dict[str, Any] | None, bool]:
    from minitron.storage import bucket_results

    return bucket_results.inspect_output(output)
