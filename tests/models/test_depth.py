"""Layers that go by loss, against brute force on models of transformers, on tiny ones of every architecture."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import ModuleList
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from minitron.errors import RunError
from minitron.models.pruning import depth
from minitron.models.pruning.depth import drop_layers_by_loss
from minitron.models.pruning.surgery import Drop
from tests.stages.test_prune import ARCHITECTURES, make_model, open_layers, token_ids

FITTED, MEASURED = token_ids(20), token_ids(23)[20:]


def drop(model: PreTrainedModel, count: int, directory: Path, refit: bool, micro_batch_size: int = 6) -> list[Drop]:
    teacher, where = open_layers(model, directory), (torch.float32, torch.device("cpu"))
    *_, order = drop_layers_by_loss(teacher, count, FITTED, MEASURED, micro_batch_size, *where, refit)
    return order.drops


@torch.no_grad()
def measure_loss(model: PreTrainedModel) -> float:
    logits = model(MEASURED, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), MEASURED[:, 1:].flatten()).item()


@torch.no_grad()
def read_states(model: PreTrainedModel, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the inputs of down_proj of every layer, and the states after every layer, in float64."""
    inputs, states = [], []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _module, given: inputs.append(given[0].double()))
        layer.register_forward_hook(lambda _module, _given, state: states.append(state.double()))
    model.model(ids, use_cache=False)
    return inputs, states


def remove(model: PreTrainedModel, layer: int) -> PreTrainedModel:
    """Return a copy without a layer; every other one keeps its kind of attention."""
    student = copy.deepcopy(model)
    student.model.layers = ModuleList([each for index, each in enumerate(student.model.layers) if index != layer])
    student.config.num_hidden_layers -= 1
    if getattr(student.config, "layer_types", None):
        del student.config.layer_types[layer]
    return student


@torch.no_grad()
def refit_seam(model: PreTrainedModel, layer: int) -> PreTrainedModel:
    """Return a copy without a layer, with the seam refitted by normal equations over all tokens at once."""
    inputs, states = read_states(copy.deepcopy(model), FITTED)
    down_proj = model.model.layers[layer - 1].mlp.down_proj
    weight = states[layer].square().mean(dim=-1, keepdim=True).rsqrt()
    middle = states[layer - 1] - inputs[layer - 1] @ down_proj.weight.double().T
    ours, target = ((values * weight).flatten(0, 1) for values in (inputs[layer - 1], states[layer] - middle))
    ridge = depth.SEAM_RIDGE * (ours.T @ ours).diagonal().mean() * torch.eye(ours.shape[1], dtype=torch.float64)
    fitted = torch.linalg.solve(ours.T @ ours + ridge, ours.T @ target + ridge @ down_proj.weight.double().T)
    student = remove(model, layer)
    student.model.layers[layer - 1].mlp.down_proj.weight.copy_(fitted.T)
    return student


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_layer_that_costs_the_least_loss_goes_first(
    architecture: str, refit: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depth, "FITTED", 100)  # all sequences are fitted, as by brute force
    model, without = make_model(architecture), refit_seam if refit else remove
    losses = {layer: measure_loss(without(model, layer)) for layer in (1, 2, 3)}
    best = min(losses, key=losses.__getitem__)
    (found,) = drop(model, 1, tmp_path, refit)
    assert found.layer == best
    assert found.loss == pytest.approx(losses[best], abs=1e-5)


@pytest.mark.parametrize("refit", [False, True])
def test_each_layer_is_measured_in_what_the_ones_before_it_left(
    refit: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain losses are brute force's. With a refit, no order of micro-batches or of threads matters."""
    monkeypatch.setattr(depth, "RETRIED", 1)
    model = make_model("llama")
    drops = drop(model, 3, tmp_path / "whole", refit, micro_batch_size=20)
    assert sorted(each.layer for each in drops) == [1, 2, 3], "the first layer stays"
    again = drop(model, 3, tmp_path / "parts", refit, micro_batch_size=3)
    assert [each.layer for each in again] == [each.layer for each in drops]
    assert [each.loss for each in again] == pytest.approx([each.loss for each in drops], abs=1e-4)
    teacher, where = open_layers(model, tmp_path / "begun"), (torch.float32, torch.device("cpu"))
    for size in (1, 2):
        *_, begun = drop_layers_by_loss(teacher, size, FITTED, MEASURED, 20, *where, refit)
        *_, order = drop_layers_by_loss(teacher, 3, FITTED, MEASURED, 20, *where, refit, begun)
        assert order.drops == drops, "an order that goes on is the same to the last bit"
    if not refit:
        student = model
        for place, each in enumerate(drops):
            student = remove(student, each.layer - sum(before.layer < each.layer for before in drops[:place]))
            assert each.loss == pytest.approx(measure_loss(student), abs=1e-5)


def test_a_model_that_overflows_is_named(tmp_path: Path) -> None:
    model = make_model("llama")
    model.model.layers[2].mlp.down_proj.weight.data[:] = 3e38
    with pytest.raises(RunError, match=r"without layer 2 the loss is (nan|inf): the model overflows"):
        drop(model, 1, tmp_path, refit=False)
