"""Engine nemo against engine hf: the same batches, the same cuts, the same curves; killed, it resumes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minitron.config.parse import parse
from minitron.config.stages import FinetuneConfig
from minitron.data.packed import open_training_data
from minitron.data.tokenizer import load_tokenizer
from minitron.engines import progress
from minitron.engines.checkpoints import MARKER
from minitron.engines.divergence import Diverged
from minitron.engines.progress import FINISHED, Progress
from minitron.errors import RunError
from minitron.models.checkpoint import load_model, save_model
from minitron.stages import finetune
from minitron.storage.layout import IMPORTANCE
from tests.nemo.nemo_support import (
    DISTILLATION,
    TRAINING,
    curves,
    distillation_curves_of_hf,
    logits,
    run_distill,
    run_finetune,
    run_prune,
    weights,
)


def test_both_engines_read_the_same_tokens_and_labels(teacher: Path, dataset: Path) -> None:
    """The end of a document included, whose id is the padding's: Megatron's own dataset masks it."""
    from nemo.lightning.data import MegatronPretrainingSampler

    from minitron.engines.nemo.training import Batches, make_data_module

    config = FinetuneConfig(teacher=str(teacher), dataset=dataset, output=Path("unused"), engine="nemo", **TRAINING)
    tokenizer = load_tokenizer(teacher)
    assert json.loads((teacher / "config.json").read_text())["pad_token_id"] == tokenizer.eos_token_id
    train_set, validation_set = open_training_data(config)
    module = make_data_module(config, Batches(train_set), Batches(validation_set, 12, 16), config.global_batch_size)
    sampler = MegatronPretrainingSampler(len(module._train_ds), 0, 4, 0, 1, global_batch_size=8)
    ends = 0
    for position, indices in enumerate(islice(sampler, 6)):
        for row, index in enumerate(indices):
            actual, expected = module._train_ds[index], train_set[position * 4 + row]
            assert torch.equal(actual["tokens"], expected["input_ids"])
            assert torch.equal(actual["labels"], expected["labels"])
            assert actual["loss_mask"].all()
            ends += int((actual["labels"] == tokenizer.eos_token_id).sum())
    assert ends > 0
    assert [float(module._validation_ds[index]["loss_mask"].mean()) for index in range(16)] == [1.0] * 12 + [0.0] * 4


def test_finetuning_gives_the_curves_and_the_weights_of_engine_hf(finetuned: dict[str, Path]) -> None:
    expected, actual = (json.loads((finetuned[engine] / "stage.json").read_text()) for engine in ("hf", "nemo"))
    assert actual["metrics"].keys() == expected["metrics"].keys()
    for name, values in curves(expected).items():
        assert curves(actual)[name] == pytest.approx(values, rel=1e-4), name
    assert [row["step"] for row in actual["history"]] == [row["step"] for row in expected["history"]]
    assert actual["metrics"]["best_step"] == expected["metrics"]["best_step"] > 0
    assert actual["peak_rss_mb"] > 300
    for name, weight in weights(finetuned["hf"]).items():
        assert torch.allclose(weights(finetuned["nemo"])[name], weight, atol=1e-4), name


def test_pruning_keeps_what_engine_hf_keeps(pruned: dict[str, Path]) -> None:
    expected, actual = (json.loads((pruned[engine] / "pruning.json").read_text()) for engine in ("hf", "nemo"))
    assert actual["kept"] == expected["kept"]
    assert actual["dropped_layers"] == expected["dropped_layers"]
    assert actual["student"] == expected["student"] and actual["calibration"] == expected["calibration"]
    scores = {engine: load_file(pruned[engine] / IMPORTANCE) for engine in ("hf", "nemo")}
    torch.testing.assert_close(scores["nemo"], scores["hf"], rtol=1e-4, atol=0)


def test_the_two_students_are_one_function(pruned: dict[str, Path]) -> None:
    """Model-Optimizer orders channels and heads by importance: the weights are a permutation, the logits equal."""
    torch.testing.assert_close(logits(pruned["nemo"]), logits(pruned["hf"]), rtol=1e-3, atol=1e-4)
    model = AutoModelForCausalLM.from_pretrained(pruned["nemo"])
    assert model.config.head_dim == 24 and model.config.vocab_size == 600


def test_layers_dropped_by_hand_leave_the_others_as_they_are(
    wide: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    accounts = {
        engine: run_prune(tmp_path / engine, dataset, wide, engine=engine, drop_layers=[2, 3])
        for engine in ("hf", "nemo")
    }
    assert accounts["nemo"]["kept"]["layers"] == [0, 3]
    assert not (tmp_path / "nemo" / IMPORTANCE).exists()
    assert accounts["nemo"] == accounts["hf"]
    expected, actual = weights(tmp_path / "hf"), weights(tmp_path / "nemo")
    assert expected.keys() == actual.keys() and all(torch.equal(expected[name], actual[name]) for name in expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "nemo"], "NeMo wrote into the working directory"


def test_intermediate_layers_are_matched_too(
    wide: Path, pruned: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    """Their loss is scaled to the size of the KL, so that the whole is twice the KL; it reaches the history apart."""
    settings = {"max_steps": 3, "validation_interval": 3, "engine": "nemo", "intermediate_layers": [[1, 2], [2, 4]]}
    record = run_distill(tmp_path / "out", dataset, wide, pruned["hf"], **settings)
    steps = [row for row in record["history"] if "loss" in row]
    for row in steps:
        assert row["loss"] == pytest.approx(2 * row["kl"], rel=1e-4) and 0 < row["intermediate"] < 2
    assert steps[-1]["intermediate"] < steps[0]["intermediate"]
    assert sorted(weights(tmp_path / "out")) == sorted(weights(pruned["hf"])), (
        "the projection is no part of the student"
    )


def test_distillation_gives_the_curve_of_engine_hf(distilled: dict[str, dict[str, Any]]) -> None:
    expected, actual = distilled["hf"], distilled["nemo"]
    first = [next(row for row in record["history"] if "loss" in row) for record in (actual, expected)]
    assert first[1].keys() - first[0].keys() == {"teacher_loss", "top1_agreement"}, "README says what differs"
    assert first[0].keys() <= first[1].keys()
    for name, values in distillation_curves_of_hf(expected).items():
        assert curves(actual)[name] == pytest.approx(values, rel=1e-3), name
    assert actual["metrics"]["teacher_validation_loss"] == expected["metrics"]["teacher_validation_loss"]


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_two_processes_give_the_losses_of_one(distilled: dict[str, dict[str, Any]], kind: str) -> None:
    """Over gloo, through validations and checkpoints at intervals of their own; with activations recomputed, too."""
    one, two = curves(distilled["nemo"]), curves(distilled[kind])
    assert len(two["loss"]) == TRAINING["max_steps"] and len(two["validation_loss"]) == 3
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=1e-4), name


@pytest.mark.parametrize("change", [{}, {"micro_batch_size": 2, "checkpoint_interval": 2}])
def test_killed_in_mid_training_it_resumes_and_ends_with_the_same_loss(
    teacher: Path, dataset: Path, finetuned: dict[str, Path], tmp_path: Path, change: dict[str, int]
) -> None:
    """Also with settings that decide no result."""
    models = {"teacher": str(teacher), "dataset": str(dataset)}

    def is_complete(work: Path) -> bool:
        return (work / "checkpoint-3" / MARKER).exists()

    resumed = _kill_and_resume("finetune", is_complete, tmp_path, change, **models)
    _check_same_course(json.loads((finetuned["nemo"] / "stage.json").read_text()), resumed)
    for name, weight in weights(finetuned["nemo"]).items():
        assert torch.allclose(weights(tmp_path / "killed")[name], weight, atol=1e-6), name


def test_it_trains_on_while_it_writes_and_killed_then_it_resumes_at_the_checkpoint_before(
    wide: Path, pruned: dict[str, Path], dataset: Path, distilled: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Of a distillation, on a slow disk: step 7 is done before the checkpoint of step 6 is written."""
    models = {"teacher": str(wide), "student": str(pruned["hf"]), "dataset": str(dataset)}

    def is_writing(work: Path) -> bool:
        history = work / "history.jsonl"
        if not history.is_file() or '{"step": 7, ' not in history.read_text():
            return False
        assert (work / "checkpoint-6").is_dir() and not (work / "checkpoint-6" / MARKER).exists()
        assert (work / "checkpoint-3" / MARKER).exists()
        return True

    resumed = _kill_and_resume("distill", is_writing, tmp_path, slow_disk=10, **models, **DISTILLATION)
    _check_same_course(distilled["nemo"], resumed)


