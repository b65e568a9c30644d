"""A stage that asked for GPUs starts on nothing less."""

from pathlib import Path

import pytest
import torch

from minitron.config.parse import parse
from minitron.config.stages import PrepareConfig
from minitron.engines import gpus
from minitron.errors import RunError
from minitron.runtime import stage


def test_fewer_gpus_than_asked_for_are_refused_before_any_work(tmp_path: Path) -> None:
    wanted = torch.cuda.device_count() + 1
    config = PrepareConfig(output=tmp_path / "out", corpus="nowhere", teacher="nowhere", gpus=wanted)
    with pytest.raises(
        RunError, match=rf"^gpus: {wanted} asked for, but this task sees {wanted - 1}; look at the limit"
    ):
        stage.run(config, lambda *_: {})
    assert not list(tmp_path.iterdir())


def test_a_stage_pays_for_its_own_gpus_or_for_those_of_its_nodes(tmp_path: Path) -> None:
    common = {"output": tmp_path, "dataset": tmp_path, "teacher": "x", "engine": "nemo", "workspace": tmp_path}
    assert gpus.count_gpus(parse("finetune", common | {"gpus": 2})) == 2
    assert gpus.count_gpus(parse("finetune", common | {"num_nodes": 3, "gpus_per_node": 4})) == 12
