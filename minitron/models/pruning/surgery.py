"""Surgery: choose what to keep by importance, and write the smaller model from the rows and columns kept.

Used by `python -m minitron.prune --config FILE`.

H = hidden, I = intermediate, A = query heads, G = key-value groups, D = head_dim, V = vocabulary.
"""

import copy
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from minitron.config.shapes import PRUNED_AXES
from minitron.errors import ConfigError
from minitron.models.checkpoint import finish_derived_model
from minitron.models.checks import EMBEDDING, HEAD
from minitron.models.pruning.importance import Importance
from minitron.models.pruning.layers import NORM, LayerReader, ShardWriter, get_head_dim, name_weight
from minitron.storage.layout import PRUNING

DIMENSIONS = {
    "embed_tokens": (None, "hidden"),
    "lm_head": (None, "hidden"),
    "q_proj": ("heads", "hidden"),
    "k_proj": ("key_value", "hidden"),
    "v_proj": ("key_value", "hidden"),
    "o_proj": ("hidden", "heads"),
    "gate_proj": ("intermediate", "hidden"),
    "up_proj": ("intermediate", "hidden"),
    "down_proj": ("hidden", "intermediate"),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "norm": ("hidden",),
    "q_norm": (None,),
    "k_norm": (None,),
}
"""The axis of each dimension of a module's weight, None if it is never cut; a bias has the first."""


@dataclass(frozen=True)
class Shape:
    """The sizes that pruning changes, under the names they have in config.json."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int

    @classmethod
    def from_config(cls, config: Any) -> "Shape":
        """Read the sizes of a transformers config."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class Plan:
    """The indices to keep of the teacher, counted from 0; they ascend, so that order is preserved.

    Attributes:
        layers: kept layers.
        hidden: kept channels of the residual stream.
        intermediate: kept MLP channels of each kept layer.
        heads: kept query heads of each kept layer, equally many from each kept group.
        key_value: kept key-value groups of each kept layer.
    """

    layers: list[int]
    hidden: list[int]
    intermediate: list[list[int]]
    heads: list[list[int]]
    key_value: list[list[int]]


Given = Mapping[str, Any]
"""What the user wants to keep, by the name of an axis in `Plan` and in its form; other axes are chosen."""


class Drop(NamedTuple):
    """A layer that went, counted from 0, and the loss without it and those before it, in nats per token."""

    layer: int
    loss: float


class LayerOrder(NamedTuple):
    """The layers that went so far, and of those that are left the last loss without each, by layer."""

    drops: list[Drop]
    losses: dict[int, float]


class Cut(NamedTuple):
    """What an engine cut, and by what.

    Attributes:
        plan: what was kept.
        importance: the scores that it was chosen by; None: nothing was chosen by scores.
        sequences: calibration sequences that were read.
        fits: of a compensated cut the ridges and relative errors of each kept layer that was refitted.
        drops: the layers that went by their loss, in their order.
        explained: the share of the teacher's states that the student's stream holds if it has principal components; the
            plan's hidden channels are only counted then.
    """

    plan: Plan
    importance: Importance | None
    sequences: int
    fits: list[dict[str, Any]]
    drops: list[Drop]
    explained: float | None = None


def choose_plan(importance: Importance, shape: Shape, given: Given | None = None) -> Plan:
    """Choose the best of every axis. Query heads are ranked within their group, so that each group keeps equally many.

    Args:
        importance: the teacher's scores.
        shape: the student's sizes; its query heads per group are at most the teacher's.
        given: axes that are not chosen by scores.
    """
    given = given or {}
    layers = given.get("layers") or _select_best(importance.layers, shape.num_hidden_layers)
    groups = given.get("key_value") or [
        _select_best(importance.key_value[layer], shape.num_key_value_heads) for layer in layers
    ]
    per_group = shape.num_attention_heads // shape.num_key_value_heads
    by_group = importance.heads.unflatten(1, (importance.key_value.shape[1], -1))
    return Plan(
        layers=layers,
        hidden=given.get("hidden") or _select_best(importance.hidden, shape.hidden_size),
        intermediate=given.get("intermediate")
        or [_select_best(importance.intermediate[layer], shape.intermediate_size) for layer in layers],
        heads=given.get("heads")
        or [_select_best_heads(by_group[layer], kept, per_group) for layer, kept in zip(layers, groups, strict=True)],
        key_value=groups,
    )


def is_chosen_by_scores(shape: Shape, teacher: Shape, settled: Collection[str]) -> bool:
    """Say whether scores decide a cut: on an axis that is not settled, less is kept than the teacher has."""
    cut = (axis for axis, size in PRUNED_AXES.items() if getattr(shape, size) < getattr(teacher, size))
    return any(axis not in settled for axis in cut)


