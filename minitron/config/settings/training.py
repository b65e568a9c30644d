"""The settings of the stages that train: finetune and distill."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from minitron.config.fields import EXECUTION, Beta, Fault, NonNegative, Positive, Weight
from minitron.config.settings.base import EngineSettings


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
