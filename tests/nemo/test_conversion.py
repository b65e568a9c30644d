"""Hugging Face → NeMo → Hugging Face is the identity, and a directory means the same in both transformers."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from minitron.engines.launcher import launch
from minitron.engines.nemo.engine import WORKER
from minitron.models.checkpoint import finish_model, save_model
from tests.constants import REPOSITORY
from tests.nemo.nemo_support import logits, run_finetune, tokens, weights

LAPTOP = REPOSITORY / ".venv" / "bin" / "python"
"""The environment of engine hf, with transformers 5: `make setup`."""


@pytest.fixture(scope="module")
def models(teacher: Path, wide: Path, pruned: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Teacher and students, width and depth, with tied embeddings too: model directories by name."""
    root = tmp_path_factory.mktemp("models")
    shapes = {
        "tied": {},
        "tied-width": {"hidden_size": 64, "intermediate_size": 128},
        "tied-depth": {"num_hidden_layers": 2},
    }
    for name, sizes in shapes.items():
        torch.manual_seed(1)
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(wide, tie_word_embeddings=True, head_dim=24, **sizes))
        save_model(model, root / name, tokenizer_from=teacher)
    torch.manual_seed(1)
    save_model(
        LlamaForCausalLM(LlamaConfig.from_pretrained(wide, num_hidden_layers=2)), root / "depth", tokenizer_from=teacher
    )
    return {"teacher": wide, "width": pruned["hf"], **{path.name: path for path in root.iterdir()}}


@pytest.fixture(scope="module")
def there_and_back(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model, imported and exported again, in one process."""
    work = tmp_path_factory.mktemp("work")
    job = {"models": {name: str(path) for name, path in models.items()}, "work": str(work)}
    launch(WORKER, {"job": "import", **job}, work, 1)
    exports = [
        {"checkpoint": str(work / name), "like": str(path), "output": str(work / f"{name}-back")}
        for name, path in models.items()
    ]
    launch(WORKER, {"job": "export", "exports": exports, "work": str(work)}, work, 1)
    for name, path in models.items():
        finish_model(work / f"{name}-back", tokenizer_from=path)
    return work


@pytest.mark.parametrize("name", ["teacher", "width", "depth", "tied", "tied-width", "tied-depth"])
def test_the_round_trip_changes_no_weight(models: dict[str, Path], there_and_back: Path, name: str) -> None:
    expected, actual = weights(models[name]), weights(there_and_back / f"{name}-back")
    assert expected.keys() == actual.keys() and ("lm_head.weight" in expected) != name.startswith("tied")
    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    assert torch.equal(logits(there_and_back / f"{name}-back"), logits(models[name]))


def test_a_nemo_checkpoint_is_a_teacher(
    models: dict[str, Path], there_and_back: Path, dataset: Path, tmp_path: Path
) -> None:
    record = run_finetune(
        tmp_path / "out", dataset, there_and_back / "teacher", engine="nemo", enabled=False, workspace=tmp_path / "ws"
    )
    assert record["metrics"] == {"corrected": 0}
    expected, actual = weights(models["teacher"]), weights(tmp_path / "out")
    assert expected.keys() == actual.keys() and all(torch.equal(expected[key], actual[key]) for key in expected)


PROGRAM = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM
tokens = torch.arange(1, 97).reshape(2, 48) * 5 % 500
with torch.no_grad():
    models = {path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in sys.argv[2:]}
    actual = {path: model(tokens).logits for path, model in models.items()}
torch.save({"version": transformers.__version__, "logits": actual}, sys.argv[1])
"""

WRITER = """
import sys
from pathlib import Path
from minitron.models.checkpoint import load_model, save_model
save_model(load_model(Path(sys.argv[1])), Path(sys.argv[2]), tokenizer_from=Path(sys.argv[1]))
"""


def test_a_directory_written_under_either_transformers_means_the_same_in_both(
    models: dict[str, Path], there_and_back: Path, pruned: dict[str, Path], tmp_path: Path
) -> None:
    """The base of RoPE (500000 here), which each writes under a name of its own, included."""
    subprocess.run([LAPTOP, "-c", WRITER, models["teacher"], tmp_path / "five"], check=True, cwd=REPOSITORY)
    directories = [tmp_path / "five", models["teacher"], there_and_back / "width-back", pruned["nemo"]]
    command = [LAPTOP, "-c", PROGRAM, tmp_path / "logits.pt", *directories]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    laptop = torch.load(tmp_path / "logits.pt")
    assert laptop["version"].startswith("5.")
    for directory in directories:
        assert json.loads((directory / "config.json").read_text())["rope_theta"] == 500000.0
        torch.testing.assert_close(laptop["logits"][str(directory)], logits(directory), rtol=1e-4, atol=1e-5)
    default = LlamaForCausalLM(LlamaConfig.from_pretrained(models["teacher"], rope_theta=10000.0))
    default.load_state_dict(AutoModelForCausalLM.from_pretrained(models["teacher"]).state_dict())
    with torch.no_grad():
        other = default(tokens()).logits
    assert not torch.allclose(other, logits(models["teacher"]), atol=1e-3), "the base of RoPE has no effect here"
