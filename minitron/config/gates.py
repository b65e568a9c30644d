"""A gate as a preset declares it: a bound on a number of the student. registry/gates.py judges it."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from minitron.config.metrics import NUMBERS

if TYPE_CHECKING:
    from minitron.config.settings import EvaluateSettings


class Gate(BaseModel):
    """A bound on a number of the student, or on its difference or ratio to that of another model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    against: Literal["teacher", "champion"] | None = None
    by: Literal["difference", "ratio"] | None = None
    at_most: FiniteFloat | None = None
    at_least: FiniteFloat | None = None

    @model_validator(mode="before")
    @classmethod
    def _difference_is_the_usual_way(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("against") and not values.get("by"):
            return values | {"by": "difference"}
        return values

    @model_validator(mode="after")
    def _has_one_bound(self) -> "Gate":
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(f"the gate on {self.metric} needs one of at_most and at_least: give that")
        if self.by and not self.against:
            raise ValueError(f"the gate on {self.metric} is by {self.by}, of what is not said: give against")
        return self

    @model_serializer(mode="wrap")
    def _what_was_given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what was not given: Kubeflow's parameters know no null."""
        return {name: value for name, value in serialize(self).items() if value is not None}

    @property
    def bound(self) -> str:
        """Which of the two bounds it has."""
        return "at_least" if self.at_most is None else "at_most"


def check(config: "EvaluateSettings") -> None:
    """Refuse a gate on something that is not measured.

    Raises:
        ValueError: there is one.
    """
    for place, gate in enumerate(config.gates):
        is_task = any(gate.metric.startswith(f"{task}_") for task in config.tasks)
        if gate.metric not in NUMBERS and not is_task:
            raise ValueError(
                f"gates.{place}.metric: {gate.metric} is not measured; give one of {', '.join(NUMBERS)}, or "
                f"TASK_acc of a task in evaluate.tasks ({', '.join(config.tasks) or 'there is none'})"
            )
        if gate.metric == "out_of_domain_loss" and config.out_of_domain is None:
            raise ValueError(f"gates.{place}.metric: out_of_domain_loss needs evaluate.out_of_domain; give the text")
