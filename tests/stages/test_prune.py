"""Importance, surgery and the stage, on tiny models of every supported architecture."""

import copy
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from minitron.config import parse
from minitron.config.stages import PruneConfig
from minitron.data.packed import PackedDataset
from minitron.engines.hf import pruning
from minitron.engines.plan_checks import find_size_faults
from minitron.errors import ConfigError, RunError
from minitron.models.checkpoint import (
    copy_model,
    count_model_parameters,
    load_model,
    save_derived_model,
    save_model,
)
from minitron.models.checks import INDEX, read_headers
from minitron.models.pruning.depth import drop_layers_by_loss
from minitron.models.pruning.importance import Importance, measure_importance
from minitron.models.pruning.layers import LayerReader
from minitron.models.pruning.scores import find_importance_faults
from minitron.models.pruning.surgery import Drop, LayerOrder, Plan, Shape, choose_plan, cut_model
from minitron.report.figures import draw_importance
from minitron.runtime import cleanup
from minitron.stages import prune
from minitron.storage import references
from minitron.storage.hashing import content_hash
from minitron.storage.layout import IMPORTANCE
from tests.models.test_checks import shard
from tests.servers import forks
from tests.servers.gcs import World

SEQUENCE = 32
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 16}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
}
FULL = Shape(64, 80, 16, 4, 4)
CUTS = {
    "hidden": {"hidden_size": 48},
    "intermediate": {"intermediate_size": 40},
    "heads": {"num_attention_heads": 8},
    "groups": {"num_key_value_heads": 2, "num_attention_heads": 8},
    "heads and groups": {"num_key_value_heads": 2, "num_attention_heads": 4},
    "layers": {"num_hidden_layers": 2},
    "all": {
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_hidden_layers": 3,
    },
}


def make_model(architecture: str, tied: bool = False) -> PreTrainedModel:
    """Return a random model, 16 heads in 4 groups, whose head_dim (8) is not hidden / heads, every bias in use."""
    config_class, model_class, extra = ARCHITECTURES[architecture]
    config = config_class(
        vocab_size=512,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-9,
        **vars(FULL),
        **extra,
    )
    generator = torch.Generator().manual_seed(3)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3 if "norm" in name else 0.15, generator=generator)
    return model


def open_layers(model: PreTrainedModel, directory: Path) -> LayerReader:
    """Write a model to a new directory, and open it."""
    save_model(model, directory, directory)
    return LayerReader(directory)


def cut(model: PreTrainedModel, plan: Plan, directory: Path) -> PreTrainedModel:
    """Cut a model in a new directory, and load the student."""
    (student := directory / "student").mkdir(parents=True)
    cut_model(open_layers(model, directory / "teacher"), plan, student)
    return load_model(student)


def measure(teacher: LayerReader, packed: PackedDataset, sequences: int, micro_batch_size: int) -> Importance:
    return measure_importance(teacher, packed, sequences, micro_batch_size, torch.float32, torch.device("cpu"))


def random_importance(seed: int = 0) -> Importance:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"layers": (4,), "hidden": (64,), "intermediate": (4, 80), "heads": (4, 16), "key_value": (4, 4)}
    return Importance(**{axis: torch.rand(size, generator=generator) for axis, size in sizes.items()})


def shape(**cuts: int) -> Shape:
    return Shape(**(vars(FULL) | cuts))


def token_ids(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 512, (count, SEQUENCE), generator=torch.Generator().manual_seed(5))


def head_channels(heads: list[int]) -> list[int]:
    return [head * 8 + channel for head in heads for channel in range(8)]


# ---- importance


