"""The settings of every stage, one frozen model each: the only place where a setting and its default are written.

A preset has one section per stage, and a component takes it as its parameter `settings`:

    prune(teacher=..., dataset=..., settings=PruneSettings(intermediate_size=9216).as_settings())
"""

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from minitron.config.fields import (
    EXECUTION,
    HUB_DATASET,
    INPUT,
    Beta,
    Engine,
    Fault,
    Faults,
    Fraction,
    Location,
    NonNegative,
    Positive,
    RegisteredName,
    read_scalar,
)
from minitron.config.gates import Gate, find_gate_faults


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


class PrepareSettings(StageSettings):
    """Corpus → deduplicated, split, tokenized dataset."""

    text_field: str = Field("text", description="Field of a JSON or Parquet record that holds the text.")
    document_separator: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Text between two documents of a .txt file, such as a blank line; none: the file is one document, "
        "or articles if it is WikiText's.",
    )
    own_splits: bool = Field(
        True,
        description="Use the corpus's own validation and test splits if it has them; False: divide all documents by "
        "the fractions.",
    )
    validation_fraction: Fraction = Field(
        0.01, description="Share of the documents kept for validation, unless the corpus has its own."
    )
    test_fraction: Fraction = Field(
        0.01, description="Share of the documents kept for testing, unless the corpus has its own."
    )
    licence: str = Field("unknown", description="License of the corpus, for the manifest and the model card.")


class SequenceSettings(StageSettings):
    """Settings of every stage that runs a model on packed sequences."""

    sequence_length: PositiveInt = Field(8192, description="Tokens per packed sequence.")
    micro_batch_size: Annotated[PositiveInt, EXECUTION] = Field(4, description="Sequences per forward pass.")


class EngineSettings(SequenceSettings):
    """Settings of every stage that an engine works for."""

    engine: Engine = "hf"


