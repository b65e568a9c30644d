"""Gates as a preset declares them: bounds on the student's metrics. registry/gates.py judges them."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from minitron.config.fields import Fault
from minitron.config.metrics import NUMBERS


class Gate(BaseModel):
    """A bound on a metric of the student, or on its difference from or ratio to another model's.

    `teacher_before` is the teacher that you give, `teacher` the corrected one. The champion changes with every
    promotion, so only a bound against a teacher limits the loss of a chain of promotions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    against: Literal["teacher_before", "teacher", "champion"] | None = None
    by: Literal["difference", "ratio"] | None = None
    at_most: FiniteFloat | None = None
    at_least: FiniteFloat | None = None

    @model_validator(mode="before")
    @classmethod
    def _default_to_difference(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("against") and not values.get("by"):
            return values | {"by": "difference"}
        return values

    @model_validator(mode="after")
    def _check_bound(self) -> "Gate":
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(f"gate on {self.metric}: needs one bound; give either at_most or at_least")
        if self.by and not self.against:
            raise ValueError(
                f"gate on {self.metric}: by={self.by} needs `against` (teacher_before, teacher or champion)"
            )
        return self

    @model_serializer(mode="wrap")
    def _drop_unset(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out unset keys, because Kubeflow's parameters cannot be null."""
        return {name: value for name, value in serialize(self).items() if value is not None}

    @property
    def bound(self) -> str:
        """Name of the bound that is set."""
        return "at_least" if self.at_most is None else "at_most"


def find_gate_faults(gates: list[Gate], tasks: list[str], has_other_text: bool) -> Iterator[Fault]:
    """Find gates on metrics that evaluate does not measure: they could never be met.

    Args:
        gates: gates of the student.
        tasks: measured lm-eval tasks; their metrics begin with the task's name.
        has_other_text: True if `evaluate.out_of_domain` is set.
    """
    remedy = (
        f"; give one of {', '.join(NUMBERS)}, or TASK_acc of a task in evaluate.tasks ({', '.join(tasks) or 'none'})"
    )
    for number, gate in enumerate(gates):
        key = f"gates.{number}.metric"
        if gate.metric not in NUMBERS and not any(gate.metric.startswith(f"{task}_") for task in tasks):
            yield Fault(key, f"{gate.metric} is not measured{remedy}")
            remedy = ", either"
        if gate.metric == "out_of_domain_loss" and not has_other_text:
            yield Fault(key, "out_of_domain_loss needs evaluate.out_of_domain; give a text")
        if (gate.metric, gate.against, gate.by) == ("kl", "teacher", "ratio"):
            yield Fault(key, "kl is 0 for the teacher, so there is no ratio to it; leave out `against`")
