"""The settings that decide a student's shape: those of prune, the lists of what to keep, and a search's budget."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from minitron.config.fields import EXECUTION, INPUT, Fault, Location, Positive
from minitron.config.settings import EngineSettings, Settings

PRUNED_AXES = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "key_value": "num_key_value_heads",
    "layers": "num_hidden_layers",
}
"""The axes that prune can cut, by their names in pruning.json; and their sizes, by their names in config.json."""

PRUNED_SIZES = (*PRUNED_AXES.values(),)
"""The sizes that prune can change."""

Indices = Annotated[list[NonNegativeInt], Field(min_length=1)]


class Kept(Settings):
    """What a student keeps of its teacher, counted from 0: the content of the file that `prune.keep` names.

    Axes that are left out are chosen. pruning.json of a student has the same form under `kept`.
    """

    layers: Indices | None = Field(None, description="Layers.")
    hidden: Indices | None = Field(None, description="Channels of the residual stream.")
    intermediate: list[Indices] | None = Field(None, description="MLP channels, one list per kept layer.")
    heads: list[Indices] | None = Field(None, description="Query heads, one list per kept layer.")
    key_value: list[Indices] | None = Field(None, description="Key-value groups, one list per kept layer.")

    @field_validator("*")
    @classmethod
    def _sort(cls, lists: list[Any] | None) -> list[Any] | None:
        if lists and isinstance(lists[0], list):
            return [_sort_indices(indices, f" in list {number}") for number, indices in enumerate(lists, start=1)]
        return _sort_indices(lists, "") if lists else lists

    @field_validator("intermediate", "heads", "key_value")
    @classmethod
    def _compare_lengths(cls, lists: list[list[int]] | None) -> list[list[int]] | None:
        for number, indices in enumerate(lists or [], start=1):
            if lists and len(indices) != len(lists[0]):
                raise ValueError(
                    f"list {number} has {len(indices)} entries, but list 1 has {len(lists[0])}; keep equally many in "
                    "every layer"
                )
        return lists

    def find_faults(self) -> Iterator[Fault]:
        """Find lists that are not one per kept layer."""
        for axis in ("intermediate", "heads", "key_value"):
            lists = getattr(self, axis)
            if self.layers and lists is not None and len(lists) != len(self.layers):
                yield Fault(axis, f"{len(lists)} lists for {len(self.layers)} layers; give one per kept layer")

    def compute_sizes(self) -> dict[str, int]:
        """Return the student's sizes that follow from the lists."""
        lists = {axis: indices for axis, indices in self if indices is not None}
        return {
            PRUNED_AXES[axis]: len(indices[0] if isinstance(indices[0], list) else indices)
            for axis, indices in lists.items()
        }


def _sort_indices(indices: list[int], where: str) -> list[int]:
    """Return indices in ascending order.

    Raises:
        ValueError: one is there twice.
    """
    ordered = sorted(indices)
    for index, following in pairwise(ordered):
        if index == following:
            raise ValueError(f"{index} is listed twice{where}; remove one")
    return ordered


