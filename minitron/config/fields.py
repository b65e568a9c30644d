"""The kinds of fields that settings and configurations are made of, and the marks that say what a field means."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PlainSerializer

INPUT = "input"
"""Marks a field that names data: its content, not its path, decides whether a result can be reused."""

HUB_DATASET = "hub dataset"
"""Marks an input whose hf:// address names a dataset, read over the network: its commit stands for its content."""

EXECUTION = "execution"
"""Marks a field that says where and how to run: it has no influence on the result."""


def address(place: Path | str) -> str:
    """Return a place as it was given: pathlib makes gs:/bucket of gs://bucket."""
    return re.sub(r"^(gs|hf):/(?!/)", r"\1://", str(place))


Place = Annotated[Path, PlainSerializer(address)]
"""A directory of this machine or, where `address` gives gs://, of a bucket."""

InputPath = Annotated[Place, INPUT]
ModelAddress = Annotated[str, INPUT, Field(min_length=1)]
RegisteredName = Annotated[str, Field(pattern=r"^[^/:@'\"]+$")]
Beta = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, lt=0.5)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


Engine = Annotated[
    Literal["hf", "nemo"],
    Field(description="Who does it: hf (transformers, one process) or nemo (NeMo and Megatron, one process per GPU)."),
]
