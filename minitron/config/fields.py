"""Types of the fields of settings and configurations, and the marks that say how a field counts."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field, PlainSerializer

INPUT = "input"
"""Marks a field that names data. The content, not the path, decides whether a result can be reused."""

HUB_DATASET = "hub dataset"
"""Marks an input whose hf:// address names a dataset on the hub. Its commit identifies its content."""

EXECUTION = "execution"
"""Marks a field that says where and how to run. It changes results only by rounding, when sums change their order."""


def format_address(location: Path | str) -> str:
    """Format a location as an address; pathlib turns gs://bucket into gs:/bucket, and this undoes it."""
    return re.sub(r"^(gs|hf|sample):/(?!/)", r"\1://", str(location))


Location = Annotated[Path, PlainSerializer(format_address)]
"""A directory on this machine or, if `format_address` returns gs://…, in a bucket."""


InputPath = Annotated[Location, INPUT]
ModelAddress = Annotated[str, INPUT, Field(min_length=1)]
RegisteredName = Annotated[str, Field(pattern=r"^[^/:@'\"]+$")]
Beta = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, lt=0.5)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Weight = NonNegative | tuple[NonNegative, NonNegative]
"""The weight of a loss: a number, or two: it goes linearly from the first one to the second one over the training."""


Engine = Annotated[
    Literal["hf", "nemo"],
    Field(description="Engine: hf (transformers) or nemo (NeMo and Megatron); both have one process per GPU."),
]


class Fault(NamedTuple):
    """A fault of a setting: its key; and the value, what is wrong with it, and the remedy."""

    key: str
    text: str


class Faults(ValueError):
    """All faults of a section at once."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        """Hold the faults."""
        self.faults = list(faults)
        super().__init__("; ".join(f"{key}: {text}" for key, text in self.faults))


_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def read_scalar(annotation: Any, value: Any) -> Any:
    """Return a field's value as its author means it: `1e3`, which YAML 1.1 reads as text, is a number.

    Raises:
        ValueError: a truth value where a number or text belongs; pydantic would read `yes` as 1.
    """
    types = set(_list_types(annotation))
    if Any in types:
        return value
    if bool not in types and (found := next(_list_truth_values(value), None)) is not None:
        raise ValueError(
            f"found {str(found).lower()} (YAML also reads {'yes and on' if found else 'no and off'} like this); give a "
            "number, or quote it if it is text"
        )
    is_number = isinstance(value, str) and int in types and str not in types and _EXPONENT.fullmatch(value)
    return float(value) if is_number else value


def _list_types(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _list_types(part)


def _list_truth_values(value: Any) -> Iterator[bool]:
    if isinstance(value, bool):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from _list_truth_values(part)
