"""Several corpora: read one after the other, held-out splits first, and mixed by weight in the training index.

A weight is a share of the training tokens. Every document is written once. The corpus with the most tokens for its
weight is in the index once. Of every other corpus the index lists all documents again, in another order each time; of
the last pass, only what the share needs. A pass costs 20 bytes per document in the index, and no tokens.

No corpus is in the index more than MOST_PASSES times. If a share needs more, the other corpora are used in part. After
so many passes over a text another one teaches next to nothing (Muennighoff et al., Scaling Data-Constrained Language
Models, 2023, section 4: the value of a repetition falls to 1/e after some 15).

D = documents of the split, E = entries of the mixture's index.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minitron.config.metrics import format_share
from minitron.data.corpus import Corpus
from minitron.data.indexed import SPLITS, IndexedDataset, write_index

MOST_PASSES = 16
"""Most times that a corpus's text is in one epoch of a mixture."""


class Corpora:
    """One corpus or several, read as one.

    Attributes:
        parts: the corpora.
        size: bytes of all files; None if one is a dataset on a hub.
        files: number of files; None if one is a dataset on a hub.
        own_splits: the splits that at least one corpus has.
        has_conversations: whether conversations are read from at least one.
    """

    def __init__(self, parts: list[Corpus]) -> None:
        """Hold the corpora."""
        self.parts, self.has_conversations = parts, any(part.chat is not None for part in parts)
        sizes, files = [part.size for part in parts], [part.files for part in parts]
        self.size = None if None in sizes else sum(filter(None, sizes))
        self.files = None if None in files else sum(filter(None, files))
        self.own_splits = tuple(split for split in SPLITS if any(split in part.own_splits for part in parts))

    @property
    def position(self) -> int:
        """Bytes read so far, in the unit of `size`."""
        return sum(part.position for part in self.parts)

    def read_documents(self) -> Iterator[tuple[int, str | None, str]]:
        """Yield the number of every document's corpus, its split, if it is the corpus's own, and its text.

        Own test splits of all corpora come first, then those of validation, then the rest.
        """
        for splits in (("test",), ("validation",), ("train", None)):
            for number, part in enumerate(self.parts):
                for split, text in part.read_documents(splits):
                    yield number, split, text


class Use(NamedTuple):
    """The use of a corpus in a mixture: its tokens, their share of all, and how often its text is in an epoch."""

    tokens: int
    share: float
    passes: float

    def describe(self) -> str:
        """Describe the use in one line."""
        text = f"its text {self.passes:.1f} times" if self.passes > 1 else f"{format_share(self.passes)} of its text"
        return f"{format_share(self.share)} of the training tokens; an epoch has {text}"


def mix_corpora(prefix: Path, documents: list[int], shares: list[float], seed: int) -> list[Use]:
    """Rewrite the index of a split whose documents stand one corpus after the other; return the use of each corpus.

    Args:
        prefix: the split.
        documents: number of documents of each corpus, at least one.
        shares: share of the tokens that each is to have; their sum is 1.
        seed: seed of the order of a corpus's documents.
    """
    split = IndexedDataset(prefix)
    ends = np.cumsum(documents)
    order = order_documents(split.lengths, ends, shares, seed)
    write_index(prefix, split.code, split.lengths[order], split.starts[order])
    corpus = np.searchsorted(ends, order, side="right")
    used = np.bincount(corpus, split.lengths[order], len(shares))
    written = np.add.reduceat(split.lengths, [0, *ends[:-1]])
    return [
        Use(int(count), round(float(count / used.sum()), 4), round(float(count / own), 4))
        for count, own in zip(used, written, strict=True)
    ]


def order_documents(lengths: Any, ends: Any, shares: list[float], seed: int) -> Any:
    """Return the documents [E] of a mixture, interleaved so that every stretch of it has the shares.

    A document stands where its corpus has come to when half of it is read: at this many tokens of the corpus, divided
    by the corpus's share.

    Args:
        lengths: tokens of each document [D].
        ends: the document after the last one of each corpus.
        shares: share of the tokens that each corpus is to have.
        seed: seed of the order of a corpus's documents.
    """
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    sizes = np.array([lengths[first:last].sum() for first, last in spans])
    total = min((sizes / shares).max(), MOST_PASSES * (sizes / shares).min())
    entries, places = [], []
    for number, (first, last) in enumerate(spans):
        generator = np.random.default_rng([seed, number])
        passes = int(np.ceil(total * shares[number] / sizes[number]))
        order = np.concatenate([first + generator.permutation(last - first) for _ in range(passes)])
        place = (np.cumsum(lengths[order]) - lengths[order] / 2) / shares[number]
        entries.append(order[place < total])
        places.append(place[place < total])
    return np.concatenate(entries)[np.argsort(np.concatenate(places), kind="stable")]
