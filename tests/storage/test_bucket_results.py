"""A result in a bucket is complete or not there: cut uploads, a second uploader, changes afterwards."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from minitron.config.stages import FinetuneConfig
from minitron.errors import ConfigError, MinitronError, RunError
from minitron.runtime.model_sources import local_model
from minitron.storage import bucket_results, transfers
from minitron.storage.bucket import take_snapshot
from minitron.storage.hashing import content_hash
from minitron.storage.layout import RECORD, read_record
from minitron.storage.references import make_reference
from minitron.storage.transfers import download_objects
from tests.servers.gcs import CUT, LOST, STALL, World

ADDRESS = "gs://bucket/results/one"
SIZES = {"config.json": 100, "model-1.safetensors": 5000, "model-2.safetensors": 6000, "sub/x.bin": 0}


def result(directory: Path, names: tuple[str, ...] = tuple(SIZES)) -> Path:
    """A result with random content, and its record."""
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(os.urandom(SIZES[name]))
    record = {"stage": "prune", "key": "key", "output_sha256": content_hash(directory)}
    (directory / RECORD).write_text(json.dumps(record))
    return directory


def names(world: World) -> dict[str, set[str]]:
    """The objects below the address, by their directory; "" has the record."""
    below = [name.removeprefix("results/one/") for name in world.names("results/one/")]
    split = [(head, tail) if tail else ("", head) for head, _, tail in (name.partition("/") for name in below)]
    return {head: {tail for other, tail in split if other == head} for head, _ in split}


def test_the_record_comes_last_and_names_the_directory(world: World, tmp_path: Path) -> None:
    home = result(tmp_path / "home")
    seen: list[dict[str, set[str]]] = []
    world.fault = lambda request: seen.append(names(world))
    record = bucket_results.commit_result(home, ADDRESS, replace=False)
    files = {*SIZES, RECORD}
    assert names(world) == {"": {RECORD}, record["directory"]: files}
    before = [state for state in seen if "" not in state]
    assert before[-1] == {record["directory"]: files}
    assert all(state[record["directory"]] == files for state in seen if RECORD in state.get(record["directory"], set()))
    assert bucket_results.read_record_at(ADDRESS) == record
    assert record["objects"].keys() == files and record["key"] == "key"
    local = local_model(ADDRESS, FinetuneConfig(teacher=ADDRESS, dataset=home, output=tmp_path / "out"))
    assert content_hash(local) == record["output_sha256"] and read_record(local) == read_record(home)
    address = make_reference(ADDRESS, record).address
    assert address == f"{ADDRESS}/{record['directory']}", "a directory that other tools read, too"
    assert bucket_results.find_files(ADDRESS) == bucket_results.find_files(address) == address
    assert take_snapshot(address) == bucket_results.take_snapshot(ADDRESS) == bucket_results.take_snapshot(address)


def test_committed_once_it_is_not_uploaded_again(world: World, tmp_path: Path) -> None:
    home = result(tmp_path / "home")
    first = bucket_results.commit_result(home, ADDRESS, replace=False)
    world.log.clear()
    assert bucket_results.commit_result(home, ADDRESS, replace=False) == first and world.uploaded == 0
    assert bucket_results.commit_result(home, ADDRESS, replace=True) == first and world.uploaded == 0


def test_a_second_uploader_takes_what_the_first_committed(world: World, tmp_path: Path) -> None:
    first = bucket_results.commit_result(result(tmp_path / "one"), ADDRESS, replace=False)
    second = result(tmp_path / "two")
    world.log.clear()
    assert bucket_results.commit_result(second, ADDRESS, replace=False) == first and world.uploaded == 0


def test_a_result_is_replaced_on_demand_and_stays_for_those_who_refer_to_it(world: World, tmp_path: Path) -> None:
    first = bucket_results.commit_result(result(tmp_path / "one"), ADDRESS, replace=False)
    second = result(tmp_path / "two")
    seen: list[Any] = []
    world.fault = lambda request: seen.append(bucket_results.read_record_at(ADDRESS)) if request.uploaded else None
    record = bucket_results.commit_result(second, ADDRESS, replace=True)
    assert seen == [first] * (len(SIZES) + 2), "there is a complete result all the time"
    assert record["output_sha256"] == content_hash(second)
    assert names(world).keys() == {"", first["directory"], record["directory"]}
    assert check_result(ADDRESS, first, tmp_path / "first") == check_result(ADDRESS, record, tmp_path / "second") == []


def test_results_of_version_0_1_0_are_read_and_replaced(world: World, tmp_path: Path) -> None:
    """They lie beside their record."""
    home = result(tmp_path / "home")
    objects = {}
    for name in SIZES:
        world.put(f"results/one/{name}", home / name)
        objects[name] = int(world.generation("bucket", f"results/one/{name}"))
    record = json.loads((home / RECORD).read_text()) | {"objects": objects}
    world.put(f"results/one/{RECORD}", json.dumps(record).encode())
    assert bucket_results.read_record_at(ADDRESS) == record
    assert bucket_results.commit_result(result(tmp_path / "two"), ADDRESS, replace=False) == record
    assert check_result(ADDRESS, record, tmp_path / "read") == []
    replaced = bucket_results.commit_result(tmp_path / "two", ADDRESS, replace=True)
    assert bucket_results.read_record_at(ADDRESS) == replaced
    assert check_result(ADDRESS, replaced, tmp_path / "read") == []


UPLOAD = """
import sys
from pathlib import Path
from minitron.storage import bucket_results, transfers
transfers.WORKERS = 1
bucket_results.commit_result(Path(sys.argv[1]), sys.argv[2], replace=False)
"""


def test_a_killed_upload_is_no_result_and_goes_on(world: World, tmp_path: Path) -> None:
    home = result(tmp_path / "home")
    world.fault = lambda request: STALL if request.path.endswith("config.json") else None  # after the two large ones
    process = subprocess.Popen([sys.executable, "-c", UPLOAD, str(home), ADDRESS])
    assert world.stalled.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    world.fault = lambda request: None
    ((directory, files),) = names(world).items()
    assert bucket_results.read_record_at(ADDRESS) is None and len(files) == 3
    assert bucket_results.inspect_output(ADDRESS) == (None, True), "a stage may write there"
    for address in (ADDRESS, f"{ADDRESS}/{directory}"):
        with pytest.raises(RunError, match=r"its upload is not complete; wait for it, or run the stage that writes"):
            local_model(address, FinetuneConfig(teacher=address, dataset=home, output=tmp_path / "out"))
    world.log.clear()
    record = bucket_results.commit_result(home, ADDRESS, replace=False)
    assert world.uploaded < 2500, "what was there was uploaded again"
    assert bucket_results.read_record_at(ADDRESS) == record and record["directory"] == directory


def test_the_next_writer_deletes_what_a_dead_one_left(world: World, tmp_path: Path) -> None:
    """A directory that was named once, and anything that is nobody's upload, stays."""
    first = bucket_results.commit_result(result(tmp_path / "one"), ADDRESS, replace=False)
    generation = world.generation("bucket", f"results/one/{RECORD}")
    for name in (f"0123456789abcdef-{generation}/{RECORD}", f"0123456789abcdef-{generation}/a.bin", "mine/notes.txt"):
        world.put(f"results/one/{name}", b"x")
    record = bucket_results.commit_result(result(tmp_path / "two"), ADDRESS, replace=True)
    assert names(world).keys() == {"", "mine", first["directory"], record["directory"]}


