"""Objects to files and back: many at a time, pinned, checked, resumed after a kill, and every failure in one line."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.api_core.exceptions import GoogleAPICallError, NotFound, PreconditionFailed

from minitron.errors import ConfigError, MinitronError, RunError
from minitron.storage import bucket, transfers
from tests.servers.gcs import CUT, DAMAGE, LOST, STALL, World

ADDRESS = "gs://bucket/data"
MB = 1 << 20


@pytest.fixture
def content(world: World) -> dict[str, bytes]:
    """Eleven objects below data/, one of them of three and a half chunks, and others beside it."""
    files = {f"part-{place}.txt": os.urandom(1000 + place) for place in range(9)}
    files |= {"deep/er/large.bin": os.urandom(3 * MB + MB // 2), "empty.txt": b""}
    for name, text in files.items():
        world.put(f"data/{name}", text)
    world.put("data-other/x.txt", b"x")
    world.log.clear()
    return files


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "CHUNK", MB)
    monkeypatch.setattr(bucket, "CHUNK", MB)
    monkeypatch.setattr(transfers, "_BATCH_FILES", 4)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again for a second, not two minutes."""
    monkeypatch.setattr(transfers, "RETRY", transfers.DEFAULT_RETRY.with_timeout(1.0).with_delay(0.1))


