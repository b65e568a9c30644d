"""Turn text into tokens: all documents for prepare, the first documents of another corpus for evaluate.

A document is plain text and ends with one EOS; special tokens are not recognised in it.
"""

import re
import unicodedata
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from minitron.data.indexed import IndexedWriter

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters except tab and line feed, and halves of surrogate pairs, which UTF-8 cannot encode."""


def normalise_text(text: str) -> str:
    r"""Return text in NFC, with \n as line ending, no trailing whitespace, and no control characters."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = unicodedata.normalize("NFC", _CONTROL.sub("", text))
    return "\n".join([line.rstrip() for line in text.split("\n")]).strip("\n")


def configure_for_plain_text(tokenizer: Any) -> Tokenizer:
    """Return the tokenizer's backend, set not to truncate, not to pad, and to read special tokens as text."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def write_first_documents(texts: Iterable[str], tokenizer: Any, prefix: Path, count: int) -> None:
    """Write the first documents of a corpus, until they have `count` tokens, to `.bin` and `.idx`."""
    backend = configure_for_plain_text(tokenizer)
    with closing(IndexedWriter(prefix, len(tokenizer))) as writer:
        for text in filter(None, map(normalise_text, texts)):
            ids = backend.encode(text, add_special_tokens=False).ids
            writer.add_documents([[*ids, tokenizer.eos_token_id]])
            count -= len(ids) + 1
            if count <= 0:
                break
