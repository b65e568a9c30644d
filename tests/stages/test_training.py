"""finetune and distill on real small models: quality, resume after a kill, accumulation, bad input."""

import json
import shutil
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from minitron.config.stages import DistillConfig, FinetuneConfig, PruneConfig
from minitron.data.packed import PackedDataset
from minitron.engines.checkpoints import MARKER
from minitron.engines.hf import loop, teacher_cache
from minitron.engines.progress import read_history
from minitron.errors import ConfigError, RunError
from minitron.models.checkpoint import load_model, save_model
from minitron.models.scoring import score_models
from minitron.stages import distill, finetune, prune
from minitron.storage.hashing import content_hash
from tests.servers import forks

SHORT = {
    "sequence_length": 32,
    "micro_batch_size": 4,
    "global_batch_size": 8,
    "max_steps": 6,
    "learning_rate": 3e-3,
    "min_learning_rate": 3e-4,
    "validation_interval": 3,
    "validation_sequences": 16,
    "checkpoint_interval": 3,
}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def assert_same_weights(left: Path, right: Path, tolerance: float = 0.0) -> None:
    expected, found = weights(left), weights(right)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def corrected(teacher: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that has learned something: otherwise its distribution is flat and there is nothing to distill."""
    output = tmp_path_factory.mktemp("finetune") / "teacher"
    before = content_hash(teacher)
    settings = SHORT | {"max_steps": 60, "validation_interval": 20, "checkpoint_interval": 50}
    record = finetune.run(FinetuneConfig(teacher=str(teacher), dataset=dataset, output=output, **settings))
    assert record["metrics"]["corrected"] == 1
    assert content_hash(teacher) == before, "the teacher that was given was modified"
    return output


@pytest.fixture(scope="module")
def pruned(corrected: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corrected teacher without its last two layers."""
    output = tmp_path_factory.mktemp("pruned") / "pruned"
    config = LlamaConfig.from_pretrained(corrected)
    config.num_hidden_layers = 2
    student = LlamaForCausalLM(config)
    student.load_state_dict(load_model(corrected).state_dict(), strict=False)
    save_model(student, output, tokenizer_from=corrected)
    return output


@pytest.fixture
def job(corrected: Path, pruned: Path, dataset: Path, tmp_path: Path) -> dict[str, Any]:
    return SHORT | {"teacher": corrected, "student": pruned, "dataset": dataset, "output": tmp_path / "student"}


def test_finetune_lowers_the_validation_loss_and_reports_it(corrected: Path) -> None:
    record = json.loads((corrected / "stage.json").read_text())
    metrics = record["metrics"]
    assert metrics["validation_loss"] < metrics["validation_loss_before"] - 1
    validations = {row["step"]: row["validation_loss"] for row in record["history"] if "validation_loss" in row}
    assert list(validations) == [0, 20, 40, 60]
    assert metrics["validation_loss"] == min(validations.values())
    assert metrics["tokens"] == 60 * 8 * 32


def test_the_recorded_loss_is_the_loss_of_the_saved_model(corrected: Path, dataset: Path) -> None:
    record = json.loads((corrected / "stage.json").read_text())
    validation = PackedDataset(dataset / "validation", 32, record["seed"])
    batch = [validation[index] for index in range(16)]
    model = AutoModelForCausalLM.from_pretrained(corrected)
    with torch.no_grad():
        logits = model(torch.stack([item["input_ids"] for item in batch])).logits
    loss = F.cross_entropy(logits.flatten(0, 1), torch.cat([item["labels"] for item in batch]))
    assert record["metrics"]["validation_loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_finetune_keeps_the_base_model_when_it_gets_worse(corrected: Path, dataset: Path, tmp_path: Path) -> None:
    settings = SHORT | {"learning_rate": 0.1, "min_learning_rate": 0.1}
    record = finetune.run(FinetuneConfig(teacher=str(corrected), dataset=dataset, output=tmp_path / "kept", **settings))
    assert record["metrics"]["corrected"] == 0 and record["metrics"]["best_step"] == 0
    assert record["metrics"]["validation_loss"] == record["metrics"]["validation_loss_before"]
    assert_same_weights(tmp_path / "kept", corrected)


@pytest.fixture(scope="module")
def broken(corrected: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corrected teacher with weights that are finite, but overflow where they meet."""
    model = load_model(corrected)
    model.model.norm.weight.data *= 1e30
    model.lm_head.weight.data *= 1e30
    output = tmp_path_factory.mktemp("broken") / "broken"
    save_model(model, output, tokenizer_from=corrected)
    return output


def test_a_training_that_diverges_ends_and_keeps_its_last_good_state(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step, the value, the last good state and the remedy are named; another setting does not lose the state."""
    compute_loss, calls = loop._Training._compute_loss, []

    def compute_nan_after_step_4(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
        loss, terms = compute_loss(*arguments)
        calls.append(loss)
        return (loss * float("nan") if len(calls) > 8 else loss), terms

    with monkeypatch.context() as patch, pytest.raises(RunError) as caught:
        patch.setattr(loop._Training, "_compute_loss", compute_nan_after_step_4)
        distill.run(DistillConfig(**job))
    kept = tmp_path / "student.last-good"
    assert str(caught.value).startswith("the training diverged at step 5: loss is nan; the last good state, step 3 (")
    assert str(caught.value).endswith(
        f"), is in {kept}; lower learning_rate (0.003), or raise warmup_steps (2) or global_batch_size (8)"
    )
    assert caught.value.exit_status == 1 and "\n" not in str(caught.value)
    assert not job["output"].exists() and not (kept / "stage.json").exists()
    before = content_hash(kept)
    assert AutoModelForCausalLM.from_pretrained(kept).config.num_hidden_layers == 2
    distill.run(DistillConfig(**job | {"learning_rate": 1e-3, "max_steps": 2}))
    assert content_hash(kept) == before


@pytest.mark.parametrize("learning_rate", [3.0, 1e38])
def test_a_loss_far_above_guessing_is_a_divergence(job: dict[str, Any], learning_rate: float, tmp_path: Path) -> None:
    """And no later than after the step at fault; the untrained student needs no copy."""
    rates = {"learning_rate": learning_rate, "min_learning_rate": learning_rate}
    with pytest.raises(RunError, match=r"^the training diverged at step [1-3]: ") as caught:
        distill.run(DistillConfig(**job | rates))
    assert "the last good state, the untrained model (validation loss " in str(caught.value)
    assert f"is in {job['student']}; lower learning_rate ({learning_rate:g})" in str(caught.value)
    assert not job["output"].exists() and not (tmp_path / "student.last-good").exists()


@pytest.mark.parametrize("place", ["base model", "teacher", "student"])
def test_a_model_whose_loss_is_not_a_number_is_refused_before_step_1(
    job: dict[str, Any], broken: Path, dataset: Path, tmp_path: Path, place: str
) -> None:
    with pytest.raises(RunError, match=f"^{broken}: its validation loss is (nan|inf) before training; ") as caught:
        if place == "base model":
            finetune.run(FinetuneConfig(teacher=str(broken), dataset=dataset, output=tmp_path / "out", **SHORT))
        else:
            distill.run(DistillConfig(**job | {place: broken}))
    assert caught.value.exit_status == 1
    assert not list(tmp_path.glob("*.last-good")) and not (tmp_path / "out").exists()


def test_a_loss_too_high_for_a_perplexity_is_trained(corrected: Path, dataset: Path, tmp_path: Path) -> None:
    """exp(710) is more than a float holds: the loss is there, the perplexity is left out."""
    model = load_model(corrected)
    model.lm_head.weight.data *= 5000
    save_model(model, tmp_path / "loud", tokenizer_from=corrected)
    config = FinetuneConfig(teacher=str(tmp_path / "loud"), dataset=dataset, output=tmp_path / "out", **SHORT)
    record = finetune.run(config)
    validations = [row for row in record["history"] if "validation_loss" in row]
    assert validations[0]["validation_loss"] > 710 and "validation_perplexity" not in validations[0]
    json.loads((tmp_path / "out" / "stage.json").read_text(), parse_constant=pytest.fail)


def test_finetune_switched_off_passes_the_base_model_on(teacher: Path, dataset: Path, tmp_path: Path) -> None:
    record = finetune.run(
        FinetuneConfig(teacher=str(teacher), dataset=dataset, output=tmp_path / "same", enabled=False)
    )
    assert record["metrics"] == {"corrected": 0}
    assert content_hash(tmp_path / "same") == content_hash(teacher)


def test_distill_closes_the_gap_and_logs_the_terms_apart(job: dict[str, Any], corrected: Path) -> None:
    record = distill.run(DistillConfig(**job | {"max_steps": 40, "validation_interval": 20}))
    metrics = record["metrics"]
    teacher_loss = json.loads((corrected / "stage.json").read_text())["metrics"]["validation_loss"]
    assert metrics["teacher_validation_loss"] == pytest.approx(teacher_loss, abs=1e-6)
    gap_before = metrics["validation_loss_before"] - metrics["teacher_validation_loss"]
    assert metrics["validation_loss"] - metrics["teacher_validation_loss"] < 0.5 * gap_before
    steps = [row for row in record["history"] if "kl" in row]
    assert [row["step"] for row in steps] == list(range(1, 41))
    for row in steps:
        assert row["loss"] == pytest.approx(row["kl"], rel=1e-4)
        assert row["cross_entropy"] > 0 and row["teacher_loss"] > 0 and 0 <= row["top1_agreement"] <= 1
    assert steps[-1]["kl"] < steps[0]["kl"] and steps[-1]["top1_agreement"] > steps[0]["top1_agreement"]
    assert AutoModelForCausalLM.from_pretrained(job["output"]).config.num_hidden_layers == 2


@pytest.mark.parametrize("form", ["sampled", "top_k"])
def test_a_student_learns_from_the_cache_as_from_the_teacher(
    job: dict[str, Any],
    form: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = job | {"max_steps": 40, "validation_interval": 20, "workspace": tmp_path / "ws"}
    online = distill.run(DistillConfig(**long))["metrics"]
    cached = {"teacher_cache": form, "teacher_cache_size": 50}
    record = distill.run(DistillConfig(**long | cached | {"output": tmp_path / "cached"}))
    metrics = record["metrics"]
    assert metrics["teacher_validation_loss"] == pytest.approx(online["teacher_validation_loss"], abs=1e-6)
    if form == "sampled":
        assert metrics["validation_loss"] == pytest.approx(online["validation_loss"], rel=0.01)
    steps = [row for row in record["history"] if "kl" in row]
    assert all(row["teacher_loss"] > 0 and 0 <= row["top1_agreement"] <= 1 for row in steps)
    assert steps[-1]["kl"] < steps[0]["kl"]
    monkeypatch.setattr(teacher_cache, "load_model", Mock(side_effect=AssertionError("the teacher is not needed")))
    distill.run(DistillConfig(**long | cached | {"output": tmp_path / "again", "learning_rate": 1e-3}))


def test_the_first_step_is_the_forward_kl_of_its_batch(job: dict[str, Any]) -> None:
    """The loss of a step equals sum over tokens of p · (log p - log q) over all its tokens, from plain logits."""
    config = DistillConfig(**job | {"max_steps": 1, "global_batch_size": 8, "micro_batch_size": 2})
    record = distill.run(config)
    train = PackedDataset(config.dataset / "train", 32, config.seed)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed)).tolist()[:8]
    input_ids = torch.stack([train[index]["input_ids"] for index in order])
    with torch.no_grad():
        student, teacher = (
            AutoModelForCausalLM.from_pretrained(path)(input_ids).logits.flatten(0, 1).log_softmax(-1)
            for path in (config.student, config.teacher)
        )
    expected = F.kl_div(student, teacher, reduction="batchmean", log_target=True).item()
    first = next(row for row in record["history"] if "kl" in row)
    assert first["loss"] == pytest.approx(expected, rel=1e-4)


def test_outputs_of_layers_are_matched_with_a_weight_that_ends_at_0(job: dict[str, Any], tmp_path: Path) -> None:
    """The first step has the mean of 1 - cosine of plain transformers; recomputed activations change nothing."""
    matched = job | {"max_steps": 2, "validation_interval": 2, "intermediate_layers": [[1, 1], [1, 3]]}
    config = DistillConfig(**matched)
    first, last = (row for row in distill.run(config)["history"] if "kl" in row)
    train = PackedDataset(config.dataset / "train", 32, config.seed)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed)).tolist()[:8]
    input_ids = torch.stack([train[index]["input_ids"] for index in order])
    with torch.no_grad():
        student, teacher = (
            AutoModelForCausalLM.from_pretrained(path)(input_ids, output_hidden_states=True).hidden_states
            for path in (config.student, config.teacher)
        )
    expected = sum((1 - F.cosine_similarity(student[1], teacher[layer], dim=-1)).mean() / 2 for layer in (1, 3))
    assert first["intermediate"] == pytest.approx(expected.item(), rel=1e-4) and first["intermediate"] > 0.01
    assert first["loss"] == pytest.approx(first["kl"] + first["intermediate"], rel=1e-5)
    assert last["loss"] == pytest.approx(last["kl"], rel=1e-5) and last["intermediate"] > 0
    distill.run(DistillConfig(**matched | {"gradient_checkpointing": True, "output": tmp_path / "recomputed"}))
    assert_same_weights(job["output"], tmp_path / "recomputed")


def test_outputs_of_other_sizes_cannot_be_matched(job: dict[str, Any], dataset: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "calibration_sequences": 8, "sequence_length": 32}
    prune.run(PruneConfig(teacher=job["teacher"], dataset=dataset, output=tmp_path / "narrow", **sizes))
    for student, layers, message in (
        (tmp_path / "narrow", [[1, 1]], "the student's hidden_size 32 is not the teacher's 64, so their outputs"),
        (job["student"], [[3, 1]], "3 is not a layer of the student; choose from 1 to 2"),
    ):
        with pytest.raises(ConfigError, match=rf"distill\.intermediate_layers: {message}"):
            distill.run(DistillConfig(**job | {"student": student, "intermediate_layers": layers}))


def test_what_was_cut_or_refitted_has_a_learning_rate_of_its_own(
    job: dict[str, Any], dataset: Path, tmp_path: Path
) -> None:
    """With almost none it stays where it was, and all else moves."""
    sizes = {"intermediate_size": 32, "calibration_sequences": 64, "sequence_length": 32, "method": "compensated"}
    prune.run(PruneConfig(teacher=job["teacher"], dataset=dataset, output=tmp_path / "pruned", **sizes))
    fits = json.loads((tmp_path / "pruned" / "pruning.json").read_text())["fits"]
    changed = job | {"student": tmp_path / "pruned", "kl_weight": 0.0, "cross_entropy_weight": 1.0}
    changed["cut_learning_rate_factor"] = 1e-9
    assert distill.run(DistillConfig(**changed))["metrics"]["best_step"] > 0
    refitted = {("o_proj", fit["layer"]) for fit in fits if fit["o_proj"]["ridge"] is not None}
    before = weights(tmp_path / "pruned")
    for name, weight in weights(job["output"]).items():
        module, layer = name.split(".")[-2], int(name.split(".")[2]) if "layers" in name else -1
        stays = module in ("gate_proj", "up_proj", "down_proj") or (module, layer) in refitted
        assert torch.allclose(weight, before[name], rtol=0, atol=1e-6) == stays, name
    with pytest.raises(ConfigError, match=r"has no pruning\.json, so nobody knows what was cut; set it to 1, or"):
        distill.run(DistillConfig(**job | {"output": tmp_path / "other", "cut_learning_rate_factor": 0.5}))


ROUNDING = 1e-5
"""Most that another micro-batch size may change a weight here. Sums of gradients in another order differ in their last
bits, and AdamW moves a weight by the learning rate, 3e-3, times its gradient's relative size: the error of small
gradients shows. Found: 1.3e-6, where six steps move weights by 1e-2."""


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        ({"micro_batch_size": 1}, ROUNDING),
        ({"micro_batch_size": 8}, ROUNDING),
        ({"gradient_checkpointing": True}, 0.0),
        ({"checkpoint_interval": 2}, 0.0),
    ],
)
def test_settings_that_are_in_no_key_do_not_change_the_result(
    job: dict[str, Any], tmp_path: Path, change: dict[str, Any], tolerance: float
) -> None:
    """The record still says what was used."""
    expected = distill.run(DistillConfig(**job))
    found = distill.run(DistillConfig(**job | change | {"output": tmp_path / "other"}))
    assert found["key"] == expected["key"]
    assert found["config"] == expected["config"] | change | {"output": str(tmp_path / "other")}
    for left, right in zip(expected["history"], found["history"], strict=True):
        assert right == pytest.approx(left, rel=1e-3)
    assert_same_weights(job["output"], tmp_path / "other", tolerance)


