"""A model on disk: load, check and save a plain Hugging Face directory.

Every directory written here loads with `AutoModelForCausalLM.from_pretrained(directory)` and gives the same logits in
transformers 4.57 (the NeMo image) and 5.x (a laptop).
"""

import json
import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from minitron.data.tokenizer import TOKENIZER_FILES
from minitron.errors import RunError
from minitron.models.checks import (
    CONFIG,
    EMBEDDING,
    FLOATS,
    GENERATION_CONFIG,
    HEAD,
    INDEX,
    check_architecture,
    check_weights,
    read_headers,
)
from minitron.storage.files import link_or_copy
from minitron.storage.hashing import list_files
from minitron.storage.layout import RECORD, is_model_file

if TYPE_CHECKING:  # register's image has neither torch nor transformers
    import torch
    from transformers import PreTrainedModel

_LAYER = re.compile(r"model\.layers\.\d+\.(.+)")

_CUT_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "head_dim",
    "layer_types",
    "max_window_layers",
)
"""Keys of config.json that pruning changes, or makes explicit."""

CARD, TEACHER_CARD = "README.md", "README.teacher.md"
"""The card of a model, and the name of the teacher's card beside a pruned model."""


def load_model(directory: Path, dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
    """Load a causal language model in eval mode, on the CPU.

    Args:
        directory: a Hugging Face directory.
        dtype: dtype of the loaded weights; None: the stored dtype, or float32 if there are several.

    Raises:
        ConfigError: not a model directory, not a SUPPORTED architecture, or weights that do not match config.json.
        RunError: a weight file is damaged or missing.
    """
    from transformers import AutoModelForCausalLM

    check_architecture(directory)
    check_weights(directory)
    try:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype or _find_stored_dtype(directory)).eval()
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{directory}: weights cannot be read ({reason}); get the model again") from error


def _find_stored_dtype(directory: Path) -> "torch.dtype":
    import torch

    dtypes = {header.dtype for header in read_headers(directory).values()}
    return getattr(torch, FLOATS[dtypes.pop()]) if len(dtypes) == 1 else torch.float32


def save_model(model: "PreTrainedModel", directory: Path, tokenizer_from: Path) -> None:
    """Write a model directory: safetensors, a config with explicit head_dim, and the unchanged tokenizer files."""
    if getattr(model.config, "head_dim", None) is None:
        model.config.head_dim = model.config.hidden_size // model.config.num_attention_heads
    model.save_pretrained(directory)
    finish_model(directory, tokenizer_from)


def finish_model(directory: Path, tokenizer_from: Path) -> None:
    """Make a saved model loadable in both versions of transformers, and add the unchanged tokenizer files."""
    _write_for_both_transformers(directory / "config.json")
    for name in TOKENIZER_FILES:
        if tokenizer_from != directory and (tokenizer_from / name).is_file():
            shutil.copy2(tokenizer_from / name, directory / name)


def save_derived_model(model: "PreTrainedModel", directory: Path, source: Path) -> None:
    """Write a trained or pruned model; all else is as in the model `source`, which it was made from.

    The weights get the dtypes of `source`. `model` itself is changed.
    """
    import torch
    from transformers import GenerationConfig

    headers = read_headers(source)
    for name, parameter in model.named_parameters():
        if name in headers:
            parameter.data = parameter.data.to(getattr(torch, FLOATS[headers[name].dtype]))
    if getattr(model.config, "head_dim", None) is None:
        model.config.head_dim = model.config.hidden_size // model.config.num_attention_heads
    model.generation_config = GenerationConfig()  # source's file is used; transformers 4.57 cannot write every one
    model.save_pretrained(directory)
    finish_derived_model(directory, source)


def finish_derived_model(directory: Path, source: Path) -> None:
    """Give the saved weights of a trained or pruned model the config, dtypes and files of its source model."""
    path = directory / CONFIG
    written, original = (json.loads((place / CONFIG).read_text()) for place in (directory, source))
    changed = {key: written[key] for key in _CUT_KEYS if key in written}
    path.write_text(json.dumps(original | changed, indent=2) + "\n")
    _write_for_both_transformers(path)
    _restore_dtypes(directory, source)
    (directory / GENERATION_CONFIG).unlink(missing_ok=True)
    is_cut = any(original.get(key, value) != value for key, value in changed.items() if original.get(key) is not None)
    for name in _list_model_files(source):
        if str(name) == CONFIG or name.name.endswith((".safetensors", ".index.json")):
            continue
        target = directory / (TEACHER_CARD if is_cut and str(name) == CARD else name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        link_or_copy(source / name, target)


def _restore_dtypes(directory: Path, source: Path) -> None:
    """Store every tensor in its dtype of `source`; an engine may have written another dtype."""
    import torch
    from safetensors.torch import load_file, save_file

    written, original = read_headers(directory), read_headers(source)
    differing = {name for name, header in written.items() if name in original and header.dtype != original[name].dtype}
    for file in {written[name].file for name in differing}:
        tensors = load_file(file)
        for name in differing & tensors.keys():
            tensors[name] = tensors[name].to(getattr(torch, FLOATS[original[name].dtype]))
        save_file(
            tensors, partial := file.with_suffix(".partial"), {"format": "pt"}
        )  # the tensors are views of the file
        partial.replace(file)
    if differing and (directory / INDEX).is_file():
        index = json.loads((directory / INDEX).read_text())
        sizes = [
            math.prod(header.shape) * getattr(torch, FLOATS[header.dtype]).itemsize
            for header in read_headers(directory).values()
        ]
        index["metadata"] = index.get("metadata", {}) | {"total_size": sum(sizes)}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_model(source: Path, directory: Path) -> None:
    """Copy the files of a model directory, by hard links if the file system allows them."""
    for name in _list_model_files(source):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(source / name, directory / name)


def _list_model_files(directory: Path) -> list[Path]:
    """Return the names of a model's files, without a stage's record, hidden files, and weights in other formats."""
    names = [path.relative_to(directory) for path in list_files(directory)]
    hidden = {name for name in names if any(part.startswith(".") for part in name.parts)}
    return [name for name in names if is_model_file(str(name)) and name.name != RECORD and name not in hidden]


def _write_for_both_transformers(path: Path) -> None:
    """Add the keys of transformers 4.57 to those of 5.x: without them, 4.57 falls back to defaults."""
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
    """Count the parameters of the model that a transformers config describes, without loading weights."""
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
    shapes = {name: header.shape for name, header in read_headers(directory).items()}
    if config.get("tie_word_embeddings", False):
        shapes[HEAD] = [0]
    parts = {match[1] for name in shapes if (match := _LAYER.fullmatch(name))}
    expected = {f"model.layers.{layer}.{part}" for layer in range(config["num_hidden_layers"]) for part in parts}
    if missing := sorted((expected | {EMBEDDING, "model.norm.weight", HEAD}) - set(shapes)):
        raise RunError(f"{directory}: {len(missing)} weights are missing ({missing[0]} …); get the model again")
    return sum(math.prod(shape) for shape in shapes.values())