class TrainingSettings(EngineSettings):
    """Settings that fine-tuning and distillation share; the two differ in their loss."""

    max_steps: PositiveInt = Field(30, description="Number of optimizer steps.")
    global_batch_size: PositiveInt = Field(128, description="Sequences per optimizer step.")
    learning_rate: Positive = Field(1e-4, description="Peak learning rate.")
    min_learning_rate: NonNegative = Field(1e-5, description="Learning rate at the end of the cosine schedule.")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(2, description="Steps of linear warm-up.")
    weight_decay: NonNegative = Field(0.1, description="Weight decay (not on norms and biases).")
    adam_beta1: Beta = Field(0.9, description="AdamW's beta 1.")
    adam_beta2: Beta = Field(0.95, description="AdamW's beta 2.")
    gradient_clipping: Positive = Field(1.0, description="Largest norm of the gradient.")
    gradient_checkpointing: Annotated[bool, EXECUTION] = Field(
        False, description="Recompute activations: less memory, one third more time."
    )
    validation_interval: PositiveInt = Field(10, description="Steps between validations; the first is at step 0.")
    validation_sequences: PositiveInt = Field(640, description="Sequences per validation, at most.")
    checkpoint_interval: Annotated[PositiveInt, EXECUTION] = Field(
        10, description="Steps between the checkpoints from which a killed training resumes."
    )
    tensor_parallel_size: Annotated[PositiveInt, EXECUTION] = Field(
        1, description="GPUs that share every layer (engine nemo)."
    )
    pipeline_parallel_size: Annotated[PositiveInt, EXECUTION] = Field(
        1, description="GPUs that each hold a part of the layers (engine nemo)."
    )
    context_parallel_size: Annotated[PositiveInt, EXECUTION] = Field(
        1, description="GPUs that share every sequence (engine nemo)."
    )
    sequence_parallel: Annotated[bool, EXECUTION] = Field(
        False, description="Split also the activations between layers over the tensor-parallel GPUs."
    )
    num_nodes: Annotated[PositiveInt, EXECUTION] = Field(
        1, description="Nodes to train on; above 1, the task starts a Kubeflow TrainJob and follows it (engine nemo)."
    )
    gpus_per_node: Annotated[PositiveInt, EXECUTION] = Field(
        8, description="GPUs of each node, if num_nodes is above 1."
    )

    def find_faults(self) -> Iterator[Fault]:
        """Find sizes, rates and steps that contradict each other, or that the engine does not support."""
        if self.global_batch_size % self.micro_batch_size:
            yield Fault(
                "global_batch_size",
                f"{self.global_batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}; choose a "
                "multiple",
            )
        if self.min_learning_rate > self.learning_rate:
            yield Fault(
                "min_learning_rate", f"{self.min_learning_rate} is above learning_rate {self.learning_rate}; lower it"
            )
        default = TrainingSettings.model_fields["warmup_steps"].default  # the default must not forbid a single step
        if self.max_steps < self.warmup_steps != default:
            yield Fault(
                "warmup_steps",
                f"{self.warmup_steps} is above max_steps {self.max_steps}, so the learning rate would never be "
                f"reached; choose at most {self.max_steps}",
            )
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            yield Fault("sequence_parallel", "needs a tensor_parallel_size above 1; raise that, or set it to false")
        if self.engine == "hf":
            yield from _find_idle_gpus("engine hf", self.gpus, "use engine nemo, or set gpus to 1")
            if self.model_parallel_size > 1:
                yield Fault(
                    "tensor_parallel_size",
                    f"tensor, pipeline and context parallel sizes multiply to {self.model_parallel_size}, but engine "
                    "hf runs in one process; use engine nemo, or set all of them to 1",
                )
        if self.num_nodes > 1 and self.engine == "hf":
            yield Fault("num_nodes", f"{self.num_nodes}, but engine hf runs in one process; use engine nemo")
        if self.num_nodes > 1 and self.gpus:
            yield Fault(
                "gpus",
                f"{self.gpus}, but with num_nodes {self.num_nodes} the task itself only waits; set gpus to 0 "
                "(gpus_per_node sets the GPUs of each node)",
            )

    @property
    def model_parallel_size(self) -> int:
        """GPUs that hold one copy of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size


def _find_idle_gpus(what: str, gpus: int, remedy: str) -> Iterator[Fault]:
    """Find GPUs that you would pay for while they are idle."""
    if gpus > 1:
        yield Fault("gpus", f"{gpus}, but {what} runs in one process, on one GPU; {remedy}")


class FinetuneSettings(TrainingSettings):
    """Teacher → corrected teacher (cross-entropy on the corpus)."""

    enabled: bool = Field(True, description="False: skip the training and pass on the teacher unchanged.")


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
        "teacher computes, layer by layer, without training, and MLP channels and heads are chosen by what the others "
        "cannot replace. Engine hf computes it, whichever engine trains.",
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
        yield from _find_idle_gpus("prune", self.gpus, "set gpus to 1")
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


class DistillSettings(TrainingSettings):
    """Teacher and pruned student → trained student (forward KL on logits)."""

    temperature: Positive = Field(1.0, description="Softens both distributions; the KL is scaled by its square.")
    kl_weight: NonNegative = Field(1.0, description="Weight of the forward KL divergence.")
    cross_entropy_weight: NonNegative = Field(0.0, description="Weight of the cross-entropy on the corpus.")
    intermediate_layers: list[tuple[PositiveInt, PositiveInt]] = Field(
        [], description="Pairs of student and teacher layers, from 1, whose outputs are matched (engine nemo)."
    )

    def find_faults(self) -> Iterator[Fault]:
        """Find also a loss without terms, and terms that the engine does not support."""
        yield from super().find_faults()
        if self.kl_weight == self.cross_entropy_weight == 0:
            yield Fault("kl_weight", "it is 0, and so is cross_entropy_weight; raise one of them")
        if self.engine == "hf" and self.intermediate_layers:
            yield Fault("intermediate_layers", "they need engine nemo; use it, or leave them out")


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
        yield from _find_idle_gpus("evaluate", self.gpus, "set gpus to 1")
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


class RegisterSettings(StageSettings):
    """Student → version in the MLflow registry."""

    name: RegisteredName = Field("minitron", description="Registered model.")
    alias: str = Field("challenger", pattern=r"^[\w-]+$", description="Alias that the new version gets.")

    @model_validator(mode="after")
    def _check_alias(self) -> "RegisterSettings":
        if re.fullmatch(r"latest|v\d+", self.alias, re.IGNORECASE):
            raise ValueError(f"alias {self.alias} is reserved by MLflow; choose another")
        if self.alias.lower() in ("champion", "previous"):
            raise ValueError(f"alias {self.alias} is reserved for promote, which judges the gates; choose another")
        return self


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


class Resources(Settings):
    """Resources of a stage's task on a cluster; in a preset they are in the stage's section."""

    cpu: str = Field("8", coerce_numbers_to_str=True, pattern=r"^\d+(\.\d+)?m?$", description="CPU cores of the task.")
    memory: str | None = Field(
        None,
        coerce_numbers_to_str=True,
        pattern=r"^\d+(\.\d+)?([kMGTP]|[KMGTP]i)?$",
        description="Memory of the task, including /dev/shm; none: the sum on plan's page.",
    )


class GpuResources(Resources):
    """Resources of a task that uses GPUs."""

    gpus: Annotated[int, Field(ge=0)] = Field(1, description="GPUs of the task.")


QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
"""Kueue's label for a pod or a TrainJob that waits in a LocalQueue."""