def test_what_is_damaged_after_a_kill_is_made_again(
    teacher: Path, dataset: Path, finetuned: dict[str, Path], tmp_path: Path
) -> None:
    """An imported model, the last checkpoint, and the note of an end that never was."""

    def is_complete(work: Path) -> bool:
        return (work / "checkpoint-6" / MARKER).exists()

    def damage(work: Path) -> None:
        for name in ("student", "checkpoint-6"):
            shard = max((work / name / "weights").glob("*.distcp"), key=lambda path: path.stat().st_size)
            content = bytearray(shard.read_bytes())
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)
        (work / FINISHED).mkdir()
        (work / FINISHED / MARKER).write_text("")

    models = {"teacher": str(teacher), "dataset": str(dataset)}
    resumed = _kill_and_resume("finetune", is_complete, tmp_path, damage=damage, **models)
    _check_same_course(json.loads((finetuned["nemo"] / "stage.json").read_text()), resumed)
    for name, weight in weights(finetuned["nemo"]).items():
        assert torch.allclose(weights(tmp_path / "killed")[name], weight, atol=1e-6), name


def _kill_and_resume(
    stage: str,
    is_time: Callable[[Path], bool],
    tmp_path: Path,
    change: dict[str, int] | None = None,
    slow_disk: float = 0,
    damage: Callable[[Path], None] = lambda work: None,
    **settings: Any,
) -> dict[str, Any]:
    """Kill a training when `is_time` says so of its checkpoints' directory, start it again with some settings changed.

    Returns:
        The record.
    """
    settings = TRAINING | settings | {"output": str(tmp_path / "killed"), "engine": "nemo"}
    parse(stage, settings)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", f"minitron.{stage}", "--config", str(tmp_path / "job.yaml")]
    environment = os.environ | {"SLOW_DISK_SECONDS": str(slow_disk)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    work = tmp_path / "killed.partial" / "checkpoints"
    while not is_time(work):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _wait_until_no_worker_is_left(work)
    (work / "checkpoint-9").mkdir()  # what a kill during a save leaves
    damage(work)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings | (change or {})))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((tmp_path / "killed" / "stage.json").read_text())


