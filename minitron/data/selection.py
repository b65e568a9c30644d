"""Select the documents of a dataset: normalize and deduplicate them, and assign each to a split."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from minitron.config.settings import list_parts
from minitron.config.stages import PrepareConfig
from minitron.data.corpus import Corpus
from minitron.data.indexed import SPLITS
from minitron.data.mixture import Corpora
from minitron.data.near_duplicates import NearDuplicates
from minitron.data.text import Conversation, normalize_text
from minitron.errors import ConfigError, RunError


class Selection:
    """Iterate over the distinct, normalized documents of one corpus or several, each with its split.

    The text of a conversation is the rendered one, of normalized messages.

    Attributes:
        corpus: the corpora.
        documents: per corpus and split, number of documents.
        digests: per split, the digests of its documents.
        empty: number of documents dropped because they have no text, or are conversations without answers.
        duplicates: number of documents dropped because an earlier one in their split has the same text.
        near_duplicates: number of documents dropped because they resemble an earlier one; 0 if not looked for.
        overlaps: per split, number of documents dropped because an earlier one in another split has the same text.
        characters: per split, characters of the documents.
        bytes: per split, their bytes in UTF-8.
    """

    def __init__(self, corpora: list[Corpus], config: PrepareConfig) -> None:
        """Select from corpora; the configuration gives the shares of the splits and the seed."""
        self.corpus, self._config = Corpora(corpora), config
        self.documents = [dict.fromkeys(SPLITS, 0) for _ in corpora]
        self.digests: dict[str, set[bytes]] = {split: set() for split in SPLITS}
        self.empty = self.duplicates = self.near_duplicates = 0
        self._kept = NearDuplicates(config.near_duplicates) if config.near_duplicates else None
        self.overlaps = Counter(dict.fromkeys(SPLITS, 0))
        self.characters, self.bytes = Counter(dict.fromkeys(SPLITS, 0)), Counter(dict.fromkeys(SPLITS, 0))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Yield split and text of every document, in the order of the corpora."""
        for number, own, raw in self.corpus.read_documents():
            text = raw if isinstance(raw, Conversation) else normalize_text(raw)
            if not text:
                self.empty += 1
                continue
            content = text.encode()
            digest = hashlib.blake2b(content, digest_size=16).digest()
            own_splits = self.corpus.parts[number].own_splits
            split = own if own in ("validation", "test") else assign_split(digest, self._config, own_splits)
            if seen := [name for name, digests in self.digests.items() if digest in digests]:
                self.duplicates += seen == [split]
                self.overlaps[split] += seen != [split]
                continue
            if self._kept and not self._kept.add(text.words if isinstance(text, Conversation) else text):
                self.near_duplicates += 1
                continue
            self.digests[split].add(digest)
            self.documents[number][split] += 1
            self.characters[split] += len(text)
            self.bytes[split] += len(content)
            yield split, text

    def summarize_counts(self) -> dict[str, Any]:
        """Return the counts of selected and dropped documents, for the manifest and the metrics."""
        overlaps = {"overlaps": dict(self.overlaps)} if self.corpus.own_splits else {}
        near = {} if self._kept is None else {"near_duplicates": self.near_duplicates}
        return {
            "documents": {split: len(digests) for split, digests in self.digests.items()},
            "characters": dict(self.characters),
            "bytes": dict(self.bytes),
            "duplicates": self.duplicates,
            "empty": self.empty,
            **near,
            **overlaps,
        }

    def check_splits(self) -> None:
        """Check that no document is in two splits, and that every split with a share has a document.

        Raises:
            ConfigError: a split has no document.
            RunError: a document is in two splits.
        """
        for left, right in combinations(SPLITS, 2):
            if common := len(self.digests[left] & self.digests[right]):
                raise RunError(f"{common} documents are both in {left} and in {right}; nothing was written; report it")
        corpus = " and ".join(part.address for part in list_parts(self._config.corpus))
        total = sum(map(len, self.digests.values()))
        if not total:
            raise ConfigError(f"corpus {corpus}: no text ({self.empty} empty documents); give a corpus with text")
        for part, documents in zip(list_parts(self._config.corpus), self.documents, strict=True):
            if len(self.documents) > 1 and not documents["train"]:
                raise ConfigError(
                    f"corpus {part.address}: nothing to train on, because its documents are empty, held out, or in a "
                    "corpus before it; leave it out of the list, or give it other text"
                )
        for split in SPLITS:
            share = 1.0 if split in self.corpus.own_splits else getattr(self._config, f"{split}_fraction", 1.0)
            if share and not self.digests[split]:
                raise ConfigError(
                    f"corpus {corpus}: {split} gets none of its {total} distinct documents; {self._suggest_more(split)}"
                )

    def _suggest_more(self, split: str) -> str:
        """Return the remedy for a split without a document."""
        if split in self.corpus.own_splits:
            dropped = self.overlaps[split]
            return f"all of its own ({dropped}) are also in another split: set prepare.own_splits to false"
        remedy = f"raise {split}_fraction" if split != "train" else "lower the fractions of the other splits"
        return f"{remedy}, or give more documents (a .txt file is one document unless you set document_separator)"


def assign_split(digest: bytes, config: PrepareConfig, own_splits: tuple[str, ...] = ()) -> str:
    """Return the split of a document. It depends on its text and the seed only, not on the rest of the corpus.

    Args:
        digest: the digest of the document's text.
        config: gives the seed, and the shares of validation and test.
        own_splits: the corpus's own splits, which get no share.
    """
    key = hashlib.sha256(str(config.seed).encode()).digest()
    position = int.from_bytes(hashlib.blake2b(digest, digest_size=8, key=key).digest()) / 2**64
    validation = 0 if "validation" in own_splits else config.validation_fraction
    test = 0 if "test" in own_splits else config.test_fraction
    if position < validation:
        return "validation"
    return "test" if position < validation + test else "train"