TRAIN_JOB_QUEUE_LABEL = "minitron.io/train-job-queue"
"""Label of a task's pod that does not queue itself: the queue of the TrainJob that it starts."""

_NAME = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"
"""Pattern of an object's name in Kubernetes."""

_LABEL = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
"""Pattern of a label's value in Kubernetes, and of its key after the prefix."""

_QUEUE = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
"""Pattern of Kueue's LocalQueueName (apis/kueue/v1beta2/localqueue_types.go); a label has at most 63 characters."""


class ClusterConfig(Settings):
    """Settings that Kubeflow reads only from the compiled pipeline; `minitron submit` and `schedule` write them there.

    They are the section `cluster` of a preset.
    """

    service_account: str | None = Field(
        None, pattern=_NAME, description="Service account of the tasks; none: Kubeflow's default."
    )
    shared_memory: str = Field(
        "16Gi", pattern=r"^\d+[KMGT]i$", description="Limit of /dev/shm in every task; it counts toward memory."
    )
    retries: Annotated[int, Field(ge=0)] = Field(
        3, description="Further attempts after one fails or is lost (spot nodes)."
    )
    timeout_hours: PositiveInt = Field(168, description="Most hours that one attempt at a task may take.")
    ttl_hours: PositiveInt = Field(
        168,
        description="Hours that a run's pods and their logs are kept after its end. It needs Kubeflow Pipelines 2.17; "
        "an older one uses Argo's own settings.",
    )
    labels: dict[str, Annotated[str, Field(pattern=rf"^({_LABEL})?$")]] = Field(
        {}, description="Labels of the tasks' pods, for example for cost accounting."
    )
    queue: str | None = Field(
        None,
        description="LocalQueue of Kueue in which every pod and TrainJob with GPUs waits; none: nothing waits. The "
        "wait of a TrainJob counts toward timeout_hours.",
    )

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: dict[str, str]) -> dict[str, str]:
        for key in labels:
            if not re.fullmatch(rf"([a-z0-9.-]{{1,253}}/)?{_LABEL}", key):
                raise ValueError(f"{key!r} cannot be a label; give at most 63 letters, digits, '-', '_' and '.'")
        return labels

    @field_validator("queue")
    @classmethod
    def _check_queue(cls, queue: str | None) -> str | None:
        if queue is not None and not (_QUEUE.fullmatch(queue) and len(queue) <= 63):
            raise ValueError(
                f"{queue!r} cannot be the name of a LocalQueue; give at most 63 lowercase letters, digits, '-' and "
                "'.', with a letter or digit first and last"
            )
        return queue


SETTINGS: dict[str, type[StageSettings]] = {
    "prepare": PrepareSettings,
    "finetune": FinetuneSettings,
    "prune": PruneSettings,
    "distill": DistillSettings,
    "evaluate": EvaluateSettings,
    "register": RegisterSettings,
}
"""Every stage's settings, in the order of the flow."""

RESOURCES: dict[str, Resources] = {
    "prepare": Resources(),
    **dict.fromkeys(("finetune", "prune", "distill", "evaluate"), GpuResources()),
    "register": Resources(cpu="2"),
}
"""Default resources of every stage's task; only stages that use GPUs get one."""