def test_a_cut_connection_leaves_no_result(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "RETRY", transfers.DEFAULT_RETRY.with_timeout(1.0).with_delay(0.1))
    home = result(tmp_path / "home")
    world.fault = lambda request: CUT if request.path.endswith("model-2.safetensors") else None
    with pytest.raises(RunError, match=r"not uploaded \(.*then run it again; complete files are kept"):
        bucket_results.commit_result(home, ADDRESS, replace=False)
    assert bucket_results.read_record_at(ADDRESS) is None
    world.fault = lambda request: None
    world.log.clear()
    bucket_results.commit_result(home, ADDRESS, replace=False)
    assert [entry.path.rpartition("/")[2] for entry in world.log if entry.uploaded] == [
        "model-2.safetensors", RECORD, RECORD,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["model-1.safetensors", f"-0/{RECORD}", f"one/{RECORD}"])
def test_a_lost_answer_does_not_fail_an_upload(world: World, tmp_path: Path, name: str) -> None:
    """The object was stored; the library asks again and is told that it is there. That holds for the record, too."""
    lost: list[str] = []

    def lose(request: Any) -> Any:
        if request.uploaded and request.path.endswith(name) and not lost:
            lost.append(request.path)
            return LOST
        return None

    world.fault = lose
    home = result(tmp_path / "home")
    record = bucket_results.commit_result(home, ADDRESS, replace=False)
    assert lost and bucket_results.read_record_at(ADDRESS) == record
    assert record["output_sha256"] == content_hash(home) and names(world).keys() == {"", record["directory"]}


