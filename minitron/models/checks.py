"""Check that a directory holds the model that its config.json describes: configs, headers of weights, tokenizer.

Only headers of the weights are read, except for two tied matrices; `check_finite` reads all weights. register imports
this module in an image without torch.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from minitron.data.tokenizer import load_tokenizer
from minitron.errors import ConfigError, RunError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures that prune can cut."""

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtypes of weights: their names in safetensors and in torch."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_BUFFER = re.compile(r"(.+\.)?rotary_emb\.inv_freq")
"""Tensors in older checkpoints that transformers computes from config.json."""

_SCALE = re.compile(
    r".*\.((weight|input|output|[qkv])_scale(_inv|_\d)?|weight_(packed|shape|zero_point|g_idx)|scales|zero_point"
    r"|qweight|qzeros|g_idx|SCB|absmax|(nested_)?quant_map)|.*quant_state.*"
)
"""Names of tensors that quantization tools store beside the weights."""

_OTHER_FORMATS = (".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")

_UNQUANTIZED = "give the original model, in bfloat16, float16 or float32"


class Header(NamedTuple):
    """A tensor as the header of its safetensors file describes it."""

    dtype: str
    shape: list[int]
    file: Path


def check_model(directory: Path) -> "PreTrainedTokenizerBase":
    """Check configs, headers of the weights, and the tokenizer; return the tokenizer.

    Raises:
        ConfigError: the model is not supported, or its parts do not match.
        RunError: a weight file is damaged or missing, or lacks weights.
    """
    check_architecture(directory)
    rows = read_config(directory).vocab_size
    tokenizer = load_tokenizer(directory)
    check_weights(directory)
    _check_token_ids(directory, rows, tokenizer)
    return tokenizer


