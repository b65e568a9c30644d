"""A stage that asked for GPUs starts on nothing less."""

from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from minitron.config.parse import parse
from minitron.config.stages import STAGES, PrepareConfig, TrainingConfig
from minitron.engines import gpus
from minitron.engines.hf import device, training
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


def test_engine_hf_trains_the_same_on_a_machine_with_two_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The two GPUs are made up: torch says that they are there, and Trainer's arguments ask torch.

    This stands for a machine that has them: `n_gpu` decides whether Trainer wraps the model in DataParallel, and how
    many sequences it reads per step.
    """
    config = parse("finetune", {"output": tmp_path, "dataset": tmp_path, "teacher": "x", "micro_batch_size": 4})
    assert isinstance(config, TrainingConfig)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    plain = TrainingArguments(str(tmp_path), per_device_train_batch_size=4)
    assert (plain.n_gpu, plain.train_batch_size) == (2, 8), "Trainer no longer does what this test stands for"
    arguments = training._make_arguments(config, tmp_path, validate_first=True)
    assert (arguments.n_gpu, arguments.train_batch_size, arguments.device.type) == (1, 4, "cuda")
    assert arguments.gradient_accumulation_steps == 32
    device.say_that_one_gpu_works()
    assert capsys.readouterr().out == "engine hf: uses one of 2 visible GPUs; engine nemo trains on all of them\n"


@pytest.mark.parametrize("stage", ["finetune", "distill", "prune", "evaluate"])
def test_gpus_that_would_stand_idle_are_refused(tmp_path: Path, stage: str) -> None:
    names = ("teacher", "student", "pruned", "teacher_before", "dataset", "output")
    values = {name: tmp_path for name in names if name in STAGES[stage].model_fields}
    what = "engine hf" if stage in ("finetune", "distill") else stage
    match = f"{stage}.gpus: 8, but {what} runs in one process, on one GPU; .*set gpus to 1"
    with pytest.raises(ConfigError, match=match):
        parse(
            stage,
            {**values, "teacher": str(tmp_path), "gpus": 8} | ({"teacher_before": "x"} if stage == "evaluate" else {}),
        )
