"""A pipeline that is killed wherever it writes, or at any moment, and started again, ends as if nothing had been."""

import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.contents import check_results, read_contents
from tests.faults.pipeline import STAGES, Pipeline
from tests.servers.mlflow_server import mlflow_serving

RANDOM_KILLS = 4
"""Per stage and seed."""


class Undisturbed(NamedTuple):
    """A run without kills, the sites at which each stage writes, and the seconds that it took."""

    pipeline: Pipeline
    sites: dict[str, list[str]]
    seconds: dict[str, float]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as held:  # until the server has it: the other test process starts one, too
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        with mlflow_serving(tmp_path_factory.mktemp("mlflow"), port):
            yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def undisturbed(uri: str, inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    pipeline = Pipeline(tmp_path_factory.mktemp("pipelines") / "undisturbed", inputs, uri)
    sites, seconds = {}, {}
    for stage in STAGES:
        began = time.monotonic()
        assert end_attempt(pipeline, pipeline.start((stage,))) == 0
        seconds[stage] = time.monotonic() - began
        sites[stage] = list(dict.fromkeys(pipeline.read_labels()))
    return Undisturbed(pipeline, sites, seconds)


def end_attempt(pipeline: Pipeline, attempt: BaseProcess) -> int | None:
    """Wait for the end of an attempt and return its status: 0, or that of a kill."""
    attempt.join()
    check_results(pipeline.root)
    assert attempt.exitcode in (0, -signal.SIGKILL), pipeline.root.with_suffix(".log").read_text()[-3000:]
    return attempt.exitcode


def assert_same(pipeline: Pipeline, undisturbed: Pipeline) -> None:
    found, expected = read_contents(pipeline), read_contents(undisturbed)
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    assert not different, "\n".join(
        f"{name}: {found.get(name)}\n   instead of {expected.get(name)}" for name in different
    )


@pytest.mark.parametrize("killed", [STAGES[:3], STAGES[3:]], ids="-".join)
def test_killed_at_every_write(undisturbed: Undisturbed, killed: tuple[str, ...]) -> None:
    """Writes are changes of a file, which a kill may cut off, and requests that change something in MLflow."""
    pipeline, kills = undisturbed.pipeline.beside(f"killed-in-{killed[0]}"), 0
    for stage in STAGES:
        left, began = list(undisturbed.sites[stage]) if stage in killed else [], time.monotonic()
        while end_attempt(pipeline, pipeline.start((stage,), left)):
            left.remove(pipeline.read_labels()[-1])
            kills += 1
        pipeline.read_labels()
        print(f"{stage}: {time.monotonic() - began:.0f} s, {kills} kills so far; sites not come to again: {left}")
    assert kills > 100
    assert_same(pipeline, undisturbed.pipeline)


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments(undisturbed: Undisturbed, seed: int) -> None:
    """Also while safetensors or torch write, and while MLflow answers."""
    pipeline, generator = undisturbed.pipeline.beside(f"killed-at-random-{seed}"), random.Random(seed)
    for stage in STAGES:
        for _ in range(RANDOM_KILLS):
            attempt = pipeline.start((stage,))
            attempt.join(generator.uniform(0, undisturbed.seconds[stage]))
            assert attempt.pid
            with suppress(ProcessLookupError):  # it has ended
                os.killpg(attempt.pid, signal.SIGKILL)
            end_attempt(pipeline, attempt)
        assert end_attempt(pipeline, pipeline.start((stage,))) == 0
    assert_same(pipeline, undisturbed.pipeline)