def _check_same_course(whole: dict[str, Any], resumed: dict[str, Any]) -> None:
    assert [row["step"] for row in resumed["history"]] == [row["step"] for row in whole["history"]]
    for name, values in curves(whole).items():
        assert curves(resumed)[name] == pytest.approx(values, rel=1e-6), name


def _wait_until_no_worker_is_left(work: Path) -> None:
    """Workers end with their parent, even a killed one: else they would write where the next attempt does."""
    for _ in range(300):
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
        if not any(str(work).encode() in line for line in lines):
            return
        time.sleep(0.1)
    raise AssertionError("workers outlive their parent")


def test_a_loss_far_above_guessing_is_a_divergence(teacher: Path, dataset: Path, tmp_path: Path) -> None:
    """At the step, and with the message, of engine hf; in two processes, of which one has the loss, too."""
    messages = set()
    rates = {"learning_rate": 3.0, "min_learning_rate": 3.0}
    for settings in ({"engine": "hf"}, {"engine": "nemo"}, {"engine": "nemo", "pipeline_parallel_size": 2}):
        with pytest.raises(RunError, match=r"^the training diverged at step [1-3]: cross_entropy is ") as caught:
            run_finetune(tmp_path / "out", dataset, teacher, **rates | settings)
        messages.add(re.sub(r"\d+\.\d+", "N", str(caught.value)))
        assert not (tmp_path / "out").exists()
    assert len(messages) == 1 and f"the untrained model (validation loss N), is in {teacher}" in messages.pop()


def test_a_model_whose_loss_is_not_a_number_is_refused_before_step_1(wide: Path, dataset: Path, tmp_path: Path) -> None:
    model = load_model(wide)
    model.model.norm.weight.data *= 1e30  # finite, but they overflow where they meet
    model.lm_head.weight.data *= 1e30
    save_model(model, tmp_path / "broken", tokenizer_from=wide)
    with pytest.raises(RunError, match=f"^{tmp_path / 'broken'}: its validation loss is (nan|inf) before training; "):
        run_finetune(tmp_path / "out", dataset, tmp_path / "broken", engine="nemo")


def test_a_training_that_diverges_keeps_its_last_good_state(
    teacher: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers train; that the numbers after the second validation were bad is made up."""

    class BadAfterValidation(Progress):
        def __call__(self) -> None:
            super().__call__()
            if any(self._work.glob(f"best-[1-9]*/{MARKER}")):
                raise Diverged("the training diverged at step 5: loss is nan")

    monkeypatch.setattr(progress, "Progress", BadAfterValidation)
    output = tmp_path / "out"
    with pytest.raises(RunError, match=rf"the last good state, step \d+ \(.*\), is in {output}\.last-good; lower"):
        run_finetune(output, dataset, teacher, engine="nemo", max_steps=400)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "out.last-good")
    assert kept.config.num_hidden_layers == 4 and not output.exists()


def test_a_failing_worker_is_one_line(
    wide: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model is damaged once the stage has checked it."""
    broken = shutil.copytree(wide, tmp_path / "broken")

    def cut_off(model: Path) -> None:
        shard = model / "model.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1000])

    monkeypatch.setattr(finetune, "check_finite", cut_off)
    with pytest.raises(RunError) as caught:
        run_finetune(tmp_path / "out", dataset, broken, engine="nemo")
    assert "\n" not in str(caught.value) and "; see the log" in str(caught.value)
    assert not (tmp_path / "out").exists()
