"""Engine hf prunes in several processes: the scores, the choices and the weights of one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from minitron.config.stages import PruneConfig
from minitron.engines import gpus
from minitron.engines.hf import pruning
from minitron.engines.launcher import launch
from minitron.errors import RunError
from minitron.models.checkpoint import load_model, save_model
from minitron.models.pruning.surgery import Cut, Shape
from minitron.stages import prune
from minitron.storage.layout import IMPORTANCE
from tests.constants import REPOSITORY

TOLERANCE = 1e-5

WIDTH = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
FAILING, FEW = "overflow", "compensated width, two sequences"
CASES: dict[str, dict[str, Any]] = {
    "width": WIDTH | {"calibration_sequences": 5},
    "fewer sequences than processes": WIDTH | {"calibration_sequences": 1},
    "layers by loss": {"layers_by": "loss", "num_hidden_layers": 5},
    "compensated width": {"method": "compensated"} | WIDTH,
    FEW: {"method": "compensated", "calibration_sequences": 2, "sequence_length": 256} | WIDTH,
    "compensated depth": {"method": "compensated", "layers_by": "loss", "num_hidden_layers": 5},
    FAILING: {"method": "compensated", "num_hidden_layers": 7},
}
"""The shares of the calibration are uneven in all of them, and one may be empty."""


class Cases:
    """The cuts of one and of two processes: directories with a student, its workspace and its `Cut`."""

    def __init__(self, root: Path, dataset: Path, teacher: Path) -> None:
        self.root, self._dataset, self.error = root, dataset, ""
        self.teacher = root / "teacher"
        torch.manual_seed(0)
        config = LlamaConfig.from_pretrained(teacher, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.normal_(1.0 if "norm" in name else 0.0, 0.15)
        save_model(model, self.teacher, tokenizer_from=teacher)

    def _damage(self) -> Path:
        """Write the teacher again, with activations that overflow in the third layer."""
        model = load_model(self.teacher)
        model.model.layers[2].mlp.up_proj.weight.data[7] = 3e38
        save_model(model, self.root / "damaged", tokenizer_from=self.teacher)
        return self.root / "damaged"

    def configure(self, name: str, processes: int) -> PruneConfig:
        """Return the settings of a case, in a directory and a workspace of its own."""
        directory = self.root / f"{name} on {processes}"
        values: dict[str, Any] = {"sequence_length": 32, "micro_batch_size": 2, "calibration_sequences": 21}
        teacher = self._damage() if name == FAILING else self.teacher
        places = {"teacher": teacher, "dataset": self._dataset, "output": directory / "student"}
        return PruneConfig(**values | places | CASES[name], workspace=directory)

    def make(self, name: str, processes: int = 2) -> dict[str, Any]:
        """Return the job of several processes."""
        config = self.configure(name, processes)
        config.output.mkdir(parents=True)
        given = {"layers": [0, 1, 2, 4, 5, 6, 7]} if name == FAILING else {}  # no scores, which would fail first
        return pruning.make_job(config, self._shape(config), given, config.output, config.output.parent)

    def cut_here(self, name: str) -> Cut:
        """Cut in this process."""
        config = self.configure(name, 1)
        config.output.mkdir(parents=True)
        return pruning.cut_student(config, self._shape(config), {}, config.output)

    def _shape(self, config: PruneConfig) -> Shape:
        sizes = config.compute_student_sizes(LlamaConfig.from_pretrained(self.teacher).to_dict())
        return Shape(**sizes)


@pytest.fixture(scope="module")
def cases(teacher: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """The two processes are started once for all cases; the last one ends them."""
    cases = Cases(tmp_path_factory.mktemp("pruning"), dataset, teacher)
    job = {"job": "prune", "jobs": [cases.make(name) for name in CASES]}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError) as failed:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        launch("tests.servers.hf_worker", job, cases.root, 2)
    cases.error = str(failed.value)
    return cases


@pytest.mark.parametrize("name", [name for name in CASES if name != FAILING])
def test_two_processes_cut_what_one_does(cases: Cases, name: str) -> None:
    one, two = cases.cut_here(name), pruning.read_cut(cases.root / f"{name} on 2")
    assert two.plan == one.plan and two.sequences == one.sequences
    assert [drop.layer for drop in two.drops] == [drop.layer for drop in one.drops]
    if "compensated" in name:
        assert all(any(fit[part]["ridge"] for fit in one.fits) for part in ("o_proj", "down_proj")), (
            "nothing was fitted"
        )
    if one.importance:
        assert two.importance
        for axis, scores in vars(one.importance).items():
            torch.testing.assert_close(getattr(two.importance, axis), scores, rtol=TOLERANCE, atol=0, msg=axis)
    expected, found = (load_file(cases.configure(name, n).output / "model.safetensors") for n in (1, 2))
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=0, atol=TOLERANCE)
    scores = list((cases.root / f"{name} on 1").glob("scores/*"))  # one of each kind is kept, by the same key
    assert len(scores) == bool(one.importance) + bool(one.drops)
    for path in scores:
        kept = cases.root / f"{name} on 2" / "scores" / path.name
        if path.suffix == ".json":
            orders = [json.loads(either.read_text()) for either in (path, kept)]
            assert orders[0]["losses"].keys() == orders[1]["losses"].keys()
            assert orders[1]["losses"] == pytest.approx(orders[0]["losses"], rel=TOLERANCE)
        assert kept.is_file()


def test_a_process_without_a_sequence_joins_a_compensated_cut(cases: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes and two sequences: on eight GPUs, a calibration of seven long sequences would be like this."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    launch("tests.servers.hf_worker", {"job": "prune", "jobs": [cases.make(FEW, 3)]}, cases.root, 3)
    assert pruning.read_cut(cases.root / f"{FEW} on 3").plan == pruning.read_cut(cases.root / f"{FEW} on 2").plan


@pytest.mark.parametrize("layers_by", ["loss", "influence"])
def test_a_result_does_not_depend_on_the_gpus(
    layers_by: str, cases: Cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are no two GPUs, so that the stage's processes compute on the CPU."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr(gpus, "check_gpus", lambda wanted: None)
    settings = {"method": "compensated", "num_hidden_layers": 7, "layers_by": layers_by, "num_key_value_heads": 2}
    config = cases.configure("width", 1).model_dump() | dict.fromkeys(WIDTH) | settings | {"workspace": None}
    outputs = {0: tmp_path / "one", 2: tmp_path / "two"}
    records = [prune.run(PruneConfig.model_validate(config | {"output": outputs[n], "gpus": n})) for n in outputs]
    assert records[0]["key"] == records[1]["key"] and records[1]["gpus"] == 2
    one, two = (json.loads((output / "pruning.json").read_text()) for output in outputs.values())
    assert two.pop("drops") == [pytest.approx(drop, rel=TOLERANCE) for drop in one.pop("drops")]
    for expected, found in zip(one.pop("fits"), two.pop("fits"), strict=True):
        assert found.pop("layer") == expected.pop("layer")
        assert found == {part: pytest.approx(numbers, abs=1e-4) for part, numbers in expected.items()}  # 4 digits
    assert two == one
    if layers_by == "influence":
        scores = [load_file(output / IMPORTANCE) for output in outputs.values()]
        assert all(torch.allclose(scores[1][axis], values, rtol=TOLERANCE) for axis, values in scores[0].items())


def test_a_process_that_fails_ends_the_others_with_its_message(cases: Cases) -> None:
    """Process 0 finds sums that are not finite, while the other one waits for its fit."""
    assert cases.error.startswith("compensated cut of layer 3: activations are not finite: the model overflows")
    assert not list((cases.root / f"{FAILING} on 2" / "student").glob("*.safetensors"))
