"""Engine nemo: the checks before NeMo starts, and the results that it reads from its workers' files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron.config.parse import parse
from minitron.config.resources.gpus import find_peak_speed
from minitron.config.stages import FinetuneConfig, PruneConfig
from minitron.data.packed import PackedDataset, open_training_data
from minitron.engines.checkpoints import publish_checkpoint
from minitron.engines.gpus import count_workers
from minitron.engines.nemo import checks
from minitron.engines.nemo import engine as nemo
from minitron.engines.progress import FINISHED, HISTORY, Cost, Progress, Start, find_start, measure_cost
from minitron.errors import ConfigError
from minitron.models.checks import check_architecture, read_config
from minitron.models.pruning.importance import _Sums, measure_importance
from minitron.models.pruning.layers import LayerReader
from minitron.stages import finetune, prune
from minitron.tracking.stage_run import Tracker


def config(dataset: Path, **values: Any) -> FinetuneConfig:
    common = {"teacher": "t", "dataset": dataset, "output": Path("o"), "engine": "nemo", "sequence_length": 32}
    return FinetuneConfig(**common | {"global_batch_size": 8, "micro_batch_size": 2} | values)


@pytest.mark.parametrize(
    ("sizes", "gpus", "message"),
    [
        ({"tensor_parallel_size": 3}, 3, "tensor_parallel_size: 3 .* num_attention_heads .* 4; choose one of 1, 2, 4"),
        ({"tensor_parallel_size": 4}, 4, "tensor_parallel_size: 4 .* num_key_value_heads of .*, 2; choose one of 1, 2"),
        (
            {"pipeline_parallel_size": 3},
            3,
            "pipeline_parallel_size: 3 .* num_hidden_layers .* choose one of 1, 2, 4",
        ),
        ({"context_parallel_size": 3}, 3, "context_parallel_size: 2 x 3 = 6 does not divide the sequence_length, 32"),
        ({"tensor_parallel_size": 2}, 3, "parallel size 2 does not divide the number of GPUs, 3; choose one of 1, 3"),
        (
            {},
            3,
            "global_batch_size: number of model copies 3 does not divide .* micro-batches .*, 4; choose one of 1, 2, 4",
        ),
    ],
)
def test_parallel_sizes_that_do_not_divide_are_refused(
    teacher: Path, dataset: Path, sizes: dict[str, int], gpus: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        checks.check_parallelism(config(dataset, **sizes), check_architecture(teacher), teacher, gpus)


def test_parallel_sizes_that_divide_are_not(teacher: Path, dataset: Path) -> None:
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "context_parallel_size": 2}
    settings = config(dataset, **sizes, sequence_parallel=True)
    checks.check_parallelism(settings, check_architecture(teacher), teacher, 8)
    assert count_workers(settings) == (torch.cuda.device_count() or 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": "hf", "tensor_parallel_size": 2}, "multiply to 2, but engine hf divides only batches"),
        ({"engine": "nemo", "sequence_parallel": True}, "sequence_parallel: needs a tensor_parallel_size above 1"),
        ({"engine": "nemo", "kl_weight": [1, 0.5]}, r"kl_weight: \[1.0, 0.5\], but engine nemo has no schedules"),
        ({"engine": "nemo", "intermediate_weight": 2}, "intermediate_weight: engine nemo scales this loss to the KL"),
        ({"engine": "nemo", "cut_learning_rate_factor": 2}, "cut_learning_rate_factor: 2.0, but engine nemo has one"),
        ({"kl_weight": [1, 0]}, "kl_weight: at the last step it is 0, and so is cross_entropy_weight"),
        ({"engine": "nemo", "divergence_beta": 0.5}, "divergence_beta: 0.5, but engine nemo has only the forward KL"),
    ],
)  # fmt: skip
def test_settings_of_the_other_engine_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse("distill", {"teacher": "t", "student": "s", "dataset": "d", "output": "o"} | values)


def test_without_nemo_it_says_what_to_do(
    teacher: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise checks.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(checks.importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match=r"engine nemo: needs nemo_toolkit 2, found none; run it in the package's"):
        checks.check_installed()
    monkeypatch.setattr(checks.importlib.metadata, "version", lambda name: "3.0.0")
    with pytest.raises(ConfigError, match=r"found 3.0.0; .* or use engine hf"):
        finetune.run(config(dataset, teacher=str(teacher), output=tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_an_architecture_that_is_not_converted_to_the_last_bit_is_refused(teacher: Path, tmp_path: Path) -> None:
    other = tmp_path / "qwen"
    shutil.copytree(teacher, other)
    text = (other / "config.json").read_text().replace("LlamaForCausalLM", "Qwen2ForCausalLM")
    (other / "config.json").write_text(text)
    with pytest.raises(
        ConfigError, match=r"engine: engine nemo supports LlamaForCausalLM, but .* is a Qwen2ForCausalLM; use engine hf"
    ):
        checks.check_convertible(check_architecture(other), other)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"intermediate_size": 100}, r"prune.intermediate_size: 100 is not a multiple of 64, .* choose 64 or another"),
        (
            {"drop_layers": [1], "intermediate_size": 64},
            r"engine nemo cannot combine it with another cut; choose one, or use",
        ),
    ],
)
def test_a_cut_that_model_optimizer_cannot_make_is_refused(
    teacher: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(nemo, "check_installed", lambda: None)
    common = {"teacher": teacher, "dataset": dataset, "output": tmp_path / "out", "sequence_length": 32}
    with pytest.raises(ConfigError, match=message):
        prune.run(PruneConfig(**common, engine="nemo", **sizes))
    assert not list(tmp_path.iterdir())


def test_model_optimizers_sums_become_the_scores_of_engine_hf(teacher: Path, dataset: Path, tmp_path: Path) -> None:
    layers, cpu = LayerReader(teacher), torch.device("cpu")
    expected = measure_importance(layers, PackedDataset(dataset / "train", 32, 1), 4, 2, torch.float32, cpu)
    sums = _Sums(layers.config, cpu)
    sums._influence, sums._norms = torch.rand(4) + 0.1, torch.rand(4, 2, 64)
    sums._intermediate, sums._attention = torch.rand(4, 128), torch.rand(4, 64)
    activations: dict[str, Any] = {"": dict(enumerate(sums._norms.flatten(0, 1)))}
    for layer in range(4):
        activations[f"decoder.layers.{layer}.mlp"] = sums._intermediate[layer]
        activations[f"decoder.layers.{layer}.self_attention"] = sums._attention[layer]
    influence = {layer + 1: float(score) for layer, score in enumerate(sums._influence)}
    torch.save({"activations": [activations], "layers": influence}, tmp_path / "scores.pt")
    importance = nemo._read_importance(tmp_path / "scores.pt", read_config(teacher), 4)
    for axis, scores in vars(sums.to_importance(layers.config, 4)).items():
        torch.testing.assert_close(getattr(importance, axis), scores)
        assert scores.shape == getattr(expected, axis).shape


def test_the_micro_batch_size_does_not_decide_what_is_calibrated_on(dataset: Path) -> None:
    """NeMo takes whole micro-batches: the size is lowered until it divides the number of sequences."""
    there = len(PackedDataset(dataset / "train", 32, 1234))

    def split(sequences: int, size: int) -> tuple[int, int]:
        values = {"calibration_sequences": sequences, "micro_batch_size": size, "sequence_length": 32}
        return nemo.split_calibration(PruneConfig(teacher=Path("t"), dataset=dataset, output=Path("o"), **values))

    assert [split(10, size) for size in (1, 2, 4, 16)] == [(10, 1), (10, 2), (10, 2), (10, 10)]
    assert split(there + 5, 1) == (there, 1)


def test_a_resumed_training_has_the_history_of_its_last_whole_checkpoint(tmp_path: Path) -> None:
    rows = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 6)]
    history, checkpoint = tmp_path / HISTORY, tmp_path / "checkpoint-3"
    for name in ("best-2", "checkpoint-3", "best-4", "checkpoint-10", FINISHED):
        (tmp_path / name).mkdir()
    (checkpoint / HISTORY).write_text("".join(rows[:3]))
    history.write_text("".join(rows) + '{"step": 6, "lo')
    publish_checkpoint(tmp_path / "best-2", {"loss": 3.5})
    publish_checkpoint(checkpoint, {"best": 2, "seconds": 7.5})
    publish_checkpoint(tmp_path / "best-4", {"loss": 3.0})
    assert find_start(tmp_path) == Start(3, 2, 3.5, 7.5)
    assert history.read_text() == "".join(rows[:3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-2", "checkpoint-3", HISTORY]
    (checkpoint / HISTORY).write_text("".join(rows[:2]))
    assert find_start(tmp_path) == Start()
    assert [path.name for path in tmp_path.iterdir()] == [HISTORY] and not history.read_text()


def test_a_checkpoint_of_an_earlier_version_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Engine hf of 0.6 wrote its history elsewhere."""
    for name, note in (("best-2", {"loss": 3.5}), ("checkpoint-3", {"best": 2, "seconds": 7.5})):
        (tmp_path / name).mkdir()
        publish_checkpoint(tmp_path / name, note)
    assert find_start(tmp_path) == Start()
    assert [path.name for path in tmp_path.iterdir()] == [HISTORY]
    assert "checkpoint-3: of an earlier version; the training begins anew" in capsys.readouterr().out


