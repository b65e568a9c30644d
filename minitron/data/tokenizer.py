"""A model's tokenizer: its files, its loading, and the hash that identifies it."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from minitron.errors import ConfigError
from minitron.storage.hashing import content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)

_SLOW = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
"""Files of other kinds of tokenizers; a tokenizer.json can be made from them."""

_UNKNOWN_FORMAT = ("did not match any variant", "Unknown tokenizer version", "unknown variant", "missing field")
"""Errors of the library tokenizers for a tokenizer.json that a newer version wrote."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""The beginning of a file that `git lfs pull` replaces."""


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """Load a fast tokenizer that has an end-of-sequence token.

    Raises:
        ConfigError: the directory has no such tokenizer.
    """
    from transformers import AutoTokenizer

    _check_tokenizer_file(directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # the library tokenizers, written in Rust, has no other class
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"{directory}: {_explain_fault(directory, reason)}") from error
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise ConfigError(f"{directory}: {kind} is not a fast tokenizer; give a model that has one")
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{directory}: the tokenizer has no EOS token, which must end every document; set eos_token in "
            "tokenizer_config.json to one of its tokens"
        )
    if not tokenizer.backend_tokenizer.encode("a b", add_special_tokens=False).ids:
        raise ConfigError(
            f"{directory}: the tokenizer finds no tokens in text (vocabulary of {tokenizer.vocab_size}); download its "
            "tokenizer.json again"
        )
    return tokenizer


def _check_tokenizer_file(directory: Path) -> None:
    """Check that the directory has a tokenizer.json, and that the file is JSON.

    Raises:
        ConfigError: the file is missing, or has other content.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        slow = [name for name in _SLOW if (directory / name).is_file()]
        if not slow:
            raise ConfigError(f"{directory}: no tokenizer; put its tokenizer.json beside the weights")
        raise ConfigError(
            f"{directory}: no tokenizer.json, only {' and '.join(slow)}; convert it with sentencepiece and tiktoken "
            "installed: AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
        )
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        pointer = path.read_bytes().startswith(LFS_POINTER)
        fault = "a Git LFS pointer, not the tokenizer; run `git lfs pull`" if pointer else "not JSON; download it again"
        raise ConfigError(f"{path}: {fault}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {type(content).__name__}, not a tokenizer; download it again")


def _explain_fault(directory: Path, reason: str) -> str:
    """Return why a tokenizer cannot be loaded, and the remedy."""
    if not any(text in reason for text in _UNKNOWN_FORMAT):
        return f"the tokenizer cannot be loaded ({reason}); download its files again, or save it as a fast tokenizer"
    installed = {name: version(name) for name in ("tokenizers", "transformers")}
    try:
        saved_with = json.loads((directory / "config.json").read_text())["transformers_version"]
    except (OSError, ValueError, KeyError, TypeError):
        saved_with = None
    newer = saved_with and saved_with != installed["transformers"]
    reader = (
        f"the tokenizers of transformers {saved_with}, which saved the model," if newer else "a newer version of it,"
    )
    return (
        f"tokenizers {installed['tokenizers']} does not know the format of tokenizer.json ({reason}); install "
        f"{reader} or save the tokenizer again with transformers {installed['transformers']}"
    )


def tokenizer_hash(directory: Path) -> str:
    """Return the sha256 of tokenizer.json: models with equal hashes can share a dataset.

    Raises:
        ConfigError: the directory has no tokenizer.json.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{directory}: no tokenizer.json; save the model's fast tokenizer there")
    return content_hash(path)
