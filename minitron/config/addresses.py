"""The addresses of a plan's models and texts, and the checks of an address before anything is read from it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from minitron.config.document import Plan
from minitron.config.fields import HUB_DATASET, INPUT, Fault, format_address
from minitron.config.parse import find_marked_fields
from minitron.config.settings import list_parts
from minitron.config.stages import SETTINGS

_MODELS = {
    "file": "a path",
    "hf": "hf://org/name[@revision]",
    "gs": "gs://bucket/path",
    "models": "models:/NAME@alias",
    "ngc": "ngc://org/team/model:version",
}
_TEXTS = {"file": "a path", "hf": "hf://dataset[@revision][/config]", "gs": "gs://bucket/path"}

SAMPLES = ("sample://tiny/teacher", "sample://tiny/corpus", "sample://tiny/tasks")
"""Inputs of the preset `tiny`, which the task that needs one makes (engines/samples.py). No message offers them: what
they train is of no use."""


class Address(NamedTuple):
    """An address, and whether it is of text, not of a model or files."""

    text: str
    is_text: bool

    @property
    def scheme(self) -> str:
        """The part before `:/`; for a path, `file`."""
        match = re.match(r"([\w+.-]+):/", self.text)
        return match[1] if match else "file"

    @property
    def path(self) -> Path | None:
        """The path on the task's machine; None if the address is not a path."""
        return Path(self.text.removeprefix("file://")) if self.scheme == "file" else None


def list_addresses(plan: Plan) -> dict[str, Address]:
    """Return the addresses that the user of a plan gives, by their keys."""
    addresses = {"teacher": Address(plan.pipeline.teacher, False)}
    parts = list_parts(plan.pipeline.corpus)
    for number, part in enumerate(parts):
        addresses[f"corpus.{number}.address" if len(parts) > 1 else "corpus"] = Address(part.address, True)
    for stage, model in SETTINGS.items():
        for name in find_marked_fields(model, INPUT):
            if (value := getattr(plan.stages[stage], name)) is not None:
                is_text = name in find_marked_fields(model, HUB_DATASET)
                addresses[f"{stage}.{name}"] = Address(format_address(value), is_text)
    return addresses


def find_scheme_faults(key: str, address: Address) -> Iterator[Fault]:
    """Find an address whose scheme is not supported."""
    known = _TEXTS if address.is_text else _MODELS
    if address.scheme not in known and address.text not in SAMPLES:
        yield Fault(key, f"{address.text}: unknown scheme '{address.scheme}:'; give {_join_forms(known)}")


def find_missing_paths(plan: Plan, volume: Path | None) -> Iterator[Fault]:
    """Find missing paths: relative ones, and those in a volume that this process and all tasks see."""
    for key, address in list_addresses(plan).items():
        path = address.path
        if path is None or path.exists():
            continue
        if not path.is_absolute():
            yield Fault(key, f"{path}: no such file or directory in {Path.cwd()}; give an existing path")
        elif volume and path.is_relative_to(volume):
            yield Fault(key, f"{path}: no such file or directory; give an existing path")


def find_cluster_faults(plan: Plan, volume: str) -> Iterator[Fault]:
    """Find paths that the tasks' pods cannot see; pods see only the volume and their image."""
    for key, address in list_addresses(plan).items():
        if address.path and not address.path.is_absolute():
            forms = (_TEXTS if address.is_text else _MODELS) | {"file": f"a path in the workspace, {volume}/…"}
            yield Fault(
                key,
                f"{address.text} is a path on this machine, which the cluster's tasks cannot see; give "
                f"{_join_forms(forms)}",
            )


def _join_forms(forms: dict[str, str]) -> str:
    *first, last = forms.values()
    return f"{', '.join(first)} or {last}"