def test_the_best_state_is_kept_not_the_last(job: dict[str, Any]) -> None:
    settings = {"max_steps": 24, "validation_interval": 6, "learning_rate": 0.05, "min_learning_rate": 0.05}
    record = distill.run(DistillConfig(**job | settings))
    validations = {row["step"]: row["validation_loss"] for row in record["history"] if "validation_loss" in row}
    assert record["metrics"]["validation_loss"] == min(validations.values())
    assert record["metrics"]["best_step"] == min(validations, key=lambda step: validations[step])
    dataset = PackedDataset(job["dataset"] / "validation", 32, record["seed"])
    saved = score_models({"saved": load_model(job["output"])}, dataset, 16, 4)["saved"]["loss"]
    assert saved == pytest.approx(min(validations.values()), abs=1e-6)


@pytest.mark.parametrize(
    ("stage", "change"),
    [("finetune", {}), ("distill", {}), ("distill", {"micro_batch_size": 1, "checkpoint_interval": 7})],
)
def test_killed_in_mid_training_it_resumes_and_ends_with_identical_weights(
    stage: str, change: dict[str, Any], job: dict[str, Any], tmp_path: Path
) -> None:
    """With settings that decide no result it resumes, too: with another micro-batch size up to rounding.

    The finetuning gets SIGTERM, after which it saves the state of its step; the others get SIGKILL.
    """
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in job.items()}
    settings |= {"max_steps": 60, "validation_interval": 10, "checkpoint_interval": 10}
    if stage == "finetune":
        settings["teacher"] = settings.pop("student")
    paths = {name: tmp_path / name for name in ("whole", "killed")}
    for name, output in paths.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings | {"output": str(output)}))

    def start(name: str) -> BaseProcess:
        command = ["-m", f"minitron.{stage}", "--config", str(tmp_path / f"{name}.yaml")]
        return forks.start_python(command, tmp_path / "log", tmp_path / "log")

    process = start("killed")
    checkpoints = tmp_path / "killed.partial" / "checkpoints"
    while not (checkpoints / "checkpoint-20" / MARKER).exists():
        assert process.exitcode is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.terminate() if stage == "finetune" else process.kill()
    process.join()
    if stage == "finetune":
        last = read_history(checkpoints)[-1]["step"]
        assert process.exitcode == 143 and (checkpoints / f"checkpoint-{last}" / MARKER).exists(), "it lost a step"
    assert not paths["killed"].exists()
    (checkpoints / "checkpoint-99").mkdir()  # what a kill during a save leaves: a checkpoint without its marker
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(settings | change | {"output": str(paths["killed"])}))
    for name in ("whole", "killed"):
        process = start(name)
        process.join()
        assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert_same_weights(paths["whole"], paths["killed"], ROUNDING if change else 0.0)
    whole, killed = (json.loads((path / "stage.json").read_text()) for path in paths.values())
    same = 10 if change else 60  # the checkpoint of step 20 may not have been complete
    assert [row for row in whole["history"] if row["step"] <= same] == [
        row for row in killed["history"] if row["step"] <= same
    ], "it did not resume"
    assert not list(paths["killed"].glob("checkpoint*")) and not (tmp_path / "killed.partial").exists()


