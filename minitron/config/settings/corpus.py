"""The setting `corpus`: one address, or several with weights.

It travels as text, through Kubeflow's forms, too: an address, or a JSON list of objects with `address` and `weight`,
and with settings of prepare that one corpus has of its own.
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
    text_field: str | None = Field(None, min_length=1, description="Its text_field; none: that of prepare.")
    messages_field: str | None = Field(None, min_length=1, description="Its messages_field; none: that of prepare.")
    licence: str | None = Field(None, min_length=1, description="Its license; none: that of prepare.")

    def list_own(self) -> dict[str, str]:
        """Return the settings that are not prepare's."""
        return self.model_dump(exclude={"address", "weight"}, exclude_none=True)


_PARTS = TypeAdapter(list[CorpusPart])


def list_parts(corpus: str) -> list[CorpusPart]:
    """Return the corpora of the setting; if it is an address, one of weight 1."""
    if _is_list(corpus):
        return _PARTS.validate_json(corpus)
    return [CorpusPart(address=corpus, weight=1)]


def format_parts(parts: Iterable[CorpusPart], addresses: Iterable[str]) -> str:
    """Return the text of the setting, with other addresses."""
    pairs = zip(parts, addresses, strict=True)
    entries = [{"address": address, "weight": part.weight} | part.list_own() for part, address in pairs]
    return json.dumps(entries, ensure_ascii=False)


def compute_shares(parts: list[CorpusPart]) -> list[float]:
    """Return the share of the training tokens that each corpus is to have; their sum is 1."""
    total = sum(part.weight for part in parts)
    return [part.weight / total for part in parts]


def identify_parts(parts: list[CorpusPart], identities: list[str]) -> str:
    """Return the identity of several corpora: the SHA-256 of each one's identity, share and own settings, in order."""
    entries: list[list[Any]] = [[*pair] for pair in zip(identities, compute_shares(parts), strict=True)]
    for entry, part in zip(entries, parts, strict=True):
        entry += filter(None, [part.list_own()])  # without any, the identity is that of earlier versions
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _read_corpus(value: Any) -> Any:
    """Check a list of corpora, also one in JSON, and return its text; a list of one is its address.

    Raises:
        ValueError: the list is empty or not JSON, a weight is not positive, a key is unknown, an address stands in it
            twice, or the only corpus has settings of its own.
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
    if faults := [*_find_repeated(parts), *(_find_misplaced(parts[0]) if len(parts) == 1 else ())]:
        raise Faults(faults)
    return format_parts(parts, [part.address for part in parts]) if len(parts) > 1 else parts[0].address


def _is_list(text: str) -> bool:
    return text.startswith("[")


def _find_repeated(parts: list[CorpusPart]) -> Iterator[Fault]:
    addresses = [part.address for part in parts]
    for number, address in enumerate(addresses):
        if address in addresses[:number]:
            yield Fault(f"{number}.address", f"{address}: given twice; give it once, with the sum of the weights")


def _find_misplaced(only: CorpusPart) -> Iterator[Fault]:
    for name, value in only.list_own().items():
        yield Fault(f"0.{name}", f"{value}: the list has one corpus only; set prepare.{name}")


CorpusText = Annotated[
    str,
    Field(
        min_length=1,
        description="Text: .txt, .jsonl, .ndjson or .json (also .gz, .bz2, .xz, .zst), .parquet, a directory of these, "
        "gs://bucket/path of either, or hf://dataset[/config]; or a list of {address, weight}, where a weight is a "
        "corpus's share of the training tokens, relative to the other weights; each may have its own text_field, "
        "messages_field and licence.",
    ),
    BeforeValidator(_read_corpus),
]
"""The type of the setting."""
