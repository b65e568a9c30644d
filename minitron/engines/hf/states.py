"""The outputs of chosen decoder layers, read while a model runs. B = batch, S = sequence, H = hidden size."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor


class LayerOutputs:
    """The outputs of some layers of a model in the latest forward pass that was read."""

    def __init__(self, model: Any, layers: Iterable[int]) -> None:
        """Listen to the layers, which count from 1."""
        self._states: dict[int, Tensor] = {}
        self._is_reading = False
        for layer in set(layers):
            model.model.layers[layer - 1].register_forward_hook(partial(self._keep, layer))

    @contextmanager
    def reading(self) -> Iterator[dict[int, Tensor]]:
        """Yield the outputs by layer, [B · S, H], of the forward pass in the context.

        Outside of it nothing is kept: activation checkpointing computes the layers again in the backward pass.
        """
        self._is_reading = True
        try:
            yield self._states
        finally:
            self._is_reading, self._states = False, {}

    def _keep(self, layer: int, module: Any, arguments: Any, output: Tensor) -> None:
        if self._is_reading:
            self._states[layer] = output.flatten(0, 1)