def reference_importance(model: PreTrainedModel, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Compute every score without hooks: layers are run by hand, only the attention probabilities are the model's."""
    layers = model.model.layers
    squares = {name: [0.0] * len(layers) for name in ("norm1", "norm2", "mlp", "attention")}
    influence = [0.0] * len(layers)
    for batch in batches:
        probabilities = model(batch, output_attentions=True).attentions
        hidden = model.model.embed_tokens(batch)
        for index, layer in enumerate(layers):
            norm1 = rms_norm(hidden, layer.input_layernorm.weight)
            values = layer.self_attn.v_proj(norm1).reshape(*batch.shape, 4, 8).repeat_interleave(4, dim=2)
            context = torch.einsum("bhst,bthd->bshd", probabilities[index], values).reshape(*batch.shape, 128)
            middle = hidden + layer.self_attn.o_proj(context)
            norm2 = rms_norm(middle, layer.post_attention_layernorm.weight)
            gate = layer.mlp.gate_proj(norm2)
            inner = gate * torch.sigmoid(gate) * layer.mlp.up_proj(norm2)
            output = middle + layer.mlp.down_proj(inner)
            for name, activations in (("norm1", norm1), ("norm2", norm2), ("mlp", inner), ("attention", context)):
                for sequence in activations:
                    squares[name][index] = squares[name][index] + (sequence.abs().sum(dim=0) / SEQUENCE) ** 2
            influence[index] += (1 - cosine_similarity(hidden, output, dim=-1).mean(dim=1)).sum().item()
            hidden = output
    attention = torch.stack(squares["attention"])
    norms = squares["norm1"] + squares["norm2"]
    return {
        "layers": torch.tensor(influence) / sum(map(len, batches)),
        "hidden": sum(norm**0.5 for norm in norms),
        "intermediate": torch.stack(squares["mlp"]) ** 0.5,
        "heads": attention.reshape(4, 16, 8).sum(dim=2) ** 0.5,
        "key_value": attention.reshape(4, 4, 32).sum(dim=2) ** 0.5,
    }


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return hidden / (hidden.pow(2).mean(dim=-1, keepdim=True) + 1e-9).sqrt() * weight


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_importance_is_what_a_computation_without_hooks_gives(
    architecture: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states of four sequences fit at once: a second group has one."""
    monkeypatch.setattr("minitron.models.pruning.importance.STATES_ON_CPU", 5 * SEQUENCE * FULL.hidden_size * 4)
    model = make_model(architecture)
    packed = PackedDataset(dataset / "train", SEQUENCE, seed=1)
    found = measure(open_layers(model, tmp_path / "teacher"), packed, sequences=5, micro_batch_size=2)
    model.set_attn_implementation("eager")
    sequences = torch.stack([packed[index]["input_ids"] for index in range(5)])
    with torch.no_grad():
        expected = reference_importance(model, list(sequences.split(2)))
    for axis, scores in expected.items():
        torch.testing.assert_close(getattr(found, axis), scores, rtol=1e-5, atol=1e-5, msg=axis)


def test_importance_reads_what_there_is(dataset: Path, tmp_path: Path) -> None:
    teacher = open_layers(make_model("llama"), tmp_path / "teacher")
    packed = PackedDataset(dataset / "validation", SEQUENCE, seed=1)
    all_of_them = measure(teacher, packed, len(packed), 16)
    more_than_there_are = measure(teacher, packed, len(packed) + 1000, 16)
    assert torch.equal(all_of_them.hidden, more_than_there_are.hidden)


# ---- surgery


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cutting_nothing_gives_back_the_teacher_bit_for_bit(architecture: str, tied: bool, tmp_path: Path) -> None:
    teacher = make_model(architecture, tied)
    student = cut(teacher, choose_plan(random_importance(), FULL), tmp_path)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("teacher", "student"))
    assert after == before
    assert count_model_parameters(student) == count_model_parameters(teacher)
    expected = teacher.state_dict()
    assert student.state_dict().keys() == expected.keys()
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert torch.equal(student(token_ids()).logits, teacher(token_ids()).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("axis", CUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_student_computes_what_the_teacher_does_with_the_cut_parts_silenced(
    architecture: str, axis: str, tied: bool, tmp_path: Path
) -> None:
    teacher = make_model(architecture, tied)
    plan = choose_plan(random_importance(), shape(**CUTS[axis]))
    student = cut(teacher, plan, tmp_path)
    with torch.no_grad():
        found, expected = student(token_ids()).logits, silenced(teacher, plan)(token_ids()).logits
        assert (teacher(token_ids()).logits - expected).abs().max() > 0.1, "the silenced parts did not matter"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert Shape.from_config(student.config) == shape(**CUTS[axis])
    assert student.lm_head.weight.data_ptr() == student.model.embed_tokens.weight.data_ptr() or not tied


def silenced(teacher: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Return a copy of the teacher, of the same size, in which what the plan drops adds nothing."""
    model = copy.deepcopy(teacher)
    lost = [channel for channel in range(64) if channel not in plan.hidden]
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn.o_proj, layer.mlp.down_proj
        if index not in plan.layers:
            for linear in (attention, mlp):
                for parameter in linear.parameters():
                    parameter.data.zero_()
            continue
        place = plan.layers.index(index)
        mlp.weight.data[:, [i for i in range(80) if i not in plan.intermediate[place]]] = 0
        attention.weight.data[:, head_channels([h for h in range(16) if h not in plan.heads[place]])] = 0
        for linear in (attention, mlp):
            for parameter in linear.parameters():
                parameter.data[lost] = 0
    model.model.embed_tokens.weight.data[:, lost] = 0
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight") and parameter.numel() == 64:  # the student's mean is over fewer channels
            parameter.data *= math.sqrt(len(plan.hidden) / 64)
    return model


def test_kept_weights_are_slices_of_the_teachers(tmp_path: Path) -> None:
    teacher = make_model("qwen3")
    plan = choose_plan(random_importance(), shape(**CUTS["all"]))
    student = cut(teacher, plan, tmp_path)
    for place, layer in enumerate(plan.layers):
        new, old = student.model.layers[place], teacher.model.layers[layer]
        queries, groups = head_channels(plan.heads[place]), head_channels(plan.key_value[place])
        assert torch.equal(new.self_attn.q_proj.weight, old.self_attn.q_proj.weight[queries][:, plan.hidden])
        assert torch.equal(new.self_attn.k_proj.weight, old.self_attn.k_proj.weight[groups][:, plan.hidden])
        assert torch.equal(new.self_attn.k_norm.weight, old.self_attn.k_norm.weight)
        assert torch.equal(new.input_layernorm.weight, old.input_layernorm.weight[plan.hidden])
        assert torch.equal(new.mlp.up_proj.weight, old.mlp.up_proj.weight[plan.intermediate[place]][:, plan.hidden])
    assert torch.equal(student.model.norm.weight, teacher.model.norm.weight[plan.hidden])
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight[:, plan.hidden])


def test_the_best_are_kept_in_their_order_and_heads_are_ranked_within_their_group() -> None:
    scores = Importance(
        layers=torch.tensor([0.4, 0.1, 0.3]),
        hidden=torch.tensor([3.0, 9.0, 1.0, 5.0]),
        intermediate=torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [2.0, 2.0, 2.0]]),
        heads=torch.tensor([[9.0, 8.0, 1.0, 2.0, 6.0, 7.0], [0.0] * 6, [1.0, 2.0, 9.0, 8.0, 3.0, 2.0]]),
        key_value=torch.tensor([[12.0, 2.2, 9.2], [0.0] * 3, [2.2, 12.0, 3.6]]),
    )
    plan = choose_plan(scores, Shape(2, 2, 2, 2, 2))
    assert plan == Plan(
        layers=[0, 2],
        hidden=[1, 3],
        intermediate=[[1, 2], [0, 1]],  # of equal scores the first are kept
        heads=[[0, 5], [2, 4]],
        key_value=[[0, 2], [1, 2]],
    )
    # without a cut of groups each keeps its best head, though group 1's are the lowest of layer 0
    assert choose_plan(scores, Shape(4, 3, 3, 3, 3)).heads[0] == [0, 3, 5]


