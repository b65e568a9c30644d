"""Checks of a plan before anything is uploaded or a GPU is paid for.

docs/explanation/architecture.md says what is checked when.
"""

from collections.abc import Iterable
from typing import Any

from minitron.config.document import Plan
from minitron.config.fields import Fault
from minitron.config.parse import SectionError
from minitron.engines.plan_checks import find_plan_faults
from minitron.errors import MinitronError
from minitron.runtime.model_sources import read_architecture


def check_plan(plan: Plan, faults: Iterable[Fault] = (), ask_once: bool = False) -> tuple[dict[str, Any] | None, str]:
    """Check what can be known without weights and without a GPU.

    Args:
        plan: the settings; each section is checked already.
        faults: what the caller has found; it is reported with the rest.
        ask_once: True: ask a hub for the teacher once; what does not answer is checked by plan.

    Returns:
        The teacher's config.json, or None and the reason why it cannot be read yet.

    Raises:
        SectionError: something cannot work; the message lists all of it.
    """
    architecture, reason = None, ""
    try:
        architecture = read_architecture(plan.pipeline.teacher, ask_once)
    except MinitronError as error:
        reason = str(error)
    if found := [*faults, *find_plan_faults(plan, architecture)]:
        raise SectionError(found)
    return architecture, reason
