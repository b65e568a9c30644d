"""The setting `corpus`: one address, or several with weights.

It travels as text, through Kubeflow's forms, too: an address, or a JSON list of objects with `address` and `weight`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter

from minitron.config.fields import Fault, Faults
from minitron.config.settings.base import Settings


class CorpusPart(Settings):
    """One of several corpora."""

    address: str = Field(min_length=1, description="Text, addressed like a corpus of its own.")
    weight: float = Field(gt=0, description="Share of the training tokens, relative to the other weights.")


_PARTS = TypeAdapter(list[CorpusPart])


def list_parts(corpus: str) -> list[CorpusPart]:
    """Return the corpora of the setting; if it is an address, one of weight 1."""
    if _is_list(corpus):
        return _PARTS.validate_json(corpus)
    return [CorpusPart(address=corpus, weight=1)]


def format_parts(parts: Iterable[CorpusPart], addresses: Iterable[str]) -> str:
    """Return the text of the setting, with other addresses."""
    pairs = zip(parts, addresses, strict=True)
    return json.dumps([{"address": address, "weight": part.weight} for part, address in pairs], ensure_ascii=False)


def compute_shares(parts: list[CorpusPart]) -> list[float]:
    """Return the share of the training tokens that each corpus is to have; their sum is 1."""
    total = sum(part.weight for part in parts)
    return [part.weight / total for part in parts]


def identify_parts(parts: list[CorpusPart], identities: list[str]) -> str:
    """Return the identity of several corpora: the SHA-256 of each one's identity and share, in their order."""
    pairs = list(zip(identities, compute_shares(parts), strict=True))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _read_corpus(value: Any) -> Any:
    """Check a list of corpora, also one in JSON, and return its text; a list of one is its address.

    Raises:
        ValueError: the list is empty or not JSON, a weight is not positive, a key is unknown, or an address stands in
            it twice.
    """
    if isinstance(value, str) and _is_list(value):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(
                f'not a JSON list ({error}); give [{{"address": …, "weight": …}}, …], or ./[… for a path'
            ) from None
    if not isinstance(value, list):
        return value
    parts = _PARTS.validate_python(value)
    if not parts:
        raise ValueError("an empty list; give an address, or a list of {address, weight}")
    if faults := list(_find_repeated(parts)):
        raise Faults(faults)
    return format_parts(parts, [part.address for part in parts]) if len(parts) > 1 else parts[0].address


def _is_list(text: str) -> bool:
    return text.startswith("[")


def _find_repeated(parts: list[CorpusPart]) -> Iterator[Fault]:
    addresses = [part.address for part in parts]
    for number, address in enumerate(addresses):
        if address in addresses[:number]:
            yield Fault(f"{number}.address", f"{address}: given twice; give it once, with the sum of the weights")


CorpusText = Annotated[
    str,
    Field(
        min_length=1,
        description="Text: .txt, .jsonl, .ndjson or .json (also .gz, .bz2, .xz, .zst), .parquet, a directory of these, "
        "gs://bucket/path of either, or hf://dataset[/config]; or a list of {address, weight}, where a weight is a "
        "corpus's share of the training tokens, relative to the other weights.",
    ),
    BeforeValidator(_read_corpus),
]
"""The type of the setting."""
