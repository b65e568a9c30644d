"""Refits of a layer's matrices: process 0 solves them for all, and a layer gets them in its stored precision.

H = hidden size of the teacher, K = of the student, C = input channels, O = output channels.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear

from minitron.models.processes import ask_first, get_rank, send_to_all
from minitron.models.pruning.least_squares import Fit, SplitTokens, fit_columns

Dtypes = dict[str, torch.dtype]
"""The stored dtypes of a layer's weights, by the names in it."""


def fit_output(name: str, layer: Any, dtypes: Dtypes, columns: Tensor, tokens: SplitTokens) -> dict[str, Any]:
    """Fit the columns of a matrix that writes to the stream, and its bias; return the ridge and relative errors."""
    module = layer.get_submodule(name)
    if has_bias := module.bias is not None:
        columns = torch.cat([columns, columns.new_tensor([module.in_features])])
    fit = _fit_for_all(read_matrix(module), columns, tokens)
    store_weight(fit.weight[:, : module.in_features], f"{name}.weight", layer, dtypes)
    if has_bias:
        store_weight(fit.weight[:, -1], f"{name}.bias", layer, dtypes)
    return {"ridge": fit.ridge, "error": round(fit.error**0.5, 4), "plain_error": round(fit.plain_error**0.5, 4)}


def fit_map(present_HK: Tensor, pairs: Iterable[tuple[bool, Tensor, Tensor]]) -> Tensor:
    """Return the map [H, K] from the student's states to the teacher's, drawn towards a present one.

    Args:
        present_HK: the present map.
        pairs: per batch whether it is held out, the student's states [B, S, K], and the teacher's [B, S, H].
    """
    outputs, kept = present_HK.shape
    tokens = SplitTokens(kept, outputs, with_bias=False, device=present_HK.device)
    for held_out, student, teacher in pairs:
        tokens.add(held_out, student, teacher)
    tokens.collect()
    return _fit_for_all(present_HK, torch.arange(kept, device=present_HK.device), tokens).weight


def read_matrix(module: Linear) -> Tensor:
    """Return a matrix [O, C], with the bias as its last column if it has one."""
    weight = module.weight.data
    return weight if module.bias is None else torch.cat([weight, module.bias.data[:, None]], dim=1)


def store_weight(values: Tensor, name: str, layer: Any, dtypes: Dtypes) -> None:
    """Give a layer new weights, with the precision that they are stored in: the computation goes on with that.

    Weights that the layer shares with the teacher's stay what they are.
    """
    layer.get_parameter(name).data = values.to(dtypes[name]).float()


def _fit_for_all(present_OC: Tensor, columns: Tensor, tokens: SplitTokens) -> Fit:
    """Fit some columns of a matrix in process 0, which has all tokens; the others take its fit."""
    if get_rank() == 0:
        fit = fit_columns(present_OC, columns, tokens.fitted, tokens.held_out)
    else:
        fit = Fit(torch.empty_like(present_OC), None, 0.0, 0.0)
    send_to_all(fit.weight, 0)
    return Fit(fit.weight, *ask_first(lambda: (fit.ridge, fit.error, fit.plain_error)))
