"""A stage that asked for GPUs starts on nothing less."""

from pathlib import Path

import pytest
import torch

from minitron import stage
from minitron.config import PrepareConfig
from minitron.errors import RunError


def test_fewer_gpus_than_asked_for_are_refused_before_any_work(tmp_path: Path) -> None:
    wanted = torch.cuda.device_count() + 1
    config = PrepareConfig(output=tmp_path / "out", corpus="nowhere", teacher="nowhere", gpus=wanted)
    with pytest.raises(
        RunError, match=rf"^gpus: {wanted} asked for, but this task sees {wanted - 1}; look at the limit"
    ):
        stage.run(config, lambda *_: {})
    assert not list(tmp_path.iterdir())
