"""From text to tokens, for whoever reads a corpus: prepare all of it, evaluate the first of another one.

A document is plain text and ends with one EOS; words that look like special tokens are text.
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
"""Control characters except tab and line feed, and halves of surrogate pairs, which no encoding has."""


def normalise(text: str) -> str:
    r"""Return text in NFC, with \n as line ending, no trailing whitespace, and no control characters."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = unicodedata.normalize("NFC", _CONTROL.sub("", text))
    return "\n".join([line.rstrip() for line in text.split("\n")]).strip("\n")


def plain(tokenizer: Any) -> Tokenizer:
    """Return the tokenizer's backend, set to neither cut, pad nor find special tokens in the text."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def write_first(texts: Iterable[str], tokenizer: Any, prefix: Path, count: int) -> None:
    """Write the first documents of a corpus, at least `count` tokens if there are as many, to `.bin` and `.idx`."""
    backend = plain(tokenizer)
    with closing(IndexedWriter(prefix, len(tokenizer))) as writer:
        for text in filter(None, map(normalise, texts)):
            ids = backend.encode(text, add_special_tokens=False).ids
            writer.add([[*ids, tokenizer.eos_token_id]])
            count -= len(ids) + 1
            if count <= 0:
                break
