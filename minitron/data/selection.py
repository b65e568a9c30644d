"""The documents that a dataset is made of: normalised, deduplicated, each with its split."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from minitron.config.stages import PrepareConfig
from minitron.data.corpus import Corpus
from minitron.data.indexed import SPLITS
from minitron.data.text import normalise
from minitron.errors import ConfigError, RunError


class Selection:
    """Iterate over the distinct documents of a corpus, normalised, each with its split.

    Attributes:
        digests: per split, the digests of the documents that went there.
        empty: documents dropped because nothing was left of them.
        duplicates: documents dropped because the same text had come before.
        characters: per split, characters of the documents.
        bytes: per split, their bytes in UTF-8.
    """

    def __init__(self, corpus: Corpus, config: PrepareConfig) -> None:
        """Select from a corpus; the configuration gives the shares of the splits and the seed."""
        self.corpus, self._config = corpus, config
        self.digests: dict[str, set[bytes]] = {split: set() for split in SPLITS}
        self.empty = self.duplicates = 0
        self.characters, self.bytes = Counter(dict.fromkeys(SPLITS, 0)), Counter(dict.fromkeys(SPLITS, 0))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Yield split and text of every document, in the order of the corpus."""
        for raw in self.corpus:
            text = normalise(raw)
            if not text:
                self.empty += 1
                continue
            content = text.encode()
            digest = hashlib.blake2b(content, digest_size=16).digest()
            split = split_of(digest, self._config)
            if digest in self.digests[split]:
                self.duplicates += 1
                continue
            self.digests[split].add(digest)
            self.characters[split] += len(text)
            self.bytes[split] += len(content)
            yield split, text

    def counts(self) -> dict[str, Any]:
        """Return what was selected and dropped, for manifest and metrics."""
        return {
            "documents": {split: len(digests) for split, digests in self.digests.items()},
            "characters": dict(self.characters),
            "bytes": dict(self.bytes),
            "duplicates": self.duplicates,
            "empty": self.empty,
        }

    def check(self) -> None:
        """Prove that no document is in two splits, and that every split that was asked for has one.

        Raises:
            ConfigError: a split has no document.
            RunError: a document is in two splits.
        """
        for left, right in combinations(SPLITS, 2):
            if common := len(self.digests[left] & self.digests[right]):
                raise RunError(f"{common} documents are both in {left} and in {right}: nothing was written; report it")
        corpus, total = self._config.corpus, sum(map(len, self.digests.values()))
        if not total:
            raise ConfigError(f"corpus {corpus}: no text ({self.empty} empty documents); give one that has text")
        for split in SPLITS:
            share = getattr(self._config, f"{split}_fraction", 1.0)
            if share and not self.digests[split]:
                remedy = f"raise {split}_fraction" if split != "train" else "lower the fractions of the other splits"
                raise ConfigError(
                    f"corpus {corpus}: {split} gets none of its {total} distinct documents; {remedy}, or give more "
                    "documents (blank lines separate those of a .txt file)"
                )


def split_of(digest: bytes, config: PrepareConfig) -> str:
    """Return the split of a document: a function of its text and the seed, whatever else is in the corpus."""
    key = hashlib.sha256(str(config.seed).encode()).digest()
    position = int.from_bytes(hashlib.blake2b(digest, digest_size=8, key=key).digest()) / 2**64
    if position < config.validation_fraction:
        return "validation"
    return "test" if position < config.validation_fraction + config.test_fraction else "train"