def read_config(directory: Path) -> Any:
    """Return the transformers config of a model directory.

    Raises:
        ConfigError: transformers refuses its values.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)  # else it may prompt at the terminal
    except Exception as error:  # the classes differ between versions of transformers
        reason = " ".join(str(error).split())
        raise ConfigError(f"{directory}: {CONFIG} does not describe a model ({reason}); correct it") from error


def check_sequence_length(setting: str, length: int, config: dict[str, Any], model: Path | str) -> None:
    """Refuse sequences that are longer than the model allows.

    Args:
        setting: name of the setting with the length.
        length: tokens per sequence.
        config: the model's config.json.
        model: the model's address, for the message.

    Raises:
        ConfigError: the length is above the model's max_position_embeddings.
    """
    longest = config.get("max_position_embeddings")
    if longest is not None and length > longest:
        raise ConfigError(
            f"{setting}: {length} is above max_position_embeddings {longest} of {model}; choose at most {longest}"
        )


def check_architecture(directory: Path) -> dict[str, Any]:
    """Return the content of a model directory's config.json.

    Raises:
        ConfigError: not a model directory, or an adapter, or as for `check_config`.
    """
    _refuse_adapter(directory)
    if not (directory / CONFIG).is_file():
        _refuse_other_formats(directory, CONFIG)
        raise ConfigError(f"{directory}: no {CONFIG}; give a Hugging Face model directory")
    config = _read_json(directory / CONFIG)
    check_config(config, directory)
    _refuse_quantized_files(directory)
    return config


def check_config(config: dict[str, Any], model: Path | str) -> None:
    """Check the content of a config.json; `model` is its address, for the message.

    Raises:
        ConfigError: not a SUPPORTED architecture, quantized, or with token ids beyond the embedding.
    """
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in SUPPORTED:
        known = ", ".join(SUPPORTED)
        raise ConfigError(f"{model}: architecture {architecture} is not supported; use one of {known}")
    for key in ("quantization_config", "compression_config"):
        if settings := config.get(key):
            method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
            raise ConfigError(f"{model}: quantized ({key} of {CONFIG}: {method}); {_UNQUANTIZED}")
    if isinstance(rows := config.get("vocab_size"), int):
        _refuse_ids_beyond(config, CONFIG, rows, model)


def check_weights(directory: Path) -> None:
    """Compare the headers of the weight files with config.json.

    Raises:
        ConfigError: quantized, or the names or shapes of tensors do not match config.json.
        RunError: a weight file is damaged or missing, or lacks weights.
    """
    headers = read_headers(directory)
    for name, header in headers.items():
        if header.dtype not in FLOATS:
            raise ConfigError(f"{directory}: {name} has the quantized dtype {header.dtype}; {_UNQUANTIZED}")
    expected, is_tied = _compute_expected_shapes(directory)
    _refuse_unexpected(directory, headers.keys() - expected.keys())
    optional = {HEAD} if is_tied else set()  # not the embedding: transformers 4.57 cannot take it from the head
    if missing := sorted(expected.keys() - headers.keys() - optional):
        raise RunError(f"{directory}: {len(missing)} weights are missing ({missing[0]} …); get the model again")
    for name, header in headers.items():
        if header.shape != expected[name]:
            raise ConfigError(
                f"{directory}: {name} has shape {header.shape}, but {CONFIG} describes {expected[name]}; "
                f"give the {CONFIG} of these weights"
            )
    if is_tied and {EMBEDDING, HEAD} <= headers.keys():
        _check_tied(directory, headers)


def check_finite(directory: Path) -> None:
    """Read all weights once and refuse NaN and infinity; it takes 2 s for 8 billion cached weights in bfloat16.

    Raises:
        RunError: a weight is not finite.
    """
    import torch

    for name, header in read_headers(directory).items():
        with safe_open(header.file, "pt") as weights:  # one tensor: what is read stays resident while the file is open
            tensor = weights.get_tensor(name)
        if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise RunError(
                f"{directory}: {name} has {count} NaN or infinite values, of {tensor.numel()}; "
                "get the model again, or an earlier state of it"
            )
        del tensor  # before the next one is read


def read_headers(directory: Path) -> dict[str, Header]:
    """Return the headers of a model's weight files, without buffers that transformers computes.

    Raises:
        ConfigError: the weights are in another format, or the index does not match the files.
        RunError: a weight file is damaged or missing.
    """
    headers: dict[str, Header] = {}
    for file in list_weight_files(directory):
        try:
            with safe_open(file, "numpy") as weights:
                for name in weights.keys():  # noqa: SIM118  # not a mapping
                    if not _BUFFER.fullmatch(name):
                        part = weights.get_slice(name)
                        headers[name] = Header(part.get_dtype(), part.get_shape(), file)
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"{directory}: weights cannot be read ({reason}); get the model again") from error
    return headers


def list_weight_files(directory: Path) -> list[Path]:
    """Return the weight files that transformers reads.

    Raises:
        ConfigError: there are no weight files, or the index names other files.
        RunError: a file that the index names is missing.
    """
    index, single = directory / INDEX, directory / WEIGHTS
    if not index.is_file():
        if not single.is_file():
            _refuse_other_formats(directory, WEIGHTS)
            raise ConfigError(f"{directory}: no {WEIGHTS}; give a Hugging Face model directory with its weights")
        return [single]
    names = sorted(set(_read_json(index).get("weight_map", {}).values()))
    if outside := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ConfigError(
            f"{directory}: {INDEX} names files outside the model ({_shorten(outside)}); move them into it"
        )
    if single.is_file() and names != [WEIGHTS]:
        raise ConfigError(
            f"{directory}: has {WEIGHTS}, but {INDEX} names other files ({_shorten(names)}); remove the files that "
            "do not belong to the model"
        )
    if missing := [name for name in names if not (directory / name).is_file()]:
        others = sorted({path.name for path in directory.glob("*.safetensors")} - set(names))
        found = f", found {_shorten(others)}" if others else ""
        raise RunError(
            f"{directory}: {len(missing)} of {len(names)} files in {INDEX} are missing "
            f"({_shorten(missing)}{found}); get the model again"
        )
    return [directory / name for name in names]


def _refuse_adapter(directory: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if (directory / name).exists():
            raise ConfigError(
                f"{directory}: {name} belongs to an adapter (LoRA), not to a model; merge it into its model (peft's "
                "merge_and_unload), save that, and give its directory, or remove the adapter's files"
            )


def _refuse_other_formats(directory: Path, absent: str) -> None:
    others = sorted(path.name for path in directory.glob("*") if path.suffix in _OTHER_FORMATS)
    if any(name.endswith(".gguf") for name in others):
        raise ConfigError(
            f"{directory}: no {absent}, only {_shorten(others)}; GGUF is not supported: give the Hugging Face "
            "directory that it was made from"
        )
    if others:
        raise ConfigError(
            f"{directory}: no {absent}, only {_shorten(others)}; only safetensors are supported: load the model with "
            "transformers' from_pretrained, save it with save_pretrained, and give that directory"
        )


def _refuse_quantized_files(directory: Path) -> None:
    """Refuse a model that a quantization tool's own file calls quantized."""
    for name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json"):
        if (directory / name).is_file():
            settings = _read_json(directory / name)
            settings = settings.get("quantization", settings)
            method = settings.get("quant_algo", settings.get("quant_method", "unknown"))
            if method is not None:  # Model-Optimizer writes the file for an unquantized model, too
                raise ConfigError(f"{directory}: quantized ({name}: {method}); {_UNQUANTIZED}")


