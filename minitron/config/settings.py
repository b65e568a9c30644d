"""The settings of every stage, one frozen model each: the only place where a setting and its default are written.

A preset has one section per stage, and a component takes it as its parameter `settings`:

    prune(teacher=..., dataset=..., settings=PruneSettings(intermediate_size=9216).as_settings())
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

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
    Weight,
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
        1, description="Nodes to train on; above 1, the task starts a Kubeflow TrainJob and follows it."
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
        if self.engine == "hf" and self.model_parallel_size > 1:
            yield Fault(
                "tensor_parallel_size",
                f"tensor, pipeline and context parallel sizes multiply to {self.model_parallel_size}, but engine hf "
                "divides only batches and parameters among its GPUs; use engine nemo, or set all of them to 1",
            )
        if self.engine == "hf":
            yield from self.find_division_faults(
                self.num_nodes * self.gpus_per_node if self.num_nodes > 1 else self.gpus or 1
            )
        if self.num_nodes > 1 and self.gpus:
            yield Fault(
                "gpus",
                f"{self.gpus}, but with num_nodes {self.num_nodes} the task itself only waits; set gpus to 0 "
                "(gpus_per_node sets the GPUs of each node)",
            )

    def find_division_faults(self, processes: int) -> Iterator[Fault]:
        """Find a global batch whose micro-batches engine hf cannot divide equally among its processes."""
        whole = self.micro_batch_size * processes
        if self.global_batch_size % whole and not self.global_batch_size % self.micro_batch_size:
            yield Fault(
                "global_batch_size",
                f"{self.global_batch_size} is not a multiple of micro_batch_size {self.micro_batch_size} x {processes} "
                f"GPUs = {whole}; choose {self.global_batch_size // whole * whole or whole} or another multiple, or "
                "lower micro_batch_size",
            )

    @property
    def model_parallel_size(self) -> int:
        """GPUs that hold one copy of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size


def find_idle_gpus(what: str, gpus: int, remedy: str) -> Iterator[Fault]:
    """Find GPUs that you would pay for while they are idle."""
    if gpus > 1:
        yield Fault("gpus", f"{gpus}, but {what} runs in one process, on one GPU; {remedy}")


class FinetuneSettings(TrainingSettings):
    """Teacher → corrected teacher (cross-entropy on the corpus)."""

    enabled: bool = Field(True, description="False: skip the training and pass on the teacher unchanged.")


class DistillSettings(TrainingSettings):
    """Teacher and pruned student → trained student (forward KL on logits)."""

    temperature: Positive = Field(
        1.0, description="Softens both distributions; the divergence is scaled by its square."
    )
    divergence_beta: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="Divergence from the teacher: 0 is the forward KL, 1 the reverse KL, and a number between them the "
        "generalized Jensen-Shannon divergence of that beta, as in GKD; 0.5 is the symmetric one.",
    )
    kl_weight: Weight = Field(
        1.0,
        description="Weight of the divergence from the teacher; two numbers, such as [1, 0.5], are its values at the "
        "first and at the last step (engine hf).",
    )
    cross_entropy_weight: Weight = Field(
        0.0, description="Weight of the cross-entropy on the corpus; two numbers as for kl_weight."
    )
    intermediate_layers: list[tuple[PositiveInt, PositiveInt]] = Field(
        [],
        description="Pairs of student and teacher layers, from 1, whose outputs are matched: the mean of "
        "1 - cosine similarity is added to the loss.",
    )
    intermediate_weight: Weight = Field(
        (1.0, 0.0),
        description="Weight of that mean; two numbers as for kl_weight. Engine nemo scales it to the KL instead.",
    )
    cut_learning_rate_factor: Positive = Field(
        1.0, description="Factor of the learning rate for the matrices that prune cut or refitted (engine hf)."
    )

    teacher_cache: Literal["sampled", "top_k"] | None = Field(
        None,
        description="Keep a part of the teacher's distribution of every training token in the workspace, computed once "
        "for all students, and train without the teacher in memory. sampled: tokens drawn from it, whose mean "
        "gradient is the exact one. top_k: the most probable tokens; the student learns that all others are "
        "impossible. None: the teacher runs in every step.",
    )
    teacher_cache_size: Annotated[int, Field(ge=1, le=255)] = Field(
        50, description="Draws per token, or most probable tokens that are kept."
    )

    def find_faults(self) -> Iterator[Fault]:
        """Find also a loss without terms, and terms that the engine does not support."""
        yield from super().find_faults()
        for place, when in enumerate(("first", "last")):
            if not any(
                weight[place] for weight in (read_weight(self.kl_weight), read_weight(self.cross_entropy_weight))
            ):
                yield Fault(
                    "kl_weight", f"at the {when} step it is 0, and so is cross_entropy_weight; raise one of them"
                )
                break
        if self.teacher_cache:
            needs = {
                "engine": "hf",
                "temperature": 1.0,
                "divergence_beta": 0.0,
                "intermediate_layers": [],
                "num_nodes": 1,
            }
            for name, needed in needs.items():
                if (found := getattr(self, name)) != needed:
                    yield Fault("teacher_cache", f"it needs {name} {needed}, not {found}; set that, or leave it out")
        if self.engine == "nemo":
            yield from self._find_faults_of_nemo()

    def _find_faults_of_nemo(self) -> Iterator[Fault]:
        if self.divergence_beta:
            yield Fault(
                "divergence_beta",
                f"{self.divergence_beta}, but engine nemo has only the forward KL; use engine hf, or set it to 0",
            )
        for name in ("kl_weight", "cross_entropy_weight"):
            if isinstance(weight := getattr(self, name), tuple):
                yield Fault(
                    name, f"{list(weight)}, but engine nemo has no schedules; use engine hf, or give one number"
                )
        if self.cut_learning_rate_factor != 1:
            yield Fault(
                "cut_learning_rate_factor",
                f"{self.cut_learning_rate_factor}, but engine nemo has one learning rate; use engine hf, or set 1",
            )
        if self.intermediate_weight != type(self).model_fields["intermediate_weight"].default:
            yield Fault("intermediate_weight", "engine nemo scales this loss to the KL; use engine hf, or leave it out")


def read_weight(weight: float | tuple[float, float]) -> tuple[float, float]:
    """Return the weight at the first and at the last step."""
    return weight if isinstance(weight, tuple) else (weight, weight)


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
        yield from find_idle_gpus("evaluate", self.gpus, "set gpus to 1")
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


class Resources(Settings):
    """Resources of a stage's task on a cluster; in a preset they are in the stage's section."""

    cpu: str | None = Field(
        None,
        coerce_numbers_to_str=True,
        pattern=r"^\d+(\.\d+)?m?$",
        description="CPU cores of the task; none: 8 per GPU, at least 8, and 2 for register.",
    )
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


RESOURCES: dict[str, Resources] = {
    "prepare": Resources(),
    **dict.fromkeys(("finetune", "prune", "distill", "evaluate"), GpuResources()),
    "register": Resources(),
}
"""Default resources of every stage's task; only stages that use GPUs get one."""