def test_progress_follows_the_history_and_passes_every_row_on_once(dataset: Path, tmp_path: Path) -> None:
    logged: list[tuple[int, dict[str, float]]] = []

    class Kept(Tracker):
        def log(self, metrics: dict[str, float], step: int = 0) -> None:
            logged.append((step, metrics))

    with Progress(config(dataset, max_steps=3), tmp_path, Kept({}), Cost(2e9, 4e12)) as progress:
        progress()
        with (tmp_path / HISTORY).open("w") as stream:
            for row in ({"step": 0, "validation_loss": 2.0}, {"step": 1, "loss": 1.5}, {"step": 2, "loss": 1.0}):
                stream.write(json.dumps(row) + "\n")
                stream.flush()
                progress()
                progress()
            stream.write('{"step": 3')
            stream.flush()
            progress()
    *rows, (step, speed) = logged
    assert rows == [(0, {"validation_loss": 2.0}), (1, {"loss": 1.5}), (2, {"loss": 1.0})]
    assert step == 2 and speed.keys() == {"step_tokens_per_second", "step_tflops_per_second", "step_mfu"}


def test_the_speed_of_a_training_is_the_share_of_its_gpus_peak(teacher: Path, dataset: Path) -> None:
    """By hand: two operations per weight of four layers and the head, and attention to half of 32 tokens."""
    forward = 2 * 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 4 * 2 * 4 * 16 * 32 + 2 * 512 * 64
    alone = measure_cost(config(dataset, max_steps=1), teacher, None, 1)
    taught = measure_cost(config(dataset, max_steps=1), teacher, teacher, 1)
    assert (alone.operations, taught.operations, alone.peak) == (3 * forward, 4 * forward, None)
    found = Cost(taught.operations, 2 * 989e12).describe_speed(1e9)
    assert found["tflops_per_second"] == pytest.approx(4 * forward / 1e3, abs=1e-3)
    assert found["mfu"] == pytest.approx(4 * forward * 1e9 / (2 * 989e12), abs=1e-4)
    assert find_peak_speed("NVIDIA H100 80GB HBM3") == 989e12 and find_peak_speed("NVIDIA GeForce GTX 970") is None


def test_training_reads_every_sequence_once_per_epoch_in_another_order(teacher: Path, dataset: Path) -> None:
    train, validation = open_training_data(config(dataset, max_steps=200, engine="hf"))
    packed = PackedDataset(dataset / "train", 32, 1234)
    epoch = len(packed)
    assert len(train) == 200 * 8 > epoch
    every = {tuple(packed[index]["input_ids"].tolist()) for index in range(epoch)}
    first = [tuple(train[index]["input_ids"].tolist()) for index in range(epoch)]
    assert set(first) == every
    second = [tuple(train[index]["input_ids"].tolist()) for index in range(epoch, min(2 * epoch, len(train)))]
    assert second != first[: len(second)] and set(second) <= every
    assert torch.equal(validation[0]["input_ids"], PackedDataset(dataset / "validation", 32, 1234)[0]["input_ids"])
