"""A model on disk, layer by layer: a teacher is read one layer at a time, a student is written shard by shard.

So memory has one layer, and not the model. Weights that are read are mapped files: they count as resident as long as a
tensor refers to them.

B = batch, S = sequence, H = hidden size, V = vocabulary.
"""

import copy
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Identity, Module, Parameter
from transformers import AutoModelForCausalLM

from minitron.errors import RunError
from minitron.models.checks import (
    EMBEDDING,
    FLOATS,
    INDEX,
    WEIGHTS,
    check_architecture,
    check_weights,
    read_config,
    read_headers,
)

NORM = "model.norm.weight"

SHARD_BYTES = 5 * 10**8
"""A shard is written before it would be larger; a single tensor may be."""

Call = dict[str, Any]
"""The keyword arguments of a layer's call: its mask and positions."""


class LayerReader:
    """A model directory whose layers are read one by one.

    Attributes:
        directory: the model's directory.
        config: its transformers config.
    """

    def __init__(self, directory: Path) -> None:
        """Check the headers of the weights; no weight is read.

        Raises:
            ConfigError: not a model directory, not a SUPPORTED architecture, or weights that do not match config.json.
            RunError: a weight file is damaged or missing, or lacks weights.
        """
        check_architecture(directory)
        check_weights(directory)
        self.directory, self.config = directory, read_config(directory)
        self._headers = read_headers(directory)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        self._decoder: Any = model.eval().requires_grad_(False).model

    def get_dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of a tensor."""
        return getattr(torch, FLOATS[self._headers[name].dtype])

    def read_tensor(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype, on the CPU.

        Raises:
            RunError: the file cannot be read.
        """
        try:
            with safe_open(self._headers[name].file, "pt") as weights:
                return weights.get_tensor(name)
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"{self.directory}: weights cannot be read ({reason}); get the model again") from error

    def read_layer(self, index: int) -> dict[str, Tensor]:
        """Return the weights of a layer by their names in it, in their stored dtypes, on the CPU."""
        names = self._decoder.layers[index].state_dict()
        return {name: self.read_tensor(name_weight(index, name)) for name in names}

    def read_embeddings(self, input_ids: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the rows [B, S, H] of the embedding for token ids [B, S]; the others are not read."""
        return self.read_tensor(EMBEDDING)[input_ids.cpu()].to(device, dtype)

    def load_layer(self, index: int, dtype: torch.dtype, device: torch.device) -> Any:
        """Return a layer, ready to compute."""
        weights = {name: weight.to(device, dtype) for name, weight in self.read_layer(index).items()}
        return self.make_layer(index, weights)

    def load_layers(self, dtype: torch.dtype, device: torch.device) -> Iterator[Any]:
        """Yield all layers; a GPU gets the next one while it computes the present one."""
        count = self.config.num_hidden_layers
        if device.type == "cpu":
            yield from (self.load_layer(index, dtype, device) for index in range(count))
            return
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(self.load_layer, 0, dtype, device)
            for index in range(count):
                layer = coming.result()
                if index + 1 < count:
                    coming = thread.submit(self.load_layer, index + 1, dtype, device)
                yield layer

    def load_norm(self, device: torch.device) -> Any:
        """Return the norm before the output head, in float32."""
        weight = self.read_tensor(NORM).to(device, torch.float32)
        return _put_weights(copy.deepcopy(self._decoder.norm), {"weight": weight})

    def make_layer(self, index: int, weights: dict[str, Tensor]) -> Any:
        """Return a layer with other weights, which may have fewer channels of the stream."""
        return _put_weights(copy.deepcopy(self._decoder.layers[index]), weights)

    def record_calls(self, length: int, dtype: torch.dtype, device: torch.device) -> list[Call]:
        """Return the arguments that the model calls its layers with; no layer is computed.

        Sequences have no padding and the same length, so that the arguments are the same for all of them.
        """
        calls: list[Call] = []

        def record(hidden_states: Tensor, **call: Any) -> Tensor:
            calls.append(call)
            return hidden_states

        decoder = copy.deepcopy(self._decoder)
        decoder.rotary_emb = type(decoder.rotary_emb)(self.config).to(device)
        decoder.norm = Identity()
        for layer in decoder.layers:
            layer.forward = record
        states = torch.zeros(1, length, self.config.hidden_size, dtype=dtype, device=device)
        decoder(inputs_embeds=states, use_cache=False)
        return calls


class ShardWriter:
    """The weights of a model on their way to the disk."""

    def __init__(self, directory: Path) -> None:
        """Begin without weights; `directory` is empty."""
        self._directory = directory
        self._shards: list[list[str]] = []
        self._waiting: dict[str, Tensor] = {}
        self._bytes = 0

    def add(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Add weights by their names; a shard is written if as many weights again would make it too large.

        So nothing waits in memory that could be on the disk while the next layer is computed.
        """
        added = 0
        for name, weight in weights:
            if self._waiting and self._count_waiting() + weight.nbytes > SHARD_BYTES:
                self._write_shard()
            self._waiting[name] = weight.cpu().contiguous()
            added += weight.nbytes
        if self._count_waiting() + added > SHARD_BYTES:
            self._write_shard()

    def finish(self) -> None:
        """Write the rest, and the index if there are several shards."""
        if self._waiting:
            self._write_shard()
        count = len(self._shards)
        names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        if count == 1:
            names = [WEIGHTS]
        else:
            places = {weight: name for name, shard in zip(names, self._shards, strict=True) for weight in shard}
            index = {"metadata": {"total_size": self._bytes}, "weight_map": places}
            (self._directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for number, name in enumerate(names):
            self._partial(number).rename(self._directory / name)

    def _count_waiting(self) -> int:
        """Return the bytes of the weights that are not written yet."""
        return sum(weight.nbytes for weight in self._waiting.values())

    def _write_shard(self) -> None:
        self._bytes += self._count_waiting()
        save_file(self._waiting, self._partial(len(self._shards)), {"format": "pt"})
        self._shards.append([*self._waiting])
        self._waiting = {}

    def _partial(self, number: int) -> Path:
        """Return the name of a shard while it is not known how many there will be."""
        return self._directory / f"{number:05}.partial"


def read_heads(layer: Any, state: Tensor, call: Call) -> Tensor:
    """Return the input of a layer's o_proj."""
    caught: list[Tensor] = []
    handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))
    layer.self_attn(hidden_states=layer.input_layernorm(state), **call)
    handle.remove()
    return caught[0]


def read_channels(layer: Any, middle: Tensor) -> Tensor:
    """Return the input of a layer's down_proj, of the state after the attention."""
    normed = layer.post_attention_layernorm(middle)
    return layer.mlp.act_fn(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)


def get_head_dim(config: Any) -> int:
    """Return the channels per attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def name_weight(index: int, name: str) -> str:
    """Return the name of a layer's weight in the model."""
    return f"model.layers.{index}.{name}"


def _put_weights(module: Any, weights: dict[str, Tensor]) -> Any:
    """Give a module, which has none yet, its weights."""
    for name, weight in weights.items():
        owner, _, leaf = name.rpartition(".")
        part: Module = module.get_submodule(owner)
        setattr(part, leaf, Parameter(weight, requires_grad=False))
    return module