def read(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def one_line(error: pytest.ExceptionInfo[MinitronError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_prefix_becomes_a_directory(world: World, content: dict[str, bytes], tmp_path: Path) -> None:
    transfers.download_objects(bucket.take_snapshot(ADDRESS), tmp_path / "data")
    assert read(tmp_path / "data") == content
    large = [entry for entry in world.fetched() if entry == "data/deep/er/large.bin"]
    assert len(large) == 4, "it comes in chunks"
    assert world.downloaded == sum(map(len, content.values()))


def test_one_object_becomes_a_file(world: World, content: dict[str, bytes], tmp_path: Path) -> None:
    transfers.download_objects(bucket.take_snapshot(f"{ADDRESS}/part-3.txt"), tmp_path)
    assert read(tmp_path) == {"part-3.txt": content["part-3.txt"]}


def test_a_snapshot_changes_with_every_object(world: World, content: dict[str, bytes]) -> None:
    seen = {bucket.take_snapshot(ADDRESS), bucket.take_snapshot(f"{ADDRESS}/")}
    assert {text.partition("#")[0] for text in seen} == {ADDRESS, f"{ADDRESS}/"}
    assert len({text.partition("#")[2] for text in seen}) == 1
    world.put("data/part-0.txt", content["part-0.txt"])
    seen.add(bucket.take_snapshot(ADDRESS))
    world.put("data/new.txt", b"")
    assert len({text.partition("#")[2] for text in seen | {bucket.take_snapshot(ADDRESS)}}) == 3


def test_what_changed_since_the_snapshot_is_refused(world: World, content: dict[str, bytes], tmp_path: Path) -> None:
    identity = bucket.take_snapshot(ADDRESS)
    world.put("data/part-0.txt", b"changed")
    with pytest.raises(RunError, match=r"gs://bucket/data: an object changed during the download; run it again"):
        transfers.download_objects(identity, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["part-3.txt", "deep/er/large.bin"])
def test_what_changes_between_listing_and_download_is_refused(
    world: World, content: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    changed = []

    def change(request: Any) -> None:
        if "media" not in changed and request.method == "GET" and request.path.endswith(name):
            changed.append("media")
            world.storage.objects["bucket"][f"data/{name}"]["generation"] = "1"

    world.fault = change
    with pytest.raises(RunError, match="an object changed during the download"):
        transfers.download_objects(bucket.take_snapshot(ADDRESS), tmp_path)
    assert changed and not (tmp_path / name).exists()


def test_what_is_there_is_not_fetched_again(world: World, content: dict[str, bytes], tmp_path: Path) -> None:
    identity = bucket.take_snapshot(ADDRESS)
    transfers.download_objects(identity, tmp_path)
    (tmp_path / "part-5.txt").unlink()
    world.log.clear()
    transfers.download_objects(identity, tmp_path)
    assert world.fetched() == ["data/part-5.txt"] and read(tmp_path) == content


DOWNLOAD = """
import sys
from pathlib import Path
from minitron.storage import bucket, transfers
transfers.CHUNK, transfers._BATCH_FILES = 1 << 20, 4
transfers.download_objects(bucket.take_snapshot(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_killed_download_goes_on(world: World, content: dict[str, bytes], tmp_path: Path) -> None:
    world.fault = lambda request: STALL if request.path.endswith("large.bin") else None
    process = subprocess.Popen([sys.executable, "-c", DOWNLOAD, ADDRESS, str(tmp_path)])
    assert world.stalled.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = read(tmp_path)
    assert "deep/er/large.bin" not in there and there["deep/er/large.bin.part"] != content["deep/er/large.bin"]
    world.fault = lambda request: None
    world.log.clear()
    transfers.download_objects(bucket.take_snapshot(ADDRESS), tmp_path)
    assert set(world.fetched()) == {"data/deep/er/large.bin"} and read(tmp_path) == content


def test_a_broken_connection_is_tried_again(world: World, content: dict[str, bytes], tmp_path: Path) -> None:
    broken = set()

    def once(request: Any) -> Any:
        if "/o/" in request.path and request.path not in broken:
            broken.add(request.path)
            return CUT if len(broken) % 2 else 503
        return None

    world.fault = once
    transfers.download_objects(bucket.take_snapshot(ADDRESS), tmp_path)
    assert len(broken) == len(content) and read(tmp_path) == content


def test_a_connection_that_stays_broken_is_one_line(
    world: World, content: dict[str, bytes], tmp_path: Path, impatient: None
) -> None:
    world.fault = lambda request: CUT if request.path.endswith("part-8.txt") else None
    with pytest.raises(RunError) as caught:
        transfers.download_objects(bucket.take_snapshot(ADDRESS), tmp_path)
    message = one_line(caught)
    assert message.startswith("gs://bucket/data: not fetched (")
    assert message.endswith("and the network, then run it again; complete files are kept")
    assert not (tmp_path / "part-8.txt").exists() and (tmp_path / "part-7.txt").exists()


@pytest.mark.parametrize("name", ["part-3.txt", "deep/er/large.bin"])
def test_a_damaged_object_is_fetched_again(
    world: World, content: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The others of its batch come once. After three times it is an error, and they stay."""
    monkeypatch.setattr(transfers, "_BATCH_FILES", 64)
    monkeypatch.setattr(transfers, "CHUNK", 4 * MB)
    times: list[str] = []

    def damage(request: Any) -> Any:
        if not request.path.endswith(name):
            return None
        times.append(name)
        return DAMAGE if len(times) <= limit else None

    world.fault = damage
    identity = bucket.take_snapshot(ADDRESS)
    limit = 2
    transfers.download_objects(identity, tmp_path / "data")
    assert read(tmp_path / "data") == content
    once = {path for path, text in content.items() if text}
    assert sorted(world.fetched()) == sorted([f"data/{path}" for path in once] + [f"data/{name}"] * 2)
    limit, times = 3, []
    message = rf"data: {Path(name).name}: wrong size or CRC32C in 3 downloads; run it again"
    with pytest.raises(RunError, match=message):
        transfers.download_objects(identity, tmp_path / "again")
    assert read(tmp_path / "again") == {path: text for path, text in content.items() if path != name}


def test_a_damaged_large_object_is_fetched_again(world: World, content: dict[str, bytes], tmp_path: Path) -> None:
    """A chunk of it is wrong, once."""
    damaged: list[str] = []

    def damage(request: Any) -> Any:
        if request.path.endswith("large.bin") and not damaged:
            damaged.append(request.path)
            return DAMAGE
        return None

    identity = bucket.take_snapshot(ADDRESS)
    world.fault = damage
    transfers.download_objects(identity, tmp_path)
    assert damaged and read(tmp_path) == content


def test_files_are_uploaded_and_equal_ones_are_left(world: World, content: dict[str, bytes], tmp_path: Path) -> None:
    transfers.download_objects(bucket.take_snapshot(ADDRESS), tmp_path)
    (tmp_path / "new.txt").write_bytes(b"new text")
    (tmp_path / "huge.bin").write_bytes(os.urandom(9 * MB))  # more than what the library sends in one request
    files = {name: tmp_path / name for name in read(tmp_path)}
    world.log.clear()
    generations = transfers.upload_files(files, ADDRESS)
    assert 9 * MB < world.uploaded < 9 * MB + 10_000
    assert sum(entry.method == "PUT" for entry in world.log) == 9, "in chunks"
    assert generations == {name: int(world.generation("bucket", f"data/{name}")) for name in files}
    transfers.download_objects(bucket.take_snapshot(ADDRESS), tmp_path / "again")
    assert read(tmp_path / "again") == {name: path.read_bytes() for name, path in files.items()}


@pytest.mark.parametrize(("place", "size"), [("listed", 4), ("appears", 4), ("appears in a resumable upload", 9 * MB)])
def test_an_upload_replaces_nothing(world: World, tmp_path: Path, place: str, size: int) -> None:
    (tmp_path / "new.txt").write_bytes(b"m" * size)
    there: list[str] = []

    def put(request: Any) -> None:
        if request.uploaded and not there:
            there.append(request.path)
            world.put("data/new.txt", b"of another")

    world.fault = put
    if place == "listed":
        world.put("data/new.txt", b"of another")
    with pytest.raises(
        RunError, match=r"gs://bucket/data/new.txt: exists with other content; delete it and run it again"
    ):
        transfers.upload_files({"new.txt": tmp_path / "new.txt"}, ADDRESS)
    assert there and world.storage.get_file("bucket", "data/new.txt") == b"of another"


def test_an_upload_that_breaks_goes_on(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "RETRY", transfers.DEFAULT_RETRY.with_delay(0.1))
    (tmp_path / "huge.bin").write_bytes(os.urandom(9 * MB))
    broken: list[str] = []

    def break_four_times(request: Any) -> Any:
        if request.method == "PUT" and len(broken) < 4 and request.uploaded:
            broken.append(request.path)
            return [503, CUT, LOST, LOST][len(broken) - 1]
        return None

    world.fault = break_four_times
    transfers.upload_files({"huge.bin": tmp_path / "huge.bin"}, ADDRESS)
    assert len(broken) == 4
    assert world.storage.get_file("bucket", "data/huge.bin") == (tmp_path / "huge.bin").read_bytes()


@pytest.mark.parametrize("size", [1000, 9 * MB], ids=["multipart", "resumable"])
def test_a_damaged_upload_is_refused_and_can_be_repeated(world: World, tmp_path: Path, size: int) -> None:
    (tmp_path / "file.bin").write_bytes(os.urandom(size))
    world.fault = lambda request: DAMAGE if request.uploaded > 900 else None
    with pytest.raises(RunError, match=r"data: not uploaded \(400 "):
        transfers.upload_files({"file.bin": tmp_path / "file.bin"}, ADDRESS)
    world.fault = lambda request: None
    transfers.upload_files({"file.bin": tmp_path / "file.bin"}, ADDRESS)
    assert world.storage.get_file("bucket", "data/file.bin") == (tmp_path / "file.bin").read_bytes()


@pytest.mark.parametrize(
    ("address", "status", "error", "message"),
    [
        (
            "gs://nobucket/x",
            None,
            RunError,
            r"gs://nobucket/x: not fetched \(404 .*check the bucket's name and your permission",
        ),
        ("gs://bucket/none", None, ConfigError, r"gs://bucket/none: no objects there; give gs://bucket/path"),
        ("gs://", None, ConfigError, r"gs://: no bucket; give gs://bucket/path"),
        (
            ADDRESS,
            403,
            RunError,
            r"data: not fetched \(403 .*give this account the role Storage Object User on the bucket",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(
    world: World, content: dict[str, bytes], address: str, status: int | None, error: type[MinitronError], message: str
) -> None:
    world.fault = lambda request: status
    with pytest.raises(error, match=message) as caught:
        bucket.take_snapshot(address)
    one_line(caught)


def test_a_bucket_that_may_not_be_written_is_one_line(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    world.fault = lambda request: 403 if request.method == "POST" else None
    with pytest.raises(RunError, match=r"data: not uploaded \(403 .*role Storage Object User") as caught:
        transfers.upload_files({"file": tmp_path / "file"}, ADDRESS)
    one_line(caught)


def test_without_credentials_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("NO_GCE_CHECK", "true"), ("HOME", str(tmp_path)), ("CLOUDSDK_CONFIG", str(tmp_path))):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError, match=r"not fetched \(.*set GOOGLE_APPLICATION_CREDENTIALS to a service account's key"
    ):
        bucket.take_snapshot(ADDRESS)


@pytest.mark.parametrize("size", [1000, 9 * MB], ids=["multipart", "resumable"])
def test_the_server_keeps_to_generations(world: World, size: int) -> None:
    """The stand-in refuses what googleapis/storage-testbench refuses, and what it does not know."""

    def make() -> Any:
        return bucket.make_handles(ADDRESS, ["object"])["object"]

    def refuse(error: type[Exception], act: Any, **options: Any) -> None:
        with pytest.raises(error):
            act(**options)

    first, second = make(), make()
    refuse(NotFound, first.delete, if_generation_match=5)
    first.upload_from_string(b"x" * size, if_generation_match=0)
    refuse(PreconditionFailed, second.upload_from_string, data=b"y" * size, if_generation_match=0)
    second.upload_from_string(b"y" * size, if_generation_match=first.generation)
    assert second.generation > first.generation
    refuse(PreconditionFailed, make().upload_from_string, data=b"z" * size, if_generation_match=first.generation)
    refuse(PreconditionFailed, make().delete, if_generation_match=first.generation)
    refuse(PreconditionFailed, make().download_as_bytes, if_generation_match=first.generation)
    refuse(NotFound, first.download_as_bytes)  # the testbench keeps replaced generations, as with versioning
    assert make().download_as_bytes(if_generation_match=second.generation) == b"y" * size
    refuse(GoogleAPICallError, make().delete, if_metageneration_match=2)
    make().delete(if_generation_match=second.generation)
    refuse(NotFound, make().download_as_bytes)
