"""Select the documents of a dataset: normalise and deduplicate them, and assign each to a split."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from minitron.config.stages import PrepareConfig
from minitron.data.corpus import Corpus
from minitron.data.indexed import SPLITS
from minitron.data.text import normalise_text
from minitron.errors import ConfigError, RunError


class Selection:
    """Iterate over the distinct documents of a corpus, normalised, each with its split.

    Attributes:
        digests: per split, the digests of its documents.
        empty: documents dropped because no text was left.
        duplicates: documents dropped because an earlier one has the same text.
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
            text = normalise_text(raw)
            if not text:
                self.empty += 1
                continue
            content = text.encode()
            digest = hashlib.blake2b(content, digest_size=16).digest()
            split = assign_split(digest, self._config)
            if digest in self.digests[split]:
                self.duplicates += 1
                continue
            self.digests[split].add(digest)
            self.characters[split] += len(text)
            self.bytes[split] += len(content)
            yield split, text

    def summarize_counts(self) -> dict[str, Any]:
        """Return the counts of selected and dropped documents, for the manifest and the metrics."""
        return {
            "documents": {split: len(digests) for split, digests in self.digests.items()},
            "characters": dict(self.characters),
            "bytes": dict(self.bytes),
            "duplicates": self.duplicates,
            "empty": self.empty,
        }

    def check_splits(self) -> None:
        """Check that no document is in two splits, and that every split with a share has a document.

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


def assign_split(digest: bytes, config: PrepareConfig) -> str:
    """Return the split of a document. It depends on its text and the seed only, not on the rest of the corpus."""
    key = hashlib.sha256(str(config.seed).encode()).digest()
    position = int.from_bytes(hashlib.blake2b(digest, digest_size=8, key=key).digest()) / 2**64
    if position < config.validation_fraction:
        return "validation"
    return "test" if position < config.validation_fraction + config.test_fraction else "train"
