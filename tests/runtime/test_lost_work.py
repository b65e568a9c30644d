"""Nothing that is complete is lost: a failed write, a kill or a rival at any moment of a small stage."""

import errno
import itertools
import multiprocessing
import os
import queue
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from minitron.config.parse import parse
from minitron.config.stages import PrepareConfig
from minitron.errors import RunError
from minitron.runtime import stage
from minitron.storage.files import write_atomically
from minitron.storage.hashing import content_hash, verified_hash
from minitron.storage.layout import read_record
from minitron.storage.references import follow_reference
from minitron.storage.staging import checkpoints_path, download_then_publish, read_intact
from tests.faults import injector

FORK = multiprocessing.get_context("fork")
SLOW = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
"""Audit events that take time on a network's file system."""

ERRORS = (errno.ENOSPC, errno.EIO, errno.ESTALE)


def work(config: PrepareConfig, directory: Path, tracker: Any) -> dict[str, Any]:
    """Write a checkpoint, if there is none, and two files; count the calls beside the case."""
    with (Path(config.corpus).parent / "calls").open("a") as stream:
        stream.write("x")
    checkpoint = checkpoints_path(directory) / "step-1"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "state").write_text("half done")
    (directory / "sub").mkdir()
    for name in ("words.txt", "sub/more.txt"):
        (directory / name).write_text(f"{name} {config.seed}")
    return {"metrics": {"words": 3}}