def test_tied_embeddings_are_trained_as_one(dataset: Path, corrected: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(corrected, tie_word_embeddings=True)
    torch.manual_seed(0)
    save_model(LlamaForCausalLM(config), tmp_path / "tied", tokenizer_from=corrected)
    finetune.run(FinetuneConfig(teacher=str(tmp_path / "tied"), dataset=dataset, output=tmp_path / "out", **SHORT))
    assert "lm_head.weight" not in weights(tmp_path / "out")
    assert not torch.equal(
        weights(tmp_path / "out")["model.embed_tokens.weight"], weights(tmp_path / "tied")["model.embed_tokens.weight"]
    )


def test_the_end_of_a_document_is_learned_where_it_is_the_padding_too(
    teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    """Transformers keeps the embedding of the padding as it is."""
    end = json.loads((teacher / "config.json").read_text())["eos_token_id"]
    assert json.loads((teacher / "config.json").read_text())["pad_token_id"] == end
    settings = SHORT | {"weight_decay": 0.0, "max_steps": 3, "validation_interval": 3}
    finetune.run(FinetuneConfig(teacher=str(teacher), dataset=dataset, output=tmp_path / "out", **settings))
    name = "model.embed_tokens.weight"
    assert not torch.equal(weights(tmp_path / "out")[name][end], weights(teacher)[name][end])


def test_a_student_with_another_tokenizer_is_refused(job: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(job["student"], other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text + "\n")
    with pytest.raises(ConfigError, match=r"other: tokenizer .* was tokenized with .* prepare the corpus again"):
        distill.run(DistillConfig(**job | {"student": other}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_a_damaged_shard_is_refused(job: dict[str, Any], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(job["teacher"], damaged)
    (damaged / "stage.json").unlink()
    shard = damaged / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(RunError, match=r"damaged: weights cannot be read .* get the model again"):
        distill.run(DistillConfig(**job | {"teacher": damaged}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


def test_a_model_changed_after_its_stage_is_refused(job: dict[str, Any], tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(job["teacher"], changed)
    shard = changed / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RunError, match=r"changed: content hash .* a file is damaged or was changed"):
        distill.run(DistillConfig(**job | {"teacher": changed}))


def test_an_unsupported_architecture_is_refused(dataset: Path, teacher: Path, tmp_path: Path) -> None:
    other = tmp_path / "encoder"
    shutil.copytree(teacher, other)
    config = json.loads((other / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="architecture BertForMaskedLM is not supported; use one of LlamaForCausalLM"):
        finetune.run(FinetuneConfig(teacher=str(other), dataset=dataset, output=tmp_path / "out", **SHORT))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
