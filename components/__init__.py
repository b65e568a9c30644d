"""Kubeflow's view: one component per stage, in the order of the flow, and one per deciding task."""

from minitron.components.prepare import prepare  # isort: skip
from minitron.components.finetune import finetune  # isort: skip
from minitron.components.prune import prune  # isort: skip
from minitron.components.distill import distill  # isort: skip
from minitron.components.evaluate import evaluate  # isort: skip
from minitron.components.register import register  # isort: skip
from minitron.components.plan import plan  # isort: skip
from minitron.components.resolve import resolve  # isort: skip
from minitron.components.promote import promote  # isort: skip
from minitron.components.conclude import conclude  # isort: skip
from minitron.components.select import select  # isort: skip
from minitron.components.trial import trial  # isort: skip

__all__ = [  # noqa: RUF022  (order of the flow)
    "prepare",
    "finetune",
    "prune",
    "distill",
    "evaluate",
    "register",
    "plan",
    "resolve",
    "promote",
    "conclude",
    "select",
    "trial",
]