def make_config(root: Path, seed: int, place: str = "output") -> PrepareConfig:
    """Return a configuration whose result lies in its output, in a workspace, or in a bucket; all is below `case`."""
    for name in ("corpus.txt", "teacher/config.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    places = {"output": None, "workspace": root / "case" / "workspace", "bucket": f"gs://bucket/{root.name}"}
    values = {"output": root / "case" / "out", "corpus": str(root / "corpus.txt")}
    return parse("prepare", {**values, "teacher": str(root / "teacher"), "seed": seed, "workspace": places[place]})  # type: ignore[return-value]


def hash_output(config: PrepareConfig) -> str:
    return content_hash(follow_reference(config.output))


def count_calls(root: Path) -> int:
    return len((root / "calls").read_text())


def find_complete(case: Path) -> list[Path]:
    """Return the directories that hold a whole result; fail if one has a record and not its content."""
    records = [path.parent for path in case.rglob("stage.json")]
    records = [path for path in records if not (path / "reference.json").exists()]
    assert [path for path in records if not read_intact(path)] == []
    return records


def check_end(root: Path, config: PrepareConfig, content: str) -> None:
    """Run the stage again, undisturbed: it has the content that it should have, and leaves nothing beside it."""
    is_finished = any(read_record(path)["config"]["seed"] == 2 for path in find_complete(root / "case"))  # type: ignore[index]
    calls = count_calls(root)
    stage.run(config, work)
    assert hash_output(config) == content
    assert count_calls(root) == calls + (not is_finished), "a finished result is made again, or an unfinished one taken"


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory: the stages of these tests wait a hundred times for the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(params=["output", "workspace", "bucket"])
def place(request: pytest.FixtureRequest) -> str:
    if request.param == "bucket":
        request.getfixturevalue("world")
    return request.param


@pytest.fixture
def prepare(place: str, memory: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[Path, PrepareConfig]]:
    """Return a function that makes a directory with the result of seed 1, and the configuration of seed 2."""

    def prepare_case(name: str) -> tuple[Path, PrepareConfig]:
        root = memory / name
        monkeypatch.setenv("MINITRON_CACHE", str(root / "case" / "cache"))
        stage.run(make_config(root, 1, place), work)
        return root, make_config(root, 2, place)

    return prepare_case


def list_events(prepare: Callable[[str], tuple[Path, PrepareConfig]], place: str, is_kill: bool) -> tuple[range, str]:
    """Run a case undisturbed; return the numbers of its events, and the hash of its content.

    Up to the record a result grows alike wherever it lies: only one that lies in its output is disturbed there. A
    bucket's requests take time: errors get every second event, kills the others.
    """
    root, config = prepare("whole")
    with injector.armed(root / "case") as sites:
        stage.run(config, work)
    assert len(sites) > 25
    record = next(number for number, site in enumerate(sites, 1) if site.path.endswith("/stage.json"))
    first, step = {"output": (1, 1), "workspace": (record, 1), "bucket": (record + is_kill, 2)}[place]
    return range(first, len(sites) + 1, step), hash_output(config)


def test_a_write_that_fails_loses_nothing_and_the_next_start_goes_on(
    prepare: Callable[[str], tuple[Path, PrepareConfig]], place: str
) -> None:
    """Every write site in turn, with an earlier result at the output; with each error if the result lies there."""
    events, content = list_events(prepare, place, is_kill=False)
    for event, error in itertools.product(events, ERRORS):
        if place != "output" and error != ERRORS[event // 2 % 3]:
            continue
        root, config = prepare(f"{event}-{error}")
        earlier = hash_output(config)
        with injector.armed(root / "case", event, error):
            try:
                stage.run(config, work)
            except RunError as failure:
                assert "\n" not in str(failure) and "run it again" in str(failure)
                assert hash_output(config) == earlier, "the earlier output is gone"
                kept = [root / "case" / "out.partial" / name for name in ("checkpoints", "result/stage.json")]
                goes_on = str(failure).endswith(f"; it will resume from {root / 'case' / 'out.partial'}")
                assert any(path.exists() for path in kept) == goes_on
        check_end(root, config, content)
        assert [*root.rglob("*.partial"), *root.rglob("*.tmp")] == []
        shutil.rmtree(root)


def test_a_kill_at_any_write_loses_nothing_and_the_next_start_goes_on(
    prepare: Callable[[str], tuple[Path, PrepareConfig]], place: str
) -> None:
    events, content = list_events(prepare, place, is_kill=True)
    left: list[Path] = []
    for event in events:
        root, config = prepare(f"{event}")
        child = FORK.Process(target=run_armed, args=(root / "case", event, config))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert find_complete(root / "case")
        check_end(root, config, content)
        left += [*root.rglob("*.partial"), *root.rglob("*.tmp")]
        shutil.rmtree(root)
    assert len(left) <= 1, "beside the checkpoints of a kill between the rename and the mark that the work is published"


def run_armed(case: Path, event: int, config: PrepareConfig) -> None:
    os.setsid()
    injector.arm(case, event)
    stage.run(config, work)


def test_processes_at_one_key_make_one_result_and_hear_nothing_untrue(place: str, memory: Path) -> None:
    """A key per round at one output, by two or three processes, while this one reads.

    A hundred rounds at a directory; of the bucket, tests/storage/test_bucket_results.py has a hundred.
    """
    root, rounds = memory / "race", {"output": 100, "workspace": 30, "bucket": 20}[place]
    config = make_config(root, 1, place)
    stage.run(config, work)
    barrier, answers = FORK.Barrier(3), FORK.Queue()
    rivals = [FORK.Process(target=race, args=(number, rounds, root, place, barrier, answers)) for number in range(3)]
    for rival in rivals:
        rival.start()
    heard: dict[int, list[Any]] = {number: [] for number in range(rounds)}
    while missing := 4 * rounds - sum(map(len, heard.values())):
        if place != "bucket":
            verified_hash(config.output)  # fails if it finds a mixture
        with suppress(queue.Empty):
            while missing:
                number, answer = answers.get(timeout=0.001)
                heard[number].append(answer)
                missing -= 1
    for rival in rivals:
        rival.join()
    for number, (*told, content) in ((number, sorted(answers, key=is_hash)) for number, answers in heard.items()):
        records = [answer for answer in told if isinstance(answer, dict)]
        assert records and all(record == records[0] for record in records), f"round {number} has several results"
        assert records[0]["output_sha256"] == content and records[0]["config"]["seed"] == number + 2
        others = [answer for answer in told if not isinstance(answer, dict)]
        assert [text for text in others if text is not None and "another process is working there" not in text] == []
    assert [*root.rglob("*.partial"), *root.rglob("*.tmp")] == []


def is_hash(answer: Any) -> bool:
    return isinstance(answer, str) and len(answer) == 64


def race(number: int, rounds: int, root: Path, place: str, barrier: Any, answers: Any) -> None:
    """Run the stage in every round, with the others or a moment later; answer what came of it."""
    moments = random.Random(number)
    sys.addaudithook(lambda event, _: time.sleep(moments.uniform(0, 0.002)) if event in SLOW else None)
    for turn in range(rounds):
        config, answer = make_config(root, turn + 2, place), None
        barrier.wait()
        time.sleep(moments.uniform(0, 0.03) if number else 0)
        try:
            if number < 2 or turn % 3 == 0:
                answer = stage.run(config, work)
        except BaseException as error:
            answer = str(error) if isinstance(error, RunError) else repr(error)
        answers.put((turn, answer))
        barrier.wait()
        if number == 0:
            answers.put((turn, hash_output(config)))
        barrier.wait()


def test_a_file_system_that_renames_no_directories_is_named_before_the_work(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Cloud Storage FUSE says for a flat bucket: internal/fs/fs.go, renameNonHierarchicalDir."""
    rename = Path.rename

    def rename_files(path: Path, target: Path) -> Path:
        if path.is_dir() and any(path.iterdir()):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path), None, str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_files)
    with pytest.raises(
        RunError, match=r"cannot be renamed to .* a flat bucket under Cloud Storage FUSE .* gs://BUCKET"
    ):
        stage.run(make_config(memory, 1), work)
    assert not (memory / "calls").exists() and not (memory / "case" / "out.partial").exists()


def test_a_download_by_another_process_is_awaited_and_done_once(memory: Path) -> None:
    processes = [FORK.Process(target=download, args=(memory,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (memory / "fetched").read_text() == "x" and (memory / "model" / "file").read_text() == "whole"
    assert (memory / "said").read_text().count("model.partial: another process is working there; waiting for it") == 2
    assert not (memory / "model.partial").exists()


def download(root: Path) -> None:
    def fetch(directory: Path) -> None:
        time.sleep(0.5)
        (directory / "file").write_text("whole")
        with (root / "fetched").open("a") as stream:
            stream.write("x")

    os.dup2(os.open(root / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    sys.stdout = os.fdopen(1, "w")
    download_then_publish(root / "model", "identity", fetch, (root / "model").exists)
    sys.stdout.flush()


def test_a_record_that_cannot_be_renamed_leaves_nothing_behind(memory: Path) -> None:
    for event, error in ((1, errno.ENOSPC), (2, errno.EIO)):
        with injector.armed(memory, event, error), pytest.raises(OSError, match=os.strerror(error)):
            write_atomically(memory / "record.json", {})
        assert [*memory.iterdir()] == []
