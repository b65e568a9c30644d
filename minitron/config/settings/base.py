"""What the settings of all stages share: one frozen model per section."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationInfo, field_validator, model_validator

from minitron.config.fields import EXECUTION, Engine, Fault, Faults, read_scalar


class Settings(BaseModel):
    """A section of a preset; it is frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _read_scalar(cls, value: Any, info: ValidationInfo) -> Any:
        return read_scalar(cls.model_fields[str(info.field_name)].annotation, value)

    @model_validator(mode="after")
    def _refuse_faults(self) -> "Settings":
        if faults := list(self.find_faults()):
            raise Faults(faults)
        return self

    def find_faults(self) -> Iterator[Fault]:
        """Find settings that contradict each other; each has the right type."""
        yield from ()

    def as_settings(self) -> dict[str, Any]:
        """Return the settings that were set, without defaults, in the form of a component's parameter `settings`."""
        return self.model_dump(mode="json", exclude_unset=True)


class StageSettings(Settings):
    """Settings of every stage."""

    seed: int = Field(1234, description="Seed of every random choice.")
    caching: Annotated[bool, EXECUTION] = Field(
        True, description="Reuse a finished result with the same settings and the same content of its inputs."
    )
    gpus: Annotated[int, Field(ge=0), EXECUTION] = Field(
        0, description="GPUs of the task, which stops at once if it sees fewer."
    )
    expected_sha256: Annotated[dict[str, str], EXECUTION] = Field(
        {},
        description="SHA-256 that inputs must have, by name, such as {corpus: 0f3a…}; the stage refuses other content. "
        "minitron reproduce writes it.",
    )


class SequenceSettings(StageSettings):
    """Settings of every stage that runs a model on packed sequences."""

    sequence_length: PositiveInt = Field(8192, description="Tokens per packed sequence.")
    micro_batch_size: Annotated[PositiveInt, EXECUTION] = Field(4, description="Sequences per forward pass.")


class EngineSettings(SequenceSettings):
    """Settings of every stage that an engine works for."""

    engine: Engine = "hf"
