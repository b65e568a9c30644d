"""Where a stage's result lies, and how it gets to `output`.

    workspace                 the result lies in                         output, where it cannot be linked
    none                      output                                     -
    /volume                   /volume/STAGE/KEY                          refers there; small ones are copied
    gs://bucket/path          gs://bucket/path/STAGE/KEY and the cache   refers there; small ones are copied

An output gs://bucket/path gets the whole result, or with a workspace in a bucket refers to it.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.config.fields import format_address
from minitron.config.stages import LARGE, StageConfig
from minitron.errors import ConfigError
from minitron.storage import cache, references
from minitron.storage.bucket import is_bucket
from minitron.storage.layout import read_record
from minitron.storage.staging import find_finished, publish_copy, publish_links


@dataclass(frozen=True)
class ResultLocation:
    """Where a result comes to lie: on this machine, and in a bucket where the workspace or else the output is one."""

    home: Path
    remote: str | None


def result_location(stage: str, config: StageConfig, key: str) -> ResultLocation:
    """Return where the result of this key belongs."""
    inner = f"{stage}/{key[:16]}"
    if is_bucket(config.workspace):
        return ResultLocation(cache.cache_directory() / inner, f"{format_address(config.workspace or '')}/{inner}")
    remote = format_address(config.output) if is_bucket(config.output) else None
    if config.workspace:
        return ResultLocation(config.workspace.absolute() / inner, remote)
    return ResultLocation(cache.cache_directory() / inner if remote else config.output, remote)


def find_result(place: ResultLocation, key: str) -> dict[str, Any] | None:
    """Return the record of the finished result of a key, wherever it lies; it is committed to its bucket if need be."""
    if place.remote is None:
        return find_finished(place.home, key)
    from minitron.storage import bucket_results

    record = bucket_results.read_record_at(place.remote)
    if record and record["key"] == key:
        return record
    return commit_result(place, replace=False) if find_finished(place.home, key) else None


def commit_result(place: ResultLocation, replace: bool) -> dict[str, Any]:
    """Upload the result on this machine to its bucket, and keep it where references to it find it."""
    from minitron.storage import bucket_results

    assert place.remote is not None
    record = bucket_results.commit_result(place.home, place.remote, replace)
    if place.home.is_relative_to(cache.cache_directory()):
        cache.move_to_cache(place.home)
    return record


def publish_output(stage: str, config: StageConfig, place: ResultLocation, record: dict[str, Any]) -> None:
    """Make `output` the result, or refer to it."""
    if is_bucket(config.output):
        if format_address(config.output) != place.remote:
            _publish_to_bucket(stage, config, place, record)
    elif place.remote:
        reference = references.make_reference(place.remote, record)
        if stage in LARGE:
            references.write_reference(config.output, reference, record)
        else:
            publish_copy(references.locate_result(reference, place.remote), config.output, record["key"])
    elif place.home != config.output:
        _publish_from_volume(stage, config, place, record)


def _publish_from_volume(stage: str, config: StageConfig, place: ResultLocation, record: dict[str, Any]) -> None:
    if stage not in LARGE:
        publish_copy(place.home, config.output, record["key"])
    elif not publish_links(place.home, config.output, record["key"]):
        references.write_reference(config.output, references.make_reference(place.home, record), record)


def _publish_to_bucket(stage: str, config: StageConfig, place: ResultLocation, record: dict[str, Any]) -> None:
    """Commit a reference, or a small result, to an output in a bucket; the result lies in the workspace's."""
    from minitron.storage import bucket_results

    assert place.remote is not None
    reference = references.make_reference(place.remote, record)
    if stage not in LARGE:
        bucket_results.commit_result(
            references.locate_result(reference, place.remote), format_address(config.output), replace=False
        )
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / stage
        references.write_reference(directory, reference, record)
        bucket_results.commit_result(directory, format_address(config.output), replace=True)


def refuse_foreign(stage: str, config: StageConfig) -> None:
    """Refuse an output that holds anything but an earlier result of the same stage: it would be deleted.

    Raises:
        ConfigError: it does.
    """
    output = format_address(config.output)
    record, is_result = _read_bucket_content(output) if is_bucket(output) else _read_content(config.output)
    if record and record["stage"] != stage:
        raise ConfigError(
            f"output {output}: holds a result of {record['stage']}, not of {stage}; give another directory"
        )
    if not is_result:
        raise ConfigError(f"output {output}: exists and is not a stage's result; give a new directory or delete it")


def _read_content(output: Path) -> tuple[dict[str, Any] | None, bool]:
    record = read_record(output) if output.is_dir() else None
    return record, not output.exists() or record is not None or (output.is_dir() and not any(output.iterdir()))


def _read_bucket_content(output: str) -> tuple[dict[str, Any] | None, bool]:
    from minitron.storage import bucket_results

    return bucket_results.inspect_output(output)
