"""A stage that asked for GPUs starts on nothing less."""

from pathlib import Path
from typing import Any

import pytest
import torch

from minitron.config.parse import parse
from minitron.config.stages import PrepareConfig, TrainingConfig
from minitron.engines import gpus
from minitron.engines.hf import device
from minitron.errors import ConfigError, RunError
from minitron.runtime import stage


def test_fewer_gpus_than_asked_for_are_refused_before_any_work(tmp_path: Path) -> None:
    wanted = torch.cuda.device_count() + 1
    config = PrepareConfig(output=tmp_path / "out", corpus="nowhere", teacher="nowhere", gpus=wanted)
    with pytest.raises(RunError, match=rf"^gpus: {wanted}, but this task sees {wanted - 1}; check its pod's limit"):
        stage.run(config, lambda *_: {})
    assert not list(tmp_path.iterdir())


def test_a_stage_pays_for_its_own_gpus_or_for_those_of_its_nodes(tmp_path: Path) -> None:
    common = {"output": tmp_path, "dataset": tmp_path, "teacher": "x", "engine": "nemo", "workspace": tmp_path}
    assert gpus.count_gpus(parse("finetune", common | {"gpus": 2, "engine": "nemo"})) == 2
    assert gpus.count_gpus(parse("finetune", common | {"num_nodes": 3, "gpus_per_node": 4})) == 12


@pytest.mark.parametrize(("values", "workers"), [({}, 2), ({"gpus": 1}, 1), ({"engine": "nemo", "gpus": 1}, 2)])
def test_a_worker_per_gpu_trains_and_engine_hf_takes_no_more_than_the_settings_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], workers: int
) -> None:
    """The two GPUs are made up: torch says that they are there."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = parse("finetune", {"output": tmp_path, "dataset": tmp_path, "teacher": "x"} | values)
    assert isinstance(config, TrainingConfig) and gpus.count_workers(config) == workers


def test_pruning_says_that_it_leaves_gpus_idle(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    device.say_what_stands_idle(2)
    device.say_what_stands_idle(1)
    assert capsys.readouterr().out == "prune: uses 1 of 2 visible GPUs\n"


def test_gpus_that_would_stand_idle_are_refused(tmp_path: Path) -> None:
    values = {"teacher": str(tmp_path), "dataset": tmp_path, "output": tmp_path, "gpus": 8}
    with pytest.raises(ConfigError, match=r"prune.gpus: 8, but engine nemo prunes on one GPU; set gpus to 1, or"):
        parse("prune", values | {"engine": "nemo"})
    assert parse("prune", values | {"engine": "nemo", "method": "compensated"}).gpus == 8, "engine hf computes it"
