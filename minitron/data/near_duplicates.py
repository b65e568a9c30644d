"""Find near-duplicates: documents with mostly the same words, in the same order, as an earlier document.

Two documents are compared by the Jaccard similarity of their sets of five successive words, without case and
punctuation. MinHash estimates it from a signature of HASHES numbers (Broder, On the resemblance and containment of
documents, 1997), and a document is compared only with those that share a band of its signature. So a document of
similarity s is compared with probability 1 - (1 - s^8)^16: 0.95 at 0.8, 1.00 at 0.9. Lee et al. use runs of five words
and 0.8, too (Deduplicating Training Data Makes Language Models Better, 2022).

About 2.5 kB per document are kept, whatever its length. One core compares 10 MB of text per second.
"""

import re

HASHES, BANDS, SEED = 128, 16, 1
WORDS = 5

_WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|\w+")
"""A word; in Thai, Lao, Japanese and Chinese, which have no spaces, a character."""


class NearDuplicates:
    """The documents so far that resemble no earlier one."""

    def __init__(self, similarity: float) -> None:
        """Begin without documents; two are near-duplicates if their estimated similarity is at least this."""
        from rensa import RMinHash, RMinHashDeduplicator  # only this setting needs it

        self._make_signature = RMinHash
        self._kept = RMinHashDeduplicator(similarity, HASHES, True, num_bands=BANDS, seed=SEED)

    def add(self, text: str) -> bool:
        """Keep a document, unless it is a near-duplicate of an earlier one; say whether it is kept."""
        signature = self._make_signature(HASHES, SEED)
        signature.update(list_shingles(text))
        return self._kept.add(str(self._kept.len()), signature)


def list_shingles(text: str) -> list[str]:
    """Return all runs of five words; of a shorter text, the text."""
    words = _WORD.findall(text.lower())
    return [" ".join(run) for run in zip(*(words[start:] for start in range(WORDS)), strict=False)] or [" ".join(words)]