def test_attention_windows_go_with_their_layers(tmp_path: Path) -> None:
    student = cut(make_model("qwen2"), choose_plan(random_importance(), FULL, {"layers": [1, 3]}), tmp_path)
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    assert student.config.max_window_layers == 1


# ---- the stage


def write_teacher(model: PreTrainedModel, directory: Path, tokenizer_from: Path) -> Path:
    directory.mkdir()
    save_model(model, directory, tokenizer_from)
    return directory


@pytest.fixture
def settings(teacher: Path, dataset: Path, tmp_path: Path) -> dict:
    """A configuration that cuts nothing; the output is the only thing in its directory."""
    return {
        "output": tmp_path / "work" / "pruned",
        "teacher": teacher,
        "dataset": dataset,
        "sequence_length": SEQUENCE,
        "micro_batch_size": 4,
        "calibration_sequences": 8,
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_axis_at_once_reloads_with_transformers_alone(
    architecture: str, tied: bool, settings: dict, teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    model = make_model(architecture, tied)
    settings["teacher"] = write_teacher(model, tmp_path / "teacher", teacher)
    before = content_hash(settings["teacher"])
    record = prune.run(PruneConfig(**settings, **CUTS["all"]))
    student, report = AutoModelForCausalLM.from_pretrained(settings["output"], output_loading_info=True)
    assert not any(report.values()), report
    assert Shape.from_config(student.config) == shape(**CUTS["all"])
    assert json.loads((settings["output"] / "config.json").read_text())["head_dim"] == 8
    assert student.model.layers[0].self_attn.q_proj.weight.shape == (48, 48)
    assert student.config.tie_word_embeddings is tied
    scores = measure(LayerReader(settings["teacher"]), PackedDataset(dataset / "train", SEQUENCE, 1234), 8, 4)
    expected = cut(model, choose_plan(scores, shape(**CUTS["all"])), tmp_path / "expected")
    with torch.no_grad():
        assert torch.equal(student.eval()(token_ids()).logits, expected(token_ids()).logits)
    assert record["metrics"] == {
        "parameters_before": count_model_parameters(model),
        "parameters": count_model_parameters(student),
        "parameters_ratio": round(count_model_parameters(student) / count_model_parameters(model), 4),
        "calibration_tokens": 8 * SEQUENCE,
    }
    assert content_hash(settings["teacher"]) == before
    assert [path.name for path in settings["output"].parent.iterdir()] == ["pruned"]


def test_pruning_json_says_what_was_kept_and_why(settings: dict, teacher: Path, dataset: Path) -> None:
    prune.run(PruneConfig(**settings, num_hidden_layers=2, intermediate_size=96))
    found = json.loads((settings["output"] / "pruning.json").read_text())
    expected = measure(LayerReader(teacher), PackedDataset(dataset / "train", SEQUENCE, 1234), 8, 4)
    lowest = sorted(expected.layers.argsort()[:2].tolist())
    assert found["dropped_layers"] == [layer + 1 for layer in lowest]
    assert found["kept"]["layers"] == [layer for layer in range(4) if layer not in lowest]
    assert found["kept"]["hidden"] == list(range(64))
    assert found["kept"]["heads"] == [[0, 1, 2, 3]] * 2
    for place, layer in enumerate(found["kept"]["layers"]):
        best = expected.intermediate[layer].topk(96).indices.tolist()
        assert found["kept"]["intermediate"][place] == sorted(best)
    scores = load_file(settings["output"] / IMPORTANCE)
    assert scores.keys() == vars(expected).keys()
    assert all(torch.equal(scores[axis], values) for axis, values in vars(expected).items())
    assert found["calibration"] == {"sequences": 8, "tokens": 8 * SEQUENCE}
    assert found["teacher"] == {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
        "parameters": 213_568,
    }
    # per layer 2 x 64² (q, o) + 2 x 64 x 32 (k, v) + 3 x 64 x 96 + 2 x 64 (norms); embeddings and head; norm
    assert found["student"]["parameters"] == 2 * (2 * 64**2 + 2 * 64 * 32 + 3 * 64 * 96 + 128) + 2 * 512 * 64 + 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cutting_nothing_writes_the_teachers_weights_in_their_dtype(
    dtype: torch.dtype, settings: dict, teacher: Path, tmp_path: Path
) -> None:
    settings["teacher"] = write_teacher(make_model("llama").to(dtype), tmp_path / "teacher", teacher)
    record = prune.run(PruneConfig(**settings))
    expected = load_file(settings["teacher"] / "model.safetensors")
    found = load_file(settings["output"] / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(weight.dtype == dtype and torch.equal(weight, expected[name]) for name, weight in found.items())
    assert record["metrics"]["parameters_ratio"] == 1
    assert record["metrics"]["calibration_tokens"] == 0


def test_a_cut_keeps_the_stored_dtype_and_is_ranked_in_fp32_on_a_cpu(
    settings: dict, teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    settings["teacher"] = write_teacher(make_model("llama").bfloat16(), tmp_path / "teacher", teacher)
    prune.run(PruneConfig(**settings, intermediate_size=40))
    assert {weight.dtype for weight in load_file(settings["output"] / "model.safetensors").values()} == {torch.bfloat16}
    calibration = PackedDataset(dataset / "train", SEQUENCE, 1234)
    expected = measure(LayerReader(settings["teacher"]), calibration, 8, 4).hidden
    assert torch.equal(load_file(settings["output"] / IMPORTANCE)["hidden"], expected)


def test_layers_dropped_by_hand_need_no_calibration(settings: dict, teacher: Path) -> None:
    prune.run(PruneConfig(**settings, drop_layers=[4, 2, 2]))
    found = json.loads((settings["output"] / "pruning.json").read_text())
    assert (found["dropped_layers"], found["kept"]["layers"]) == ([2, 4], [0, 2])
    assert not (settings["output"] / IMPORTANCE).exists()
    expected, student = load_model(teacher), load_model(settings["output"])
    for new, old in ((0, 0), (1, 2)):
        weights = student.model.layers[new].state_dict()
        assert all(
            torch.equal(weights[name], weight) for name, weight in expected.model.layers[old].state_dict().items()
        )


def test_layers_by_hand_and_width_by_score(settings: dict) -> None:
    record = prune.run(PruneConfig(**settings, drop_layers=[1], hidden_size=48))
    found = json.loads((settings["output"] / "pruning.json").read_text())
    assert found["kept"]["layers"] == [1, 2, 3] and len(found["kept"]["hidden"]) == 48
    assert record["metrics"]["calibration_tokens"] == 8 * SEQUENCE


def test_fewer_sequences_than_asked_for_are_recorded(settings: dict, dataset: Path) -> None:
    available = len(PackedDataset(dataset / "train", 256, 1234))
    settings |= {"calibration_sequences": 10_000, "sequence_length": 256, "micro_batch_size": 64}
    record = prune.run(PruneConfig(**settings, intermediate_size=64))
    assert record["metrics"]["calibration_tokens"] == available * 256 < 10_000 * 256


def test_dropping_groups_drops_their_heads(settings: dict) -> None:
    prune.run(PruneConfig(**settings, num_key_value_heads=1))
    found = json.loads((settings["output"] / "pruning.json").read_text())
    assert found["student"]["num_attention_heads"] == 2
    for heads, groups in zip(found["kept"]["heads"], found["kept"]["key_value"], strict=True):
        assert heads == [2 * groups[0], 2 * groups[0] + 1]


def test_a_second_run_returns_at_once(settings: dict) -> None:
    config = PruneConfig(**settings, num_hidden_layers=3)
    first = prune.run(config)
    written = {path: path.stat().st_mtime_ns for path in settings["output"].iterdir()}
    assert prune.run(config) == first
    assert {path: path.stat().st_mtime_ns for path in settings["output"].iterdir()} == written


def test_a_compensated_cut_is_refitted_recorded_and_a_plain_model(settings: dict, teacher: Path) -> None:
    sizes = {"intermediate_size": 72, "num_attention_heads": 2, "drop_layers": [3], "calibration_sequences": 64}
    record = prune.run(PruneConfig(**(settings | sizes), method="compensated"))
    found = json.loads((settings["output"] / "pruning.json").read_text())
    assert (found["method"], found["dropped_layers"]) == ("compensated", [3])
    assert [fit["layer"] for fit in found["fits"]] == found["kept"]["layers"] == [0, 1, 3]
    assert all(
        fit[name]["error"] <= fit[name]["plain_error"] for fit in found["fits"] for name in ("o_proj", "down_proj")
    )
    assert record["metrics"]["calibration_tokens"] == 64 * SEQUENCE
    student, report = AutoModelForCausalLM.from_pretrained(settings["output"], output_loading_info=True)
    assert not any(report.values()), report
    for place, (fit, kept) in enumerate(zip(found["fits"], found["kept"]["intermediate"], strict=True)):
        new, old = student.model.layers[place].mlp, load_model(teacher).model.layers[fit["layer"]].mlp
        assert torch.equal(new.up_proj.weight, old.up_proj.weight[kept])
        is_refitted = fit["down_proj"]["ridge"] is not None
        assert torch.equal(new.down_proj.weight, old.down_proj.weight[:, kept]) is not is_refitted
    assert any(fit["down_proj"]["ridge"] is not None for fit in found["fits"])


def test_hidden_channels_of_a_compensated_cut_are_components_and_no_list(settings: dict) -> None:
    """So pruning.json, handed in as the lists to keep, says nothing of channels."""
    cut = {"method": "compensated", "hidden_size": 48}
    record = prune.run(PruneConfig(**settings, **cut))
    found = json.loads((settings["output"] / "pruning.json").read_text())
    assert found["kept"]["hidden"] is None and found["student"]["hidden_size"] == 48
    assert record["metrics"]["explained_energy"] == round(found["explained_energy"], 4)
    assert 48 / 64 < found["explained_energy"] < 1
    kept = parse.read_kept(settings["output"] / "pruning.json")
    assert kept and kept.hidden is None and kept.layers == [0, 1, 2, 3]
    assert not (settings["output"] / IMPORTANCE).exists(), "no scores were needed"


def test_the_report_has_no_chart_of_hidden_channels_that_are_components(settings: dict) -> None:
    cut = {"method": "compensated", "hidden_size": 48, "num_hidden_layers": 3}
    prune.run(PruneConfig(**settings, **cut))
    found = json.loads((settings["output"] / "pruning.json").read_text())
    scores = {axis: scores.tolist() for axis, scores in load_file(settings["output"] / IMPORTANCE).items()}
    titles = [figure["title"] for figure in draw_importance(found | {"scores": scores})]
    assert titles and not any("idden" in title for title in titles)


@pytest.mark.parametrize("method", ["minitron", "compensated"])
def test_layers_go_by_loss_in_both_methods(method: str, settings: dict) -> None:
    """An engine that cannot measure it is not asked; the order and the losses stand in pruning.json."""
    settings |= {"engine": "nemo", "layers_by": "loss", "num_hidden_layers": 2}
    record = prune.run(PruneConfig(**settings, method=method))
    found = json.loads((settings["output"] / "pruning.json").read_text())
    assert sorted(drop["layer"] + 1 for drop in found["drops"]) == found["dropped_layers"]
    assert len(found["kept"]["layers"]) == 2 and all(0 < drop["loss"] < 10 for drop in found["drops"])
    assert record["metrics"]["calibration_tokens"] == 8 * SEQUENCE
    assert not (settings["output"] / IMPORTANCE).exists(), "no scores were needed"
    assert bool(found["fits"]) is (method == "compensated")


def test_layers_that_are_dropped_by_hand_are_compensated_without_importance(settings: dict) -> None:
    record = prune.run(PruneConfig(**settings, drop_layers=[2, 3], method="compensated"))
    found = json.loads((settings["output"] / "pruning.json").read_text())
    assert [fit["layer"] for fit in found["fits"]] == [0, 3]
    assert not (settings["output"] / IMPORTANCE).exists()
    assert record["metrics"]["calibration_tokens"] == 8 * SEQUENCE


# ---- scores


@pytest.fixture
def measured(settings: dict, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of sequences that were run forward for scores, in this test."""
    passes: list[int] = []

    def measure_and_count(*arguments: Any) -> Importance:
        passes.append(arguments[2])
        return measure_importance(*arguments)

    monkeypatch.setattr(pruning, "measure_importance", measure_and_count)
    return passes


def test_a_second_cut_of_a_workspace_measures_nothing(settings: dict, measured: list[int], tmp_path: Path) -> None:
    lone = prune.run(PruneConfig(**settings, hidden_size=48, num_hidden_layers=3))
    expected = load_file(settings["output"] / "model.safetensors")
    workspace = settings | {"workspace": tmp_path / "ws", "output": tmp_path / "other"}
    prune.run(PruneConfig(**workspace, intermediate_size=64))
    assert measured == [8, 8]
    record = prune.run(PruneConfig(**workspace, hidden_size=48, num_hidden_layers=3))
    assert measured == [8, 8] and record["output_sha256"] == lone["output_sha256"]
    found = load_file(tmp_path / "other" / "model.safetensors")
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
    for change in ({"seed": 1}, {"calibration_sequences": 7}, {"sequence_length": 16}):
        prune.run(PruneConfig(**workspace | change, intermediate_size=64))
    assert measured == [8, 8, 8, 7, 8], "another calibration has other scores"
    prune.run(PruneConfig(**workspace, intermediate_size=64, caching=False))
    assert len(measured) == 6, "without caching everything is made anew"


@pytest.mark.parametrize("workspace", ["ws", "gs://bucket/ws"])
def test_layers_that_were_chosen_by_loss_are_not_chosen_again(
    workspace: str, settings: dict, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    choose = Mock(side_effect=pruning.drop_layers_by_loss)
    monkeypatch.setattr(pruning, "drop_layers_by_loss", choose)

    def drop(layers: int, **change: Any) -> list[dict]:
        output = tmp_path / f"{layers} of {len(choose.mock_calls)}"
        values = settings | {"workspace": workspace, "output": output, "layers_by": "loss", "num_hidden_layers": layers}
        record = prune.run(PruneConfig(**values | change))
        found = references.follow_reference(output)
        assert record["metrics"]["calibration_tokens"] == 8 * SEQUENCE
        return json.loads((found / "pruning.json").read_text())["drops"]

    two = drop(2)
    assert drop(3) == two[:1] and drop(2, intermediate_size=64) == two and len(choose.mock_calls) == 1
    assert drop(1)[:2] == two and choose.mock_calls[-1].args[-1].drops == [Drop(**each) for each in two]
    assert len(drop(1, method="compensated")) == 3 == len(choose.mock_calls)


def test_a_choice_of_layers_that_was_killed_goes_on(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drop_one(*arguments: Any) -> Iterator[LayerOrder]:
        yield next(drop_layers_by_loss(*arguments))
        raise KeyboardInterrupt

    values = {"workspace": tmp_path / "ws", "layers_by": "loss", "num_hidden_layers": 2}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pruning, "drop_layers_by_loss", drop_one)
        prune.run(PruneConfig(**settings | values))
    (path,) = (tmp_path / "ws" / "scores").glob("*.json")
    (first,) = json.loads(path.read_text())["drops"]
    choose = Mock(side_effect=drop_layers_by_loss)
    monkeypatch.setattr(pruning, "drop_layers_by_loss", choose)
    prune.run(PruneConfig(**settings | values))
    assert choose.mock_calls[0].args[-1].drops == [Drop(**first)]
    found = json.loads((settings["output"] / "pruning.json").read_text())["drops"]
    assert found == json.loads(path.read_text())["drops"] and found[0] == first and len(found) == 2


def test_a_cut_that_failed_has_left_its_scores(
    settings: dict, measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = PruneConfig(**settings, workspace=tmp_path / "ws", intermediate_size=64)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pruning, "choose_plan", Mock(side_effect=KeyboardInterrupt))
        prune.run(config)
    prune.run(config)
    assert measured == [8]
    (scores,) = (tmp_path / "ws" / "scores").iterdir()
    scores.write_bytes(scores.read_bytes()[:-100])
    prune.run(config.model_copy(update={"intermediate_size": 72}))
    assert measured == [8, 8] and f"warning: prune: {scores}: scores cannot be read" in capsys.readouterr().err
    prune.run(config.model_copy(update={"intermediate_size": 80}))
    assert measured == [8, 8]


def test_a_second_cut_finds_the_scores_in_a_bucket(
    settings: dict, measured: list[int], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PruneConfig(**settings, workspace="gs://bucket/ws", intermediate_size=64)
    prune.run(config)
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "another machine"))
    prune.run(config.model_copy(update={"intermediate_size": 72}))
    (name,) = [item.address for item in cleanup.list_items("gs://bucket/ws") if item.kind == "scores of prune"]
    prune.run(PruneConfig(**settings | {"output": tmp_path / "third"}, importance=name, intermediate_size=80))
    assert measured == [8]
    (item,) = [item for item in cleanup.list_items(tmp_path / "another machine") if item.kind == "scores of prune"]
    assert Path(name).name == Path(item.address).name and cleanup.delete_item(item)
    assert not Path(item.address).exists()


def test_scores_are_given_by_hand_and_must_be_of_the_same_calibration(
    settings: dict, measured: list[int], teacher: Path, tmp_path: Path
) -> None:
    first, again = settings["output"], settings | {"output": tmp_path / "again", "intermediate_size": 64}
    prune.run(PruneConfig(**settings, hidden_size=48))
    key = prune.run(PruneConfig(**again))["key"]
    assert measured == [8, 8]
    for number, address in enumerate((first, first / IMPORTANCE)):
        record = prune.run(PruneConfig(**again | {"output": tmp_path / str(number), "importance": address}))
        assert record["key"] == key and record["inputs"]["importance"]["address"] == str(address)
    assert measured == [8, 8]
    other = write_teacher(make_model("llama"), tmp_path / "teacher", teacher)
    again |= {"output": tmp_path / "none" / "pruned", "importance": first}
    for change, difference in (
        ({"teacher": other}, f"is of teacher {content_hash(teacher)[:12]} instead of {content_hash(other)[:12]}; giv"),
        ({"calibration_sequences": 4, "seed": 3}, "is of seed 1234 instead of 3, calibration_sequences 8 instead of 4"),
        ({"importance": teacher}, "has no scores/importance.safetensors; give a directory that prune wrote"),
        ({"importance": teacher / "model.safetensors"}, "not a file of scores that prune wrote; give the scores of th"),
    ):
        with pytest.raises(ConfigError, match=f"prune.importance: .*{difference}"):
            prune.run(PruneConfig(**again | change))
        at_plan = "".join(fault.text for fault in find_importance_faults(PruneConfig(**again | change)))
        assert bool(re.search(difference, at_plan)) is ("teacher" not in change), "a plan knows the settings alone"
    record = json.loads((first / "stage.json").read_text())
    references.write_reference(tmp_path / "refers", references.make_reference(first, record), record)
    again |= {"importance": tmp_path / "refers"}
    assert not list(find_importance_faults(PruneConfig(**again))), "the stage follows it"
    assert prune.run(PruneConfig(**again | {"output": tmp_path / "referred"}))["key"] == key
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((first / IMPORTANCE).read_bytes()[:-100])
    with pytest.raises(RunError, match=r"damaged.safetensors: scores cannot be read \(.*\); give another file, or del"):
        prune.run(PruneConfig(**again | {"importance": damaged}))
    assert measured == [8, 8] and not (tmp_path / "none").exists()


def test_scores_are_no_weights_and_stay_with_the_student(settings: dict, teacher: Path, tmp_path: Path) -> None:
    prune.run(PruneConfig(**settings, intermediate_size=64))
    assert read_headers(settings["output"]).keys() == read_headers(teacher).keys()
    copy_model(settings["output"], tmp_path / "copy")
    save_derived_model(load_model(settings["output"]), tmp_path / "trained", settings["output"])
    for model in ("copy", "trained"):
        assert not (tmp_path / model / IMPORTANCE).exists()
        assert not any(AutoModelForCausalLM.from_pretrained(tmp_path / model, output_loading_info=True)[1].values())


# ---- lists of what to keep


def write_lists(directory: Path, lists: Any) -> Path:
    path = directory / "keep.yaml"
    path.write_text(lists if isinstance(lists, str) else yaml.safe_dump(lists))
    return path


def read_kept(student: Path) -> dict[str, Any]:
    return json.loads((student / "pruning.json").read_text())["kept"]


LISTS = {
    "layers": [3, 0],
    "hidden": [*range(63, 7, -1)],
    "intermediate": [[*range(0, 128, 2)], [*range(64)]],
    "heads": [[1, 3], [0, 2]],
}


def test_what_to_keep_is_listed_and_needs_no_calibration(
    settings: dict, measured: list[int], teacher: Path, tmp_path: Path
) -> None:
    record = prune.run(PruneConfig(**settings, keep=write_lists(tmp_path, LISTS), engine="nemo"))
    plan = Plan([0, 3], [*range(8, 64)], LISTS["intermediate"], LISTS["heads"], [[0, 1], [0, 1]])
    assert read_kept(settings["output"]) == vars(plan) and record["config"]["engine"] == "hf"
    expected = dict(cut(load_model(teacher), plan, tmp_path).named_parameters())
    found = load_file(settings["output"] / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
    assert not measured and record["metrics"]["calibration_tokens"] == 0
    again = PruneConfig(**settings | {"output": tmp_path / "again"}, keep=settings["output"] / "pruning.json")
    assert prune.run(again)["key"] != record["key"], "the content of the file is part of the key"
    assert read_kept(tmp_path / "again") == vars(plan)


@pytest.mark.parametrize("method", ["minitron", "compensated"])
def test_axes_that_are_not_listed_are_chosen(method: str, settings: dict, measured: list[int], tmp_path: Path) -> None:
    settings |= {"calibration_sequences": 64, "method": method, "drop_layers": [2]}
    lists = {"intermediate": LISTS["intermediate"] + [[*range(64, 128)]], "key_value": [[1], [0], [1]]}
    settings["keep"] = write_lists(tmp_path, lists)
    prune.run(PruneConfig(**settings, num_attention_heads=1))
    kept = read_kept(settings["output"])
    assert {axis: kept[axis] for axis in lists} == lists and kept["layers"] == [0, 2, 3]
    assert [head // 2 for [head] in kept["heads"]] == [1, 0, 1]
    prune.run(PruneConfig(**settings | {"output": tmp_path / "whole groups"}))
    assert read_kept(tmp_path / "whole groups")["heads"] == [[2, 3], [0, 1], [2, 3]]
    assert measured == ([64] if method == "minitron" else []), "a compensated cut chooses without scores"


@pytest.mark.parametrize(
    ("lists", "sizes", "message"),
    [
        ({"layrs": [0]}, {}, r"prune.keep.layrs: unknown key; did you mean 'layers'\?"),
        ({"layers": [0, 4]}, {}, "prune.keep.layers: 4 is none of the teacher's 4; count from 0 to 3"),
        ({"heads": [[0, 2]] * 3 + [[0, 7]]}, {}, "prune.keep.heads: 7 is none of the teacher's 4; count from 0 to 3"),
        ({"hidden": [0, -1]}, {}, r"prune.keep.hidden.1: Input should be greater than or equal to 0 \(found -1\)"),
        ({"hidden": []}, {}, r"prune.keep.hidden: List should have at least 1 item after validation, not 0 \(found"),
        ({"hidden": [True]}, {}, "prune.keep.hidden: found true .*; give a number"),
        ({"layers": [2, 0, 2]}, {}, "prune.keep.layers: 2 is listed twice; remove one"),
        ({"intermediate": [[0], [1], [5, 5], [1]]}, {}, "prune.keep.intermediate: 5 is listed twice in list 3"),
        ({"intermediate": [[0, 1], [1]]}, {}, "prune.keep.intermediate: list 2 has 1 entries, but list 1 has 2; keep"),
        ({"layers": [0], "intermediate": [[0], [1]]}, {}, "prune.keep.intermediate: 2 lists for 1 layers; give one p"),
        ({"intermediate": [[0], [1]]}, {}, "prune.keep.intermediate: 2 lists for 4 layers; give one per kept layer"),
        (
            {"intermediate": [[0]] * 2},
            {"num_hidden_layers": 2},
            "prune.keep.intermediate: its layers are not chosen ye",
        ),
        (
            {"heads": [[0, 2]] * 3 + [[0, 1]]},
            {},
            "prune.keep.heads: list 4 has 2 in group 0, 0 in group 1, of the kept",
        ),
        ({"heads": [[0]] * 4, "key_value": [[1]] * 4}, {}, r"list 1 has 1 in group 0, 0 in group 1, of .* \[1\]; keep"),
        ({"hidden": [0, 1]}, {"hidden_size": 8}, "prune.hidden_size: 8, but prune.keep lists 2; leave hidden_size out"),
        ({"hidden": [0, 1]}, {}, "prune.hidden_size: 2 is not a multiple of 8"),
        ({"layers": [0]}, {"drop_layers": [2]}, "prune.drop_layers: prune.keep lists layers, too; choose one of them"),
        ("layers: [0", {}, "keep.yaml: not YAML"),
        ("[0]", {}, r"prune.keep: Input should be .* \(found \[0\]\)"),
    ],
)
def test_lists_that_do_not_fit_are_refused(
    lists: Any, sizes: dict, message: str, settings: dict, teacher: Path, tmp_path: Path
) -> None:
    config = PruneConfig(**settings, **sizes, keep=write_lists(tmp_path, lists))
    architecture = json.loads((teacher / "config.json").read_text())
    faults = "; ".join(f"{fault.key}: {fault.text}" for fault in find_size_faults(config, architecture))
    assert re.search(message, faults), faults
    with pytest.raises(ConfigError, match=message):
        prune.run(config)
    assert not list(settings["output"].parent.iterdir())


# ---- bad input


def test_a_compensated_cut_needs_tokens_and_is_made_by_engine_hf(settings: dict) -> None:
    settings |= {"calibration_sequences": 4, "method": "compensated", "intermediate_size": 64}
    with pytest.raises(ConfigError, match=r"calibration_sequences: 4 sequences of 32 .* 128 columns; give at least 5"):
        prune.run(PruneConfig(**settings))
    assert not list(settings["output"].parent.iterdir())
    assert PruneConfig(**settings, engine="nemo").engine == "hf"


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ({"hidden_size": 72}, r"prune.hidden_size: 72 is larger than the teacher's 64; choose at most 64"),
        ({"intermediate_size": 129}, r"prune.intermediate_size: 129 is larger than the teacher's 128"),
        ({"num_attention_heads": 5}, r"prune.num_attention_heads: 5 is larger than the teacher's 4"),
        ({"num_key_value_heads": 4}, r"prune.num_key_value_heads: 4 is larger than the teacher's 2"),
        ({"num_hidden_layers": 5}, r"prune.num_hidden_layers: 5 is larger than the teacher's 4"),
        ({"hidden_size": 60}, r"prune.hidden_size: 60 is not a multiple of 8, .*; choose 56"),
        ({"num_attention_heads": 3}, r"prune.num_attention_heads: 3 is not a multiple of num_key_value_heads 2"),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 1},
            r"prune.num_attention_heads: 4 heads in 1 groups are 4 per group, but the teacher has 2; choose at most 2",
        ),
        ({"drop_layers": [5, 1]}, r"prune.drop_layers: the teacher has no layers \[5\]; choose from 1 to 4"),
        ({"drop_layers": [1, 2, 3, 4]}, r"prune.drop_layers: drops all 4 layers of the teacher; keep at least one"),
        ({"sequence_length": 257}, r"prune.sequence_length: 257 is above .*max_position_embeddings 256"),
        (
            {"sequence_length": 256, "seed": 1, "dataset": "empty"},
            r"no manifest.json; give a directory that prepare wrote",
        ),
        (
            {"method": "compensated", "intermediate_size": 64, "calibration_sequences": 4},
            r"prune.calibration_sequences: 4 sequences of 32 tokens are too few to refit matrices of 128 columns; give "
            r"at least 5, with a corpus that has as many, or set method to minitron",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(cuts: dict, message: str, settings: dict, tmp_path: Path) -> None:
    if cuts.get("dataset") == "empty":
        cuts = cuts | {"dataset": tmp_path / "empty"}
        (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        prune.run(PruneConfig(**(settings | cuts)))
    assert not list(settings["output"].parent.iterdir())


def test_a_llama_that_transformers_would_not_load_is_refused(settings: dict, teacher: Path, tmp_path: Path) -> None:
    settings["teacher"] = write_teacher(make_model("llama"), tmp_path / "llama", teacher)
    with pytest.raises(
        ConfigError, match=r"prune.hidden_size: 64 is not a multiple of num_attention_heads 12, .*choose 48"
    ):
        prune.run(PruneConfig(**settings, num_attention_heads=12))
    settings["teacher"] = write_teacher(make_model("qwen3"), tmp_path / "qwen3", teacher)
    prune.run(PruneConfig(**settings, num_attention_heads=12))
    assert AutoModelForCausalLM.from_pretrained(settings["output"]).config.num_attention_heads == 12


def copy_of(teacher: Path, directory: Path) -> Path:
    return Path(shutil.copytree(teacher, directory))


def test_an_unsupported_architecture_is_refused(settings: dict, teacher: Path, tmp_path: Path) -> None:
    settings["teacher"] = copy_of(teacher, tmp_path / "bert")
    path = settings["teacher"] / "config.json"
    path.write_text(path.read_text().replace("LlamaForCausalLM", "BertModel"))
    with pytest.raises(ConfigError, match="architecture BertModel is not supported; use one of LlamaForCausalLM"):
        prune.run(PruneConfig(**settings, intermediate_size=64))
    assert not list(settings["output"].parent.iterdir())


def test_another_tokenizer_is_refused(settings: dict, teacher: Path, tmp_path: Path) -> None:
    settings["teacher"] = copy_of(teacher, tmp_path / "other")
    path = settings["teacher"] / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ConfigError, match="prepare the corpus again with this model as teacher"):
        prune.run(PruneConfig(**settings, intermediate_size=64))


@pytest.mark.parametrize("file", ["model.safetensors", "model-00002-of-00003.safetensors"])
def test_a_damaged_shard_leaves_nothing_behind(settings: dict, teacher: Path, tmp_path: Path, file: str) -> None:
    settings["teacher"] = copy_of(teacher, tmp_path / "damaged")
    if "of" in file:
        shard(settings["teacher"], files=3)
    path = settings["teacher"] / file
    path.write_bytes(path.read_bytes()[:-1000])
    for cuts in ({"intermediate_size": 64}, {"drop_layers": [1]}):
        with pytest.raises(RunError, match="weights cannot be read"):
            prune.run(PruneConfig(**settings, **cuts))
        assert not list(settings["output"].parent.iterdir())


def test_a_model_of_many_shards_is_read_and_written(
    settings: dict, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = {"hidden_size": 48, "num_hidden_layers": 3}
    prune.run(PruneConfig(**settings, **cuts))
    expected = load_file(settings["output"] / "model.safetensors")
    settings |= {"teacher": copy_of(teacher, tmp_path / "sharded"), "output": tmp_path / "work" / "sharded"}
    shard(settings["teacher"], files=3)
    monkeypatch.setattr("minitron.models.pruning.layers.SHARD_BYTES", 100_000)  # the embedding has 98 304
    prune.run(PruneConfig(**settings, **cuts))
    index = json.loads((settings["output"] / INDEX).read_text())
    shards = sorted(path.name for path in settings["output"].glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors" and len(shards) > 3
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in expected.values())
    assert all((settings["output"] / name).stat().st_size < 102_000 for name in shards)
    found = load_model(settings["output"]).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


@pytest.mark.parametrize("method", ["minitron", "compensated"])
def test_a_student_that_the_disk_cannot_hold_is_refused_before_any_work(
    method: str, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = shutil.disk_usage("/")._replace(free=300_000)
    monkeypatch.setattr("minitron.storage.files.shutil.disk_usage", lambda _: small)
    monkeypatch.setattr(pruning, "measure_importance", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(RunError, match=r"the result takes 1 MB, but the disk has 0 MB free; free some space"):
        prune.run(PruneConfig(**settings, intermediate_size=120, method=method))
    assert not list(settings["output"].parent.iterdir())


def test_a_cut_that_fails_after_its_first_shards_leaves_nothing_behind(
    settings: dict, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(teacher)
    model.model.layers[2].mlp.up_proj.weight.data[7] = 3e38
    settings["teacher"] = write_teacher(model, tmp_path / "nan", teacher)
    monkeypatch.setattr("minitron.models.pruning.layers.SHARD_BYTES", 1)
    with pytest.raises(RunError, match="compensated cut of layer 3: activations are not finite"):
        prune.run(PruneConfig(**settings, drop_layers=[4], method="compensated"))
    assert not list(settings["output"].parent.iterdir())


def test_activations_that_are_not_numbers_are_refused(settings: dict, teacher: Path, tmp_path: Path) -> None:
    model = load_model(teacher)
    model.model.layers[1].mlp.up_proj.weight.data[7] = 3e38  # a number; its products are none
    settings["teacher"] = write_teacher(model, tmp_path / "nan", teacher)
    with pytest.raises(RunError, match=r"importance of .* scores are not finite"):
        prune.run(PruneConfig(**settings, intermediate_size=64))
    assert not list(settings["output"].parent.iterdir())


def test_the_command_line_refuses_with_one_line_and_status_2(settings: dict, tmp_path: Path) -> None:
    file = tmp_path / "prune.yaml"
    values = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    file.write_text(yaml.safe_dump(values | {"hidden_size": 4096}))
    finished = forks.run_python("-m", "minitron.prune", "--config", str(file))
    assert finished.returncode == 2
    assert finished.stderr == "error: prune.hidden_size: 4096 is larger than the teacher's 64; choose at most 64\n"