class PruneSettings(EngineSettings):
    """Teacher → smaller student. Sizes that are not set stay as they are."""

    method: Literal["minitron", "compensated"] = Field(
        "minitron",
        description="minitron: the weights that are kept stay as they are. compensated: they are refitted to what the "
        "teacher computes, layer by layer, without training. MLP channels and heads are chosen by what the others "
        "cannot replace, and fewer hidden channels are principal components of the teacher's states. Engine hf "
        "computes it, whichever engine trains.",
    )
    hidden_size: PositiveInt | None = Field(None, description="Width of the residual stream.")
    intermediate_size: PositiveInt | None = Field(None, description="Width of the MLP.")
    num_attention_heads: PositiveInt | None = Field(None, description="Query heads per layer.")
    num_key_value_heads: PositiveInt | None = Field(None, description="Key-value heads (groups) per layer.")
    num_hidden_layers: PositiveInt | None = Field(
        None, description="Layers to keep; `layers_by` says which are dropped."
    )
    layers_by: Literal["influence", "loss"] = Field(
        "influence",
        description="influence: the layers with the lowest block influence are dropped, all of them by one pass. loss: "
        "one after the other is dropped, the one without which the loss is lowest; for method compensated the seam is "
        "refitted before. Engine hf measures it, with the whole teacher in memory (a GPU's, if there is one).",
    )
    drop_layers: list[PositiveInt] | None = Field(
        None, description="Numbers of the layers to drop, from 1, chosen by hand."
    )
    keep: Annotated[Location | None, INPUT] = Field(
        None,
        description="JSON or YAML file that lists what to keep, counted from 0: any of layers, hidden, intermediate, "
        "heads and key_value, in the form of `kept` in pruning.json, or a pruning.json itself. The sizes follow from "
        "the lists; axes without one are chosen. Engine hf reads it.",
    )
    calibration_sequences: PositiveInt = Field(
        1024,
        description="Training sequences that importance is measured on. Method compensated fits on them, too, and "
        "holds their states in memory: 16 bytes per token and hidden channel.",
    )
    importance: Annotated[Location | None, INPUT, EXECUTION] = Field(
        None,
        description="Scores of the same teacher and calibration that an earlier prune wrote, so that they are not "
        "measured again: its directory, or its importance.safetensors. Scores in the workspace are found without this "
        "setting. Engine hf reads them.",
    )

    @model_validator(mode="before")
    @classmethod
    def _prune_with_hf(cls, values: dict[str, Any]) -> dict[str, Any]:
        chooses = values.get("method") == "compensated" or values.get("layers_by") == "loss"
        needs_hf = chooses or values.get("importance") or values.get("keep")
        return {**values, "engine": "hf"} if needs_hf else values

    def find_faults(self) -> Iterator[Fault]:
        """Find what contradicts itself without a teacher; engines/plan_checks.py compares with one."""
        if self.gpus > 1 and self.engine == "nemo":  # you would pay for them while they are idle
            yield Fault("gpus", f"{self.gpus}, but engine nemo prunes on one GPU; set gpus to 1, or engine to hf")
        if self.drop_layers is not None and self.num_hidden_layers is not None:
            yield Fault("drop_layers", "num_hidden_layers is given, too; choose one of them")

    def with_sizes_of(self, kept: Kept) -> Self:
        """Return the settings with the sizes that follow from the lists."""
        return self.model_copy(update=kept.compute_sizes())

    def compute_student_sizes(self, teacher: Mapping[str, int]) -> dict[str, int]:
        """Return the student's sizes, by their names in config.json, from the teacher's.

        If only num_key_value_heads is set, each kept group keeps all its query heads, so num_attention_heads shrinks
        with it. If only num_attention_heads is set, every group stays and keeps equally many.
        """
        sizes = {name: getattr(self, name) or teacher[name] for name in PRUNED_SIZES}
        if self.num_key_value_heads and not self.num_attention_heads:
            heads_per_group = teacher["num_attention_heads"] // teacher["num_key_value_heads"]
            sizes["num_attention_heads"] = self.num_key_value_heads * heads_per_group
        if self.drop_layers:
            sizes["num_hidden_layers"] = teacher["num_hidden_layers"] - len(set(self.drop_layers))
        return sizes


class SearchSettings(Settings):
    """Budget → the sizes of the best student that meets it, found by a race (pipeline search)."""

    parameters: PositiveInt | None = Field(None, description="Budget: most parameters of the student.")
    memory_gb: Positive | None = Field(
        None, description="Budget: most GB (1e9 bytes) of the student's weights and key-value cache, in their dtype."
    )
    latency_ms: Positive | None = Field(
        None, description="Budget: most milliseconds of the student's forward pass, measured where the race runs."
    )
    batch: PositiveInt = Field(1, description="Sequences in the key-value cache, or in the measured forward pass.")
    context: PositiveInt = Field(4096, description="Tokens of each of these sequences.")
    tolerance: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="Share of the budget that a candidate may leave unused."
    )
    candidates: Annotated[int, Field(ge=2, le=64)] = Field(8, description="Shapes that start in the race.")
    calibration_sequences: PositiveInt = Field(
        64, description="Calibration sequences of the candidates' cuts; the winner is cut anew with those of prune."
    )
    short_steps: PositiveInt = Field(10, description="Steps of distillation of the better half of the candidates.")
    long_steps: PositiveInt = Field(30, description="Steps of distillation of the best quarter, again from the cut.")

    @property
    def budget(self) -> tuple[str, float] | None:
        """The setting that is the budget, and its value; None: there is no budget."""
        return next(((name, value) for name in BUDGETS if (value := getattr(self, name)) is not None), None)

    def find_faults(self) -> Iterator[Fault]:
        """Find more than one budget."""
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            yield Fault(given[1], f"{given[0]} is given, too; a search has one budget, so remove one of them")


PARALLEL_TRIALS = 4
"""Candidates that a cluster tries at the same time; `minitron run` tries one after the other."""

BUDGETS = ("parameters", "memory_gb", "latency_ms")
"""The settings of a search of which exactly one is given."""
