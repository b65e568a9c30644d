"""A model on disk: a plain Hugging Face directory, loaded, checked and saved.

Every directory written here loads with `AutoModelForCausalLM.from_pretrained(directory)` and gives the same logits in
transformers 4.57 (the NeMo image) and 5.x (a laptop).
"""

import json
import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from minitron.data.tokenizer import TOKENIZER_FILES
from minitron.errors import ConfigError, RunError
from minitron.storage.files import link_or_copy
from minitron.storage.hashing import list_files
from minitron.storage.layout import RECORD

if TYPE_CHECKING:  # register's image has neither torch nor transformers
    import torch
    from transformers import PreTrainedModel

SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures that prune can cut."""

_OUTER = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
_LAYER = re.compile(r"model\.layers\.\d+\.(.+)")


def load_model(directory: Path, dtype: "torch.dtype | str" = "auto") -> "PreTrainedModel":
    """Load a causal language model in eval mode, on the CPU.

    Raises:
        ConfigError: not a model directory, or not one of the SUPPORTED architectures.
        RunError: a weight file is damaged or missing.
    """
    from transformers import AutoModelForCausalLM

    check_architecture(directory)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{directory}: weights cannot be read ({reason}); get the model again") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise RunError(f"{directory}: {len(missing)} weights are missing ({missing[0]} …); get the model again")
    return model.eval()


def check_architecture(directory: Path) -> dict[str, Any]:
    """Return the content of a model directory's config.json.

    Raises:
        ConfigError: not a model directory, or not one of the SUPPORTED architectures.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ConfigError(f"{directory}: no config.json; give a Hugging Face model directory")
    config = json.loads(path.read_text())
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in SUPPORTED:
        known = ", ".join(SUPPORTED)
        raise ConfigError(f"{directory}: architecture {architecture} is not supported; use one of {known}")
    return config


def save_model(model: "PreTrainedModel", directory: Path, tokenizer_from: Path) -> None:
    """Write a model directory: safetensors, config with an explicit head_dim, the tokenizer's files unchanged."""
    if getattr(model.config, "head_dim", None) is None:
        model.config.head_dim = model.config.hidden_size // model.config.num_attention_heads
    model.save_pretrained(directory)
    finish_model(directory, tokenizer_from)


def finish_model(directory: Path, tokenizer_from: Path) -> None:
    """Make a saved model loadable in both transformers, with a tokenizer's files unchanged."""
    _write_for_both_transformers(directory / "config.json")
    for name in TOKENIZER_FILES:
        if tokenizer_from != directory and (tokenizer_from / name).is_file():
            shutil.copy2(tokenizer_from / name, directory / name)


def copy_model(source: Path, directory: Path) -> None:
    """Put the files of a model directory into another one, by hard links if the file system allows them."""
    for path in list_files(source):
        name = path.relative_to(source)
        if name.name == RECORD or any(part.startswith(".") for part in name.parts):
            continue
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(path, directory / name)


def _write_for_both_transformers(path: Path) -> None:
    """Add the keys that transformers 4.57 reads beside those of 5.x: without them it falls back to defaults."""
    config = json.loads(path.read_text())
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    path.write_text(json.dumps(config, indent=2) + "\n")


def count_model_parameters(model: "PreTrainedModel") -> int:
    """Count the parameters; tied embeddings count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_config_parameters(config: Any) -> int:
    """Count the parameters of the model that a transformers config describes, without its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return count_model_parameters(AutoModelForCausalLM.from_config(config))


def count_stored_parameters(directory: Path) -> int:
    """Count the parameters in the headers of a model's weight files, without torch; tied embeddings count once.

    Raises:
        RunError: a weight file is damaged or missing, or lacks weights.
    """
    config = check_architecture(directory)
    try:
        shapes = _read_stored_shapes(directory)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{directory}: weights cannot be read ({reason}); get the model again") from error
    if config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = [0]
    parts = {match[1] for name in shapes if (match := _LAYER.fullmatch(name))}
    expected = {f"model.layers.{layer}.{part}" for layer in range(config["num_hidden_layers"]) for part in parts}
    if missing := sorted((expected | _OUTER) - set(shapes)):
        raise RunError(f"{directory}: {len(missing)} weights are missing ({missing[0]} …); get the model again")
    return sum(math.prod(shape) for shape in shapes.values())


def _read_stored_shapes(directory: Path) -> dict[str, list[int]]:
    """Return the shape of every tensor in a model's safetensors files, whose sizes safe_open checks."""
    index = directory / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    shapes: dict[str, list[int]] = {}
    for name in sorted(names):
        with safe_open(directory / name, "numpy") as weights:
            shapes |= {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118
    return shapes


def read_config(directory: Path) -> Any:
    """Return the transformers config of a model directory."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(directory)
