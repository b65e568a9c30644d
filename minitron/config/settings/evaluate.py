"""The settings of evaluate."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from minitron.config.fields import EXECUTION, HUB_DATASET, INPUT, Fault, Location
from minitron.config.gates import Gate, find_gate_faults
from minitron.config.settings.base import SequenceSettings


class EvaluateSettings(SequenceSettings):
    """Models and data → evaluation.json and report.html."""

    evaluation_sequences: PositiveInt = Field(640, description="Sequences per split, at most.")
    tasks: list[str] = Field([], description="lm-eval tasks.")
    task_directory: Annotated[Location | None, INPUT] = Field(
        None, description="Directory of local lm-eval task files."
    )
    task_limit: PositiveInt | None = Field(None, description="Questions per task; none: all.")
    num_fewshot: NonNegativeInt | dict[str, NonNegativeInt] | None = Field(
        None,
        description="Solved examples before each question: one number for all tasks, or a number per task, such as "
        "{mmlu: 5, arc_challenge: 25}; none: each task's default.",
    )
    unsafe_tasks: Annotated[list[str], EXECUTION] = Field(
        [],
        description="Tasks that may run code that a model writes, such as humaneval; such tasks are refused unless you "
        "name them here.",
    )
    prompts: list[Annotated[str, Field(min_length=1)]] = Field(
        ["The history of the city began", "In physics, energy is"],
        min_length=1,
        description="Prompts that every model continues.",
    )
    generation_tokens: PositiveInt = Field(48, description="New tokens per prompt.")
    out_of_domain: Annotated[str | None, INPUT, HUB_DATASET] = Field(
        None,
        description="Text unlike the corpus, addressed like it; shows how much compression lost on other text.",
    )
    champion: Annotated[str | None, INPUT] = Field(
        None, description="Model in production, measured on the same data for comparison: models:/NAME@champion."
    )
    gates: list[Gate] = Field(
        [],
        description="Bounds that a student must meet to be promoted, each {metric, against, by, at_most or at_least}.",
    )

    def find_faults(self) -> Iterator[Fault]:
        """Find gates on metrics that are not measured, and settings for tasks that are not measured."""
        yield from find_gate_faults(self.gates, self.tasks, self.out_of_domain is not None)
        for name in sorted({name for name in self.tasks if self.tasks.count(name) > 1}):
            yield Fault("tasks", f"{name} is listed twice; remove one")
        shots = self.num_fewshot if isinstance(self.num_fewshot, dict) else {}
        for setting, names in (("num_fewshot", [*shots]), ("unsafe_tasks", self.unsafe_tasks)):
            for name in names:
                if name not in self.tasks:
                    yield Fault(
                        setting,
                        f"{name} is not in evaluate.tasks ({', '.join(self.tasks) or 'none'}); correct or remove it",
                    )
