"""Surgery: choose what to keep by importance, and build the smaller model from the rows and columns kept.

Used by `python -m minitron.prune --config FILE`.

H = hidden, I = intermediate, A = query heads, G = key-value groups, D = head_dim, V = vocabulary.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minitron.models.pruning.importance import Importance

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

SIZES = dict(
    layers="num_hidden_layers",
    hidden="hidden_size",
    intermediate="intermediate_size",
    heads="num_attention_heads",
    key_value="num_key_value_heads",
)
"""The size in config.json of each axis of a `Plan`."""


class Cut(NamedTuple):
    """What an engine cut, and by what.

    Attributes:
        plan: what was kept.
        importance: the scores that it was chosen by; None: nothing was chosen by scores.
        sequences: calibration sequences that were read.
        fits: of a compensated cut the ridges and relative errors of each kept layer that was refitted.
    """

    plan: Plan
    importance: Importance | None
    sequences: int
    fits: list[dict[str, Any]]


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


def is_chosen_by_scores(shape: Shape, teacher: Shape, given: Given) -> bool:
    """Say whether scores decide a cut: on an axis that is not given, less is kept than the teacher has."""
    return any(getattr(shape, size) < getattr(teacher, size) for axis, size in SIZES.items() if axis not in given)


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


def get_head_dim(config: Any) -> int:
    """Return the channels per attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@torch.no_grad()
def cut_model(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Build the student that a plan describes, in eval mode, with the teacher's dtype and device.

    The teacher is not changed and shares no memory with the student. RMSNorm weights are sliced and not rescaled, as
    in Model-Optimizer.
    """
    config = make_student_config(model.config, plan)
    with torch.device("meta"):  # the weights are assigned next: no memory for random ones
        student = type(model)(config)
    student.load_state_dict(dict(_cut_weights(model, plan)), strict=False, assign=True)
    student.tie_weights()
    student.model.rotary_emb = type(model.model.rotary_emb)(config).to(model.device)
    student.generation_config = copy.deepcopy(model.generation_config)
    return student.eval()


def _cut_weights(model: PreTrainedModel, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """Yield the student's parameters by name; tied ones once."""
    positions = {layer: position for position, layer in enumerate(plan.layers)}
    size = get_head_dim(model.config)
    for name, weight in model.named_parameters():
        path = name.split(".")
        axes = DIMENSIONS[path[-2]][: weight.dim()]
        position = None
        if path[1] == "layers":
            position = positions.get(int(path[2]))
            if position is None:
                continue
            path[2] = str(position)
        yield ".".join(path), _cut_weight(weight, axes, plan, position, size)


def _cut_weight(weight: Tensor, axes: tuple[str | None, ...], plan: Plan, position: int | None, size: int) -> Tensor:
    """Copy the kept rows and columns of one weight; `position` is its layer in the student, `size` head_dim."""
    selected = weight.detach()
    for dimension, axis in enumerate(axes):
        if axis is not None:
            index = torch.tensor(
                plan.hidden if axis == "hidden" else getattr(plan, axis)[position], device=weight.device
            )
            if axis in ("heads", "key_value"):
                index = (index[:, None] * size + torch.arange(size, device=weight.device)).flatten()
            selected = selected.index_select(dimension, index)
    return selected.clone() if selected.data_ptr() == weight.data_ptr() else selected