def list_changed_matrices(student: Path, names: Iterable[str]) -> set[str]:
    """Return the names of the matrices of a student that prune cut or refitted, by its pruning.json.

    Raises:
        ConfigError: the student has no pruning.json.
    """
    try:
        pruning = json.loads((student / PRUNING).read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(
            f"distill.cut_learning_rate_factor: {student} has no {PRUNING}, so nobody knows what was cut; set it to 1, "
            "or give a student that prune made"
        ) from error
    cut = {axis for axis, size in PRUNED_AXES.items() if pruning["student"][size] != pruning["teacher"][size]}
    refitted = {
        name_weight(pruning["kept"]["layers"].index(fit["layer"]), f"{module}.weight")
        for fit in pruning["fits"]
        for module, part in (("self_attn.o_proj", "o_proj"), ("mlp.down_proj", "down_proj"))
        if fit[part]["ridge"] is not None
    }
    axes = {name: set(DIMENSIONS[name.split(".")[-2]]) for name in names if name.endswith(".weight")}
    return {name for name, its in axes.items() if len(its) > 1 and (name in refitted or its & cut)}


def _select_best(scores: Tensor, count: int) -> list[int]:
    """Return the indices of the highest scores, ascending; of equal scores the first win."""
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


def _select_best_heads(scores: Tensor, groups: list[int], count: int) -> list[int]:
    """Return the `count` best query heads of each kept group; scores are [G, A / G]."""
    return [group * scores.shape[1] + head for group in groups for head in _select_best(scores[group], count)]


def make_student_config(config: Any, plan: Plan) -> Any:
    """Return the teacher's config with the plan's sizes and an explicit head_dim, which no cut changes."""
    student = copy.deepcopy(config)
    student.head_dim = get_head_dim(config)
    student.hidden_size = len(plan.hidden)
    student.intermediate_size = len(plan.intermediate[0])
    student.num_attention_heads = len(plan.heads[0])
    student.num_key_value_heads = len(plan.key_value[0])
    student.num_hidden_layers = len(plan.layers)
    if getattr(config, "layer_types", None):
        student.layer_types = [config.layer_types[layer] for layer in plan.layers]
    if getattr(config, "max_window_layers", None) is not None:  # layers before it have full attention
        student.max_window_layers = sum(layer < config.max_window_layers for layer in plan.layers)
    return student


def count_student_bytes(teacher: LayerReader, shape: Shape) -> int:
    """Return the size of a student's weights on the disk."""
    config = make_student_config(teacher.config, choose_plan(Importance.zeros(teacher.config), shape))
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(config)
    return sum(weight.numel() * teacher.get_dtype(name).itemsize for name, weight in student.named_parameters())


@torch.no_grad()
def cut_model(teacher: LayerReader, plan: Plan, directory: Path) -> None:
    """Write the student that a plan describes to an empty directory, layer by layer, in the teacher's dtypes.

    RMSNorm weights are sliced and not rescaled, as in Model-Optimizer.
    """
    size, writer = get_head_dim(teacher.config), ShardWriter(directory)
    hidden = {"hidden": plan.hidden}
    writer.add(cut_weights([(EMBEDDING, teacher.read_tensor(EMBEDDING))], hidden, size))
    for place, layer in enumerate(plan.layers):
        writer.add(cut_layer(teacher.read_layer(layer), plan, place, size))
    for name in (NORM, *([] if teacher.config.tie_word_embeddings else [HEAD])):
        writer.add(cut_weights([(name, teacher.read_tensor(name))], hidden, size))
    writer.finish()
    finish_student(directory, teacher, plan)


def finish_student(directory: Path, teacher: LayerReader, plan: Plan) -> None:
    """Add the config to a student's weights, and all else as in the teacher."""
    make_student_config(teacher.config, plan).save_pretrained(directory)
    finish_derived_model(directory, teacher.directory)


def cut_layer(weights: dict[str, Tensor], plan: Plan, place: int, size: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the student's layer at a place, by their names in the student.

    Args:
        weights: the teacher's layer, by the names in it; its channels of the stream may have been cut already.
        plan: what to keep.
        place: the layer's place in the student.
        size: channels per head.
    """
    kept = {axis: getattr(plan, axis)[place] for axis in ("intermediate", "heads", "key_value")}
    named = ((name_weight(place, name), weight) for name, weight in weights.items())
    return cut_weights(named, kept | {"hidden": plan.hidden}, size)


def cut_weights(
    weights: Iterable[tuple[str, Tensor]], kept: dict[str, list[int]], size: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield weights with the rows and columns that are kept of some axes; whole ones are not copied.

    Args:
        weights: name and tensor.
        kept: indices by axis; other axes stay whole.
        size: channels per head.
    """
    for name, weight in weights:
        for dimension, axis in enumerate(DIMENSIONS[name.split(".")[-2]][: weight.dim()]):
            if axis in kept:
                index = torch.tensor(kept[axis], device=weight.device)
                if axis in ("heads", "key_value"):
                    index = (index[:, None] * size + torch.arange(size, device=weight.device)).flatten()
                if len(index) < weight.shape[dimension]:
                    weight = weight.index_select(dimension, index)
        yield name, weight
