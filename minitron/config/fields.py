"""Types of the fields of settings and configurations, and the marks that say how a field counts."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PlainSerializer

INPUT = "input"
"""Marks a field that names data. The content, not the path, decides whether a result can be reused."""

HUB_DATASET = "hub dataset"
"""Marks an input whose hf:// address names a dataset on the hub. Its commit identifies its content."""

EXECUTION = "execution"
"""Marks a field that says where and how to run. It changes no result, but for the rounding of sums in another order."""


def format_address(location: Path | str) -> str:
    """Format a location as an address; pathlib turns gs://bucket into gs:/bucket, and this undoes it."""
    return re.sub(r"^(gs|hf):/(?!/)", r"\1://", str(location))


Location = Annotated[Path, PlainSerializer(format_address)]
"""A directory of this machine or, if `format_address` returns gs://…, of a bucket."""


InputPath = Annotated[Location, INPUT]
ModelAddress = Annotated[str, INPUT, Field(min_length=1)]
RegisteredName = Annotated[str, Field(pattern=r"^[^/:@'\"]+$")]
Beta = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, lt=0.5)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


Engine = Annotated[
    Literal["hf", "nemo"],
    Field(description="Engine: hf (transformers, one process) or nemo (NeMo and Megatron, one process per GPU)."),
]
