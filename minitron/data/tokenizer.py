"""A model's tokenizer: its files, its loading, and the hash that identifies it."""

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


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """Load a fast tokenizer that has an end-of-sequence token.

    Raises:
        ConfigError: the directory has no such tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        remedy = "put its tokenizer.json beside the weights"
        raise ConfigError(f"{directory}: no tokenizer ({reason}); {remedy}") from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ConfigError(f"{directory}: the tokenizer is not a fast one with an EOS token; give one that is")
    return tokenizer


def tokenizer_hash(directory: Path) -> str:
    """Return the sha256 of tokenizer.json: two models can share a dataset only if it is equal.

    Raises:
        ConfigError: the directory has no tokenizer.json.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{directory}: no tokenizer.json; save the model's fast tokenizer there")
    return content_hash(path)