@pytest.mark.parametrize("change", ["changed", "deleted", "added"])
def test_a_change_afterwards_is_found_without_a_download(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    first = bucket_results.commit_result(result(tmp_path / "home"), ADDRESS, replace=False)
    directory = f"results/one/{first['directory']}"
    if change == "deleted":
        del world.storage.objects["bucket"][f"{directory}/sub/x.bin"]
    else:
        world.put(f"{directory}/{'config.json' if change == 'changed' else 'more.json'}", b"{}")
    world.log.clear()
    assert bucket_results.read_record_at(ADDRESS) is None
    assert "results/one: damaged or changed since it was written; making it again" in capsys.readouterr().err
    assert world.fetched() == [f"results/one/{RECORD}"]
    second = bucket_results.commit_result(result(tmp_path / "again"), ADDRESS, replace=False)
    assert bucket_results.read_record_at(ADDRESS) == second


def test_an_address_without_a_bucket_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gs://.*: no bucket"):
        bucket_results.read_record_at("gs://")


def test_a_missing_bucket_is_no_missing_result(world: World) -> None:
    with pytest.raises(RunError, match=r"gs://nobucket/one: not fetched \(404"):
        bucket_results.read_record_at("gs://nobucket/one")


def race(world: World, tmp_path: Path, rounds: int) -> list[str]:
    """Let two or three writers of a key at a time commit, and retry as Kubeflow does, while readers read.

    Each writer has content of its own. Every third round has three writers, and in every fifth the first one replaces.

    Returns:
        The faults: results that a writer was told of and that are gone, and directories with mixed content.
    """
    names = ("one", "two", "three")
    writers = {name: result(tmp_path / name, ("config.json", "model-1.safetensors")) for name in names}
    hashes = {content_hash(directory) for directory in writers.values()}
    faults: list[str] = []
    world.fault = lambda request: time.sleep(random.uniform(0, 0.004)) if request.uploaded else None

    def write(name: str, address: str, replace: bool, start: threading.Barrier) -> dict[str, Any]:
        start.wait()
        for _ in range(50):
            try:
                return bucket_results.commit_result(writers[name], address, replace)
            except RunError:
                continue
        raise AssertionError(f"{name} could not write {address}")

    def read(address: str, number: int, start: threading.Barrier, done: threading.Event) -> None:
        config = FinetuneConfig(teacher=address, dataset=tmp_path, output=tmp_path / "out", workspace=tmp_path / "read")
        start.wait()
        while not done.wait(0.01):
            try:
                directory = local_model(address, config)
            except MinitronError:  # nothing is there yet
                continue
            if content_hash(directory) not in hashes or read_record(directory) is None:
                faults.append(f"round {number}: a reader was given mixed content")
            shutil.rmtree(tmp_path / "read")

    for number in range(rounds):
        address, count = f"gs://bucket/race/{number}", 3 if number % 3 == 0 else 2
        start, done = threading.Barrier(count + 1), threading.Event()
        reader = threading.Thread(target=read, args=(address, number, start, done))
        reader.start()
        with ThreadPoolExecutor(count) as pool:
            tasks = [
                pool.submit(write, name, address, number % 5 == 0 and name == "one", start) for name in names[:count]
            ]
        done.set()
        reader.join()
        for task in tasks:
            faults += [f"round {number}: {fault}" for fault in check_result(address, task.result(), tmp_path / "check")]
    return faults


def check_result(address: str, record: dict[str, Any], directory: Path) -> list[str]:
    """Return what is wrong with a result whose writer was told that it is there: nothing, or one fault."""
    shutil.rmtree(directory, ignore_errors=True)
    reference = make_reference(address, record)
    try:
        download_objects(take_snapshot(reference.address), directory)
    except MinitronError as error:
        return [f"lost ({error})"]
    return [] if content_hash(directory) == reference.sha256 else ["holds other content than its writer was told"]


def test_writers_of_one_key_lose_nothing_and_readers_see_no_mixture(world: World, tmp_path: Path) -> None:
    assert race(world, tmp_path, 100) == []
