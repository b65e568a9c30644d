"""A result in a bucket is complete or not there: cut uploads, a second uploader, changes afterwards."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minitron.config.stages import FinetuneConfig
from minitron.errors import ConfigError, RunError
from minitron.runtime.model_sources import local_model
from minitron.storage import bucket_results, transfers
from minitron.storage.hashing import content_hash
from minitron.storage.layout import RECORD
from tests.servers.gcs import CUT, STALL, World

ADDRESS = "gs://bucket/results/one"
SIZES = {"config.json": 100, "model-1.safetensors": 5000, "model-2.safetensors": 6000, "sub/x.bin": 0}


def result(directory: Path, key: str = "key") -> Path:
    """A result with random content, and its record."""
    (directory / "sub").mkdir(parents=True)
    for name, size in SIZES.items():
        (directory / name).write_bytes(os.urandom(size))
    record = {"stage": "prune", "key": key, "output_sha256": content_hash(directory)}
    (directory / RECORD).write_text(json.dumps(record))
    return directory


def uploads(world: World) -> list[int]:
    return [entry.uploaded for entry in world.log if entry.uploaded]


def test_the_record_comes_last(world: World, tmp_path: Path) -> None:
    home = result(tmp_path / "home")
    seen: list[list[str]] = []
    world.fault = lambda request: seen.append(world.names())
    record = bucket_results.commit_result(home, ADDRESS, replace=False)
    names = {f"results/one/{name}" for name in [*SIZES, RECORD]}
    assert set(world.names()) == names
    before = [state for state in seen if f"results/one/{RECORD}" not in state]
    assert set(before[-1]) == names - {f"results/one/{RECORD}"} | {f"results/one/{RECORD}.partial"}
    assert bucket_results.read_record_at(ADDRESS) == record
    assert record["objects"].keys() == SIZES.keys() and record["key"] == "key"


def test_committed_once_it_is_not_uploaded_again(world: World, tmp_path: Path) -> None:
    home = result(tmp_path / "home")
    first = bucket_results.commit_result(home, ADDRESS, replace=False)
    world.log.clear()
    assert bucket_results.commit_result(home, ADDRESS, replace=False) == first and world.uploaded == 0


def test_a_second_uploader_takes_what_the_first_committed(world: World, tmp_path: Path) -> None:
    first = bucket_results.commit_result(result(tmp_path / "one"), ADDRESS, replace=False)
    second = result(tmp_path / "two")
    world.log.clear()
    assert bucket_results.commit_result(second, ADDRESS, replace=False) == first and world.uploaded == 0


def test_a_result_is_replaced_on_demand_and_incomplete_meanwhile(world: World, tmp_path: Path) -> None:
    bucket_results.commit_result(result(tmp_path / "one"), ADDRESS, replace=False)
    world.put("results/one/left-over.bin", b"of another attempt")
    states: list[bool] = []
    second = result(tmp_path / "two")
    world.fault = lambda request: states.append(f"results/one/{RECORD}" in world.names()) if request.uploaded else None
    record = bucket_results.commit_result(second, ADDRESS, replace=True)
    assert states and not any(states)
    assert set(world.names()) == {f"results/one/{name}" for name in [*SIZES, RECORD]}
    assert record["output_sha256"] == content_hash(second)


UPLOAD = """
import sys
from pathlib import Path
from minitron.storage import bucket_results, transfers
transfers.WORKERS = 1
bucket_results.commit_result(Path(sys.argv[1]), sys.argv[2], replace=False)
"""


def test_a_killed_upload_is_no_result_and_goes_on(world: World, tmp_path: Path) -> None:
    home = result(tmp_path / "home")
    large = {"results/one/model-1.safetensors", "results/one/model-2.safetensors"}
    world.fault = lambda request: STALL if request.uploaded and large <= set(world.names()) else None
    process = subprocess.Popen([sys.executable, "-c", UPLOAD, str(home), ADDRESS])
    assert world.stalled.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    world.fault = lambda request: None
    assert bucket_results.read_record_at(ADDRESS) is None and len(world.names()) > 2
    with pytest.raises(RunError, match=r"results/one: its upload is not complete; wait for it, or run the stage that"):
        local_model(ADDRESS, FinetuneConfig(teacher=ADDRESS, dataset=home, output=tmp_path / "out"))
    world.log.clear()
    bucket_results.commit_result(home, ADDRESS, replace=False)
    assert world.uploaded < 2500, "what was there was uploaded again"
    assert bucket_results.read_record_at(ADDRESS)


def test_a_cut_connection_leaves_no_result(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "RETRY", transfers.DEFAULT_RETRY.with_timeout(1.0).with_delay(0.1))
    home = result(tmp_path / "home")
    world.fault = lambda request: CUT if request.uploaded > 5600 else None
    with pytest.raises(RunError, match=r"results/one: not uploaded \(.*run it again: what is there complete is kept"):
        bucket_results.commit_result(home, ADDRESS, replace=False)
    assert bucket_results.read_record_at(ADDRESS) is None
    world.fault = lambda request: None
    world.log.clear()
    bucket_results.commit_result(home, ADDRESS, replace=False)
    assert sum(size > 5600 for size in uploads(world)) == 1 and not any(5000 < size < 5600 for size in uploads(world))


def test_two_uploaders_at_a_time_do_not_mix(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one, of other content, writes and commits while this one uploads."""
    monkeypatch.setattr(transfers, "WORKERS", 1)
    home, other = result(tmp_path / "home"), result(tmp_path / "other")
    racing: list[Any] = []

    def race(request: Any) -> None:
        if not racing and request.uploaded > 4000:
            racing.append(None)
            racing.append(bucket_results.commit_result(other, ADDRESS, replace=False))

    world.fault = race
    with pytest.raises(RunError, match="another process writes there"):
        bucket_results.commit_result(home, ADDRESS, replace=False)
    assert bucket_results.read_record_at(ADDRESS) == racing[1]
    assert bucket_results.commit_result(home, ADDRESS, replace=False) == racing[1], (
        "the second attempt takes the other's result"
    )


@pytest.mark.parametrize("change", ["changed", "deleted", "added"])
def test_a_change_afterwards_is_found_without_a_download(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    bucket_results.commit_result(result(tmp_path / "home"), ADDRESS, replace=False)
    if change == "deleted":
        del world.storage.objects["bucket"]["results/one/sub/x.bin"]
    else:
        world.put(f"results/one/{'config.json' if change == 'changed' else 'more.json'}", b"{}")
    world.log.clear()
    assert bucket_results.read_record_at(ADDRESS) is None
    assert "results/one: damaged or changed since it was written; it is made again" in capsys.readouterr().err
    assert world.fetched() == [f"results/one/{RECORD}"]


def test_an_address_without_a_bucket_is_refused() -> None:
    with pytest.raises(ConfigError, match="gs://: no bucket"):
        bucket_results.read_record_at("gs://")
