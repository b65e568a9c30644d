"""Check a plan before anything is uploaded and before you pay for a GPU.

docs/explanation/architecture.md lists which check runs when.
"""

from collections.abc import Iterable
from typing import Any

from minitron.config.document import Plan
from minitron.config.fields import Fault
from minitron.config.parse import SectionError
from minitron.config.resources import ASSUMED, Models, count_models
from minitron.config.settings import FinetuneSettings
from minitron.config.shapes import PruneSettings
from minitron.engines.plan_checks import find_plan_faults, find_size_faults
from minitron.errors import MinitronError
from minitron.runtime.candidates import find_budget_faults
from minitron.runtime.model_sources import read_architecture


def check_plan(plan: Plan, faults: Iterable[Fault] = (), ask_once: bool = False) -> tuple[dict[str, Any] | None, str]:
    """Check a plan as far as possible without weights and without a GPU.

    Args:
        plan: the settings, whose sections are already checked.
        faults: faults that the caller has found; they are reported with the others.
        ask_once: True: ask a hub for the teacher only once; if it does not answer, the task plan checks the teacher.

    Returns:
        The teacher's config.json, or None and the reason why it cannot be read yet.

    Raises:
        SectionError: the plan has faults; the message lists all of them.
    """
    architecture, reason = None, ""
    try:
        architecture = read_architecture(plan.pipeline.teacher, ask_once)
    except MinitronError as error:
        reason = str(error)
    found = [*faults, *find_plan_faults(plan, architecture)]
    if architecture and not found:
        prune = plan.stages["prune"]
        assert isinstance(prune, PruneSettings)
        found += find_budget_faults(plan.search, architecture, prune)
    if found:
        raise SectionError(found)
    return architecture, reason


def count_plan_models(plan: Plan, architecture: dict[str, Any] | None) -> Models:
    """Count a run's models; if the teacher's config.json cannot be read yet, as if it was Llama-3.1-8B.

    A cut that does not fit that model is left out: then the student counts as large as the teacher.
    """
    prune, finetune = plan.stages["prune"], plan.stages["finetune"]
    assert isinstance(prune, PruneSettings) and isinstance(finetune, FinetuneSettings)
    teachers = 2 if finetune.enabled else 1
    if architecture:
        return count_models(architecture, prune, teachers)
    return (
        Models(teachers=teachers) if list(find_size_faults(prune, ASSUMED)) else count_models(ASSUMED, prune, teachers)
    )
