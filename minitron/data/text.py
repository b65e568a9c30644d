"""Turn text into tokens: all documents for prepare, the first documents of another corpus for evaluate.

A document is plain text and ends with one EOS; special tokens in it are read as text. It begins with a BOS if the
tokenizer puts one before a text (Llama's does, SmolLM2's does not). Tasks, generation and servers call the tokenizer,
so their texts begin in the same way as the documents for training, calibration and scoring. A packed sequence that
begins within a document has no BOS of its own.

A rendered conversation is a document, too. Its chat template writes special tokens, BOS and the ends of turns, so these
are read as such, also in a message, as by a server. It gets an EOS unless the template ends with it.
"""

import copy
import re
import unicodedata
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from minitron.data.indexed import IndexedWriter

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters except tab and line feed, and lone surrogates, which UTF-8 cannot encode."""


class Conversation(str):
    """The text of a conversation as a chat template renders it.

    Attributes:
        answers: start and end, in characters, of everything that the assistant says.
        words: what the messages say, without the template's own text.
    """

    answers: tuple[tuple[int, int], ...]
    words: str

    def __new__(cls, text: str, answers: Iterable[tuple[int, int]] = (), words: str = "") -> "Conversation":
        """Hold a text, its answers and its words."""
        conversation = super().__new__(cls, text)
        conversation.answers, conversation.words = tuple(answers), words
        return conversation


class Tokens(NamedTuple):
    """The token ids of a document, and a mask: 1 for each that counts in the loss; None if all of them do."""

    ids: list[int]
    mask: bytes | None = None


class DocumentTokenizer:
    """Turn documents into token ids, with those that begin and end them; it works without Python's lock."""

    def __init__(self, tokenizer: Any) -> None:
        """Take a tokenizer, which is configured for plain text."""
        self._plain, self._start = configure_for_plain_text(tokenizer), find_document_start(tokenizer)
        self._chat: Tokenizer | None = None
        self._eos, self._eos_id, self._ends = tokenizer.eos_token, tokenizer.eos_token_id, list_end_tokens(tokenizer)

    def tokenize(self, texts: list[str]) -> list[Tokens]:
        """Return the tokens of texts and of conversations."""
        chats = [text for text in texts if isinstance(text, Conversation)]
        encodings = iter(self._open_chat_tokenizer().encode_batch(chats, add_special_tokens=False) if chats else ())
        others = [text for text in texts if not isinstance(text, Conversation)]
        plain = iter(self._plain.encode_batch_fast(others, add_special_tokens=False))
        return [
            self._finish_conversation(text, next(encodings))
            if isinstance(text, Conversation)
            else Tokens([*self._start, *next(plain).ids, self._eos_id])
            for text in texts
        ]

    def _open_chat_tokenizer(self) -> Tokenizer:
        """Return the tokenizer that reads special tokens in text as such; it is made when it is first needed."""
        if self._chat is None:
            self._chat = copy.deepcopy(self._plain)
            self._chat.encode_special_tokens = False
        return self._chat

    def _finish_conversation(self, text: Conversation, encoding: Encoding) -> Tokens:
        """Add EOS if the template has not; it counts if nothing else ends the last answer."""
        ids, mask, end = encoding.ids, mark_answers(text, encoding), text.rstrip()
        if not end.endswith(self._eos):
            ids, mask = [*ids, self._eos_id], mask + (b"\0" if end.endswith(self._ends) else mask[-1:])
        return Tokens(ids, mask)


def list_end_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the texts of the tokens that may end a turn: those that no text is merged into."""
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values())


def mark_answers(text: Conversation, encoding: Encoding) -> bytes:
    """Return 1 for every token that has a character of an answer, else 0.

    A token that merges the end of a prompt with the beginning of an answer counts, as in transformers. Some tokenizers
    leave white space out of a token's offsets; it belongs to the token that begins where the one before ends.
    """
    starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    starts = np.minimum(starts, np.concatenate([[0], ends[:-1]]))
    mask = np.zeros(len(ends), dtype=np.uint8)
    for start, end in text.answers:
        mask |= (starts < end) & (ends > start)
    return mask.tobytes()


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
    documents = DocumentTokenizer(tokenizer)
    with closing(IndexedWriter(prefix, len(tokenizer))) as writer:
        for text in filter(None, map(normalize_text, texts)):
            (tokens,) = documents.tokenize([text])
            writer.add_documents([tokens.ids])
            count -= len(tokens.ids)
            if count <= 0:
                break