def _refuse_unexpected(directory: Path, names: Iterable[str]) -> None:
    unexpected = sorted(names)
    if scales := [name for name in unexpected if _SCALE.fullmatch(name)]:
        raise ConfigError(f"{directory}: quantized, because it has {_shorten(scales)}; {_UNQUANTIZED}")
    if unexpected:
        raise ConfigError(
            f"{directory}: {len(unexpected)} tensors are not in the model of {CONFIG} ({_shorten(unexpected)}) and "
            f"would be dropped; give the {CONFIG} of these weights, or remove the tensors from the files"
        )


def _compute_expected_shapes(directory: Path) -> tuple[dict[str, list[int]], bool]:
    """Return the shape of every tensor by config.json, and whether embedding and head are one matrix."""
    import torch
    from transformers import AutoModelForCausalLM

    config = read_config(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, bool(config.tie_word_embeddings)


def _check_tied(directory: Path, headers: dict[str, Header]) -> None:
    import torch

    matrices = []
    for name in (EMBEDDING, HEAD):
        with safe_open(headers[name].file, "pt") as weights:
            matrices.append(weights.get_tensor(name))
    embedding, head = matrices
    if not torch.equal(embedding, head.to(embedding.dtype)):
        raise ConfigError(
            f"{directory}: {CONFIG} has tie_word_embeddings, but {HEAD} and {EMBEDDING} differ, so one would be "
            f"dropped; set tie_word_embeddings to false in {CONFIG}"
        )


def _check_token_ids(directory: Path, rows: int, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse tokens without a row in the embedding."""
    ids = tokenizer.get_vocab()
    named = _list_named_tokens(directory) | {tokenizer.eos_token}
    beyond = sorted(token for token in named & ids.keys() if ids[token] >= rows)
    if beyond:
        raise ConfigError(
            f"{directory}: the tokenizer's token {beyond[0]} has the id {ids[beyond[0]]}, but the embedding has {rows} "
            "rows; enlarge it with transformers' resize_token_embeddings, or remove the token from the tokenizer"
        )
    if (directory / GENERATION_CONFIG).is_file():
        _refuse_ids_beyond(_read_json(directory / GENERATION_CONFIG), GENERATION_CONFIG, rows, directory)


def _refuse_ids_beyond(settings: dict[str, Any], file: str, rows: int, model: Path | str) -> None:
    for key, value in settings.items():
        values = value if isinstance(value, list) else [value]
        if key.endswith("_token_id") and any(isinstance(number, int) and number >= rows for number in values):
            raise ConfigError(f"{model}: {key} of {file} is {value}, but the embedding has {rows} rows; correct it")


def _list_named_tokens(directory: Path) -> set[str]:
    """Return the tokens in the tokenizer's files; transformers' classes add others, which never occur in text."""
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    names = set(Tokenizer.from_file(str(path)).get_vocab()) if path.is_file() else set()
    path = directory / "tokenizer_config.json"
    settings = _read_json(path) if path.is_file() else {}
    entries = [*settings.get("added_tokens_decoder", {}).values()]
    entries += [value for key, value in settings.items() if key.endswith("_token")]
    return names | {entry["content"] if isinstance(entry, dict) else str(entry) for entry in entries}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: not JSON ({error}); get the model again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}, not a JSON object; get the model again")
    return content


def _shorten(names: list[str]) -> str:
    """Return the first names, with an ellipsis if there are more."""
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
