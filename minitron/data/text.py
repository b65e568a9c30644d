"""Turn text into tokens: all documents for prepare, the first documents of another corpus for evaluate.

A document is plain text and ends with one EOS; special tokens in it are read as text. It begins with a BOS if the
tokenizer puts one before a text (Llama's does, SmolLM2's does not). Tasks, generation and servers call the tokenizer,
so their texts begin in the same way as the documents for training, calibration and scoring. A packed sequence that
begins within a document has no BOS of its own.
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
"""Control characters except tab and line feed, and lone surrogates, which UTF-8 cannot encode."""


def normalize_text(text: str) -> str:
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


def find_document_start(tokenizer: Any) -> list[int]:
    """Return the tokens before a document: the BOS if the tokenizer puts it before a text, else none."""
    ids = tokenizer.backend_tokenizer.encode("", add_special_tokens=True).ids
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def write_first_documents(texts: Iterable[str], tokenizer: Any, prefix: Path, count: int) -> None:
    """Write the first documents of a corpus to `.bin` and `.idx`, until they have `count` tokens."""
    backend, start = configure_for_plain_text(tokenizer), find_document_start(tokenizer)
    with closing(IndexedWriter(prefix, len(tokenizer))) as writer:
        for text in filter(None, map(normalize_text, texts)):
            ids = [*start, *backend.encode(text, add_special_tokens=False).ids, tokenizer.eos_token_id]
            writer.add_documents([ids])
            count -= len(ids)
            if count <= 0:
                break
