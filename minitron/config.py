"""The configuration of every stage: one frozen model per stage, the only place a default is written."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PositiveInt,
    model_validator,
)

from minitron import gates
from minitron.gates import Gate
from minitron.validation import validated

INPUT = "input"
"""Marks a field that names data: its content, not its path, decides whether a result can be reused."""

HUB_DATASET = "hub dataset"
"""Marks an input whose hf:// address names a dataset, read over the network: its commit stands for its content."""

EXECUTION = "execution"
"""Marks a field that says where and how to run: it has no influence on the result."""


def address(place: Path | str) -> str:
    """Return a place as it was given: pathlib makes gs:/bucket of gs://bucket."""
    return re.sub(r"^(gs|hf):/(?!/)", r"\1://", str(place))


Place = Annotated[Path, PlainSerializer(address)]
"""A directory of this machine or, where `address` gives gs://, of a bucket."""

InputPath = Annotated[Place, INPUT]
ModelAddress = Annotated[str, INPUT]
RegisteredName = Annotated[str, Field(pattern=r"^[^/:@'\"]+$")]
Beta = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, lt=0.5)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


Engine = Annotated[
    Literal["hf", "nemo"],
    Field(description="Who does it: hf (transformers, one process) or nemo (NeMo and Megatron, one process per GPU)."),
]


class StageConfig(BaseModel):
    """What every stage has: where it writes, where it reports, and its seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: Annotated[Place, EXECUTION] = Field(
        description="Directory the stage writes, or gs://bucket/path; it appears when complete."
    )
    workspace: Annotated[Place | None, EXECUTION] = Field(
        None,
        description="Directory that outlives the task, or gs://bucket/path: a killed stage resumes (from a bucket: in "
        "the volume MINITRON_CACHE), a finished one is reused from it.",
    )
    tracking_uri: Annotated[str | None, EXECUTION] = Field(None, description="MLflow server; none: no logging.")
    experiment: Annotated[str, EXECUTION] = Field("minitron", description="MLflow experiment.")
    pipeline_run_id: Annotated[str | None, EXECUTION] = Field(
        None, description="Kubeflow run that this stage belongs to: the stages of one run share an MLflow parent run."
    )
    caching: Annotated[bool, EXECUTION] = Field(
        True, description="Reuse a finished result that has the same inputs' content and settings."
    )
    gpus: Annotated[int, Field(ge=0), EXECUTION] = Field(
        0, description="GPUs that the task asked for: it stops at once where it sees fewer."
    )
    seed: int = Field(1234, description="Seed of every random choice.")


class PrepareConfig(StageConfig):
    """Corpus → deduplicated, split, tokenised dataset."""

    corpus: Annotated[str, INPUT, HUB_DATASET] = Field(
        description="Text: .txt, .jsonl(.gz/.zst), .json or .parquet, a directory of them, gs://bucket/path of either, "
        "or hf://dataset[/config]."
    )
    teacher: ModelAddress = Field(description="Model whose tokenizer is used; its address is finetune's.")
    text_field: str = Field("text", description="Field of a JSON or Parquet record that holds the text.")
    validation_fraction: Fraction = Field(0.01, description="Share of the documents kept for validation.")
    test_fraction: Fraction = Field(0.01, description="Share of the documents kept for the test.")
    licence: str = Field("unknown", description="Licence of the corpus, carried into manifest and model card.")


class SequenceConfig(StageConfig):
    """What every stage that runs a model on packed sequences has."""

    dataset: InputPath = Field(description="Directory written by prepare.")
    sequence_length: PositiveInt = Field(8192, description="Tokens per packed sequence.")
    micro_batch_size: PositiveInt = Field(4, description="Sequences per forward pass.")


class TrainingConfig(SequenceConfig):
    """What fine-tuning and distillation share: they differ by their loss."""

    engine: Engine = "hf"
    max_steps: PositiveInt = Field(30, description="Optimizer steps.")
    global_batch_size: PositiveInt = Field(128, description="Sequences per optimizer step.")
    learning_rate: Positive = Field(1e-4, description="Peak learning rate.")
    min_learning_rate: NonNegative = Field(1e-5, description="Learning rate at the end of the cosine.")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(2, description="Steps of linear warm-up.")
    weight_decay: NonNegative = Field(0.1, description="Weight decay (not on norms and biases).")
    adam_beta1: Beta = Field(0.9, description="AdamW's beta 1.")
    adam_beta2: Beta = Field(0.95, description="AdamW's beta 2.")
    gradient_clipping: Positive = Field(1.0, description="Largest gradient norm.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, a third more time.")
    validation_interval: PositiveInt = Field(10, description="Steps between validations; there is one at step 0 too.")
    validation_sequences: PositiveInt = Field(640, description="Sequences per validation, or all there are.")
    checkpoint_interval: PositiveInt = Field(10, description="Steps between checkpoints to resume from.")
    tensor_parallel_size: Annotated[PositiveInt, EXECUTION] = Field(
        1, description="GPUs that share every layer (engine nemo)."
    )
    pipeline_parallel_size: Annotated[PositiveInt, EXECUTION] = Field(
        1, description="GPUs that have a part of the layers each (engine nemo)."
    )
    context_parallel_size: Annotated[PositiveInt, EXECUTION] = Field(
        1, description="GPUs that share every sequence (engine nemo)."
    )
    sequence_parallel: Annotated[bool, EXECUTION] = Field(
        False, description="Split the activations between layers too, over the tensor-parallel GPUs."
    )
    num_nodes: Annotated[PositiveInt, EXECUTION] = Field(
        1, description="Nodes to train on; several: the task starts a Kubeflow TrainJob and waits (engine nemo)."
    )
    gpus_per_node: Annotated[PositiveInt, EXECUTION] = Field(8, description="GPUs of each node, if there are several.")

    @model_validator(mode="after")
    def _batches_fit(self) -> "TrainingConfig":
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size}: choose a multiple"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}: lower it"
            )
        return self

    @model_validator(mode="after")
    def _engine_can_be_parallel(self) -> "TrainingConfig":
        if self.engine == "hf" and self.model_parallel_size > 1:
            raise ValueError(
                f"tensor, pipeline and context parallel sizes multiply to {self.model_parallel_size}, but engine hf "
                "runs in one process: use engine nemo, or set them to 1"
            )
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise ValueError("sequence_parallel needs a tensor_parallel_size above 1: raise it, or switch it off")
        return self

    @model_validator(mode="after")
    def _nodes_fit(self) -> "TrainingConfig":
        if self.num_nodes == 1:
            return self
        if self.engine == "hf":
            raise ValueError(f"num_nodes is {self.num_nodes}, but engine hf runs in one process: use engine nemo")
        if self.gpus:
            raise ValueError(
                f"gpus is {self.gpus}, but with num_nodes {self.num_nodes} the task itself only waits: set gpus to 0, "
                "gpus_per_node is what the nodes get"
            )
        if self.workspace is None:
            raise ValueError(f"num_nodes is {self.num_nodes}, but the nodes share no workspace: give one")
        return self

    @property
    def model_parallel_size(self) -> int:
        """GPUs that one copy of the model takes."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size


class FinetuneConfig(TrainingConfig):
    """Base model → corrected teacher (cross-entropy on the corpus)."""

    teacher: ModelAddress = Field(
        description="Base model, never modified: a directory (Hugging Face's or NeMo 2's), hf://org/name, "
        "gs://bucket/path, models:/NAME@alias or ngc://org/team/model:version."
    )
    enabled: bool = Field(True, description="False: pass the base model on as it is.")


class PruneConfig(SequenceConfig):
    """Teacher → smaller student. A size that is not given is not cut."""

    teacher: InputPath = Field(description="Model to prune.")
    engine: Engine = "hf"
    hidden_size: PositiveInt | None = Field(None, description="Width of the residual stream.")
    intermediate_size: PositiveInt | None = Field(None, description="Width of the MLP.")
    num_attention_heads: PositiveInt | None = Field(None, description="Query heads per layer.")
    num_key_value_heads: PositiveInt | None = Field(None, description="Key-value heads (groups) per layer.")
    num_hidden_layers: PositiveInt | None = Field(
        None, description="Layers to keep; those of the lowest block influence are dropped."
    )
    drop_layers: list[PositiveInt] | None = Field(None, description="Layers to drop, counted from 1, by hand.")
    calibration_sequences: PositiveInt = Field(1024, description="Training sequences that importance is read on.")

    @model_validator(mode="after")
    def _one_way_to_choose_layers(self) -> "PruneConfig":
        if self.drop_layers is not None and self.num_hidden_layers is not None:
            raise ValueError("drop_layers and num_hidden_layers are both given: choose one")
        return self


class DistillConfig(TrainingConfig):
    """Teacher and pruned student → trained student (forward KL on logits)."""

    teacher: InputPath = Field(description="Model to learn from.")
    student: InputPath = Field(description="Pruned model to train.")
    temperature: Positive = Field(1.0, description="Softens both distributions; the KL is scaled by its square.")
    kl_weight: NonNegative = Field(1.0, description="Weight of the forward KL divergence.")
    cross_entropy_weight: NonNegative = Field(0.0, description="Weight of the cross-entropy on the corpus.")
    intermediate_layers: list[tuple[PositiveInt, PositiveInt]] = Field(
        [], description="Pairs of student and teacher layers, from 1, whose outputs are matched too (engine nemo)."
    )

    @model_validator(mode="after")
    def _has_a_loss(self) -> "DistillConfig":
        if self.kl_weight == self.cross_entropy_weight == 0:
            raise ValueError("kl_weight and cross_entropy_weight are both 0: give one a weight")
        if self.engine == "hf" and self.intermediate_layers:
            raise ValueError("intermediate_layers are matched by engine nemo only: use it, or leave them out")
        return self


class EvaluateConfig(SequenceConfig):
    """Models and data → evaluation.json and report.html."""

    teacher_before: ModelAddress = Field(description="Base model; its address is finetune's.")
    teacher: InputPath = Field(description="Corrected teacher.")
    pruned: InputPath = Field(description="Student before distillation.")
    student: InputPath = Field(description="Student after distillation.")
    evaluation_sequences: PositiveInt = Field(640, description="Sequences per split, or all there are.")
    tasks: list[str] = Field([], description="lm-eval tasks.")
    task_directory: Annotated[Place | None, INPUT] = Field(None, description="Directory of local lm-eval task files.")
    task_limit: PositiveInt | None = Field(None, description="Questions per task; none: all of them.")
    prompts: list[Annotated[str, Field(min_length=1)]] = Field(
        ["The history of the city began", "In physics, energy is"],
        min_length=1,
        description="Beginnings that every model continues.",
    )
    generation_tokens: PositiveInt = Field(48, description="New tokens per prompt.")
    out_of_domain: Annotated[str | None, INPUT, HUB_DATASET] = Field(
        None, description="Text of another kind than the corpus, addressed as it is: what compression lost elsewhere."
    )
    champion: Annotated[str | None, INPUT] = Field(
        None, description="Model in production to compare with, measured on the same test set: models:/NAME@champion."
    )
    gates: list[Gate] = Field(
        [], description="What the student must meet to be promoted: {metric, against, by, at_most or at_least} each."
    )

    @model_validator(mode="after")
    def _gates_are_measured(self) -> "EvaluateConfig":
        gates.check(self)
        return self


class RegisterConfig(StageConfig):
    """Student → version in the MLflow registry."""

    # Not an EXECUTION field here: a version in one registry is no result for another.
    tracking_uri: str | None = Field(None, description="MLflow server whose registry gets the version; required.")
    student: InputPath = Field(description="Model directory to register.")
    evaluation: InputPath = Field(description="Directory written by evaluate.")
    dataset: InputPath = Field(description="Directory written by prepare.")
    name: RegisteredName = Field("minitron", description="Registered model.")
    alias: str = Field("challenger", pattern=r"^[\w-]+$", description="Alias that the new version gets.")

    @model_validator(mode="after")
    def _alias_is_not_reserved(self) -> "RegisterConfig":
        if re.fullmatch(r"latest|v\d+", self.alias, re.IGNORECASE):
            raise ValueError(f"alias {self.alias} is one of MLflow's own names; choose another")
        return self


class ResolveConfig(StageConfig):
    """Corpus, teacher and settings → is there anything to train that is not there yet?"""

    tracking_uri: str = Field(description="MLflow server whose registry has the versions.")
    pipeline_run_id: str = Field(description="Kubeflow run that asks.")
    name: RegisteredName = RegisterConfig.model_fields["name"].default
    corpus: Annotated[str, INPUT, HUB_DATASET] = Field(description="As prepare's.")
    teacher: ModelAddress = Field(description="As prepare's.")
    settings: dict[str, Any] = Field(description="The pipeline's parameters that decide the weights.")


class PromoteConfig(StageConfig):
    """Version → champion, if it meets its gates."""

    tracking_uri: str = Field(description="MLflow server whose registry has the version.")
    name: RegisteredName = RegisterConfig.model_fields["name"].default
    version: PositiveInt | None = Field(None, description="Its number; none: the challenger's.")
    why: str | None = Field(None, description="Reason, for the ledger.")


class ConcludeConfig(StageConfig):
    """What happened in a run → its outcome in MLflow, and a page."""

    tracking_uri: str = Field(description="MLflow server.")
    pipeline_run_id: str = Field(description="Kubeflow run that ends.")
    state: str = Field(description="State in which Kubeflow says that it ended.")
    message: str | None = Field(None, description="What Kubeflow says of a failure.")


class ClusterConfig(BaseModel):
    """What Kubeflow takes from the compiled pipeline, not from its parameters: `minitron submit` and `schedule` set it.

    In a preset it is the section `cluster`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    service_account: str | None = Field(None, description="Account of the tasks; none: Kubeflow's own.")
    shared_memory: str = Field("16Gi", pattern=r"^\d+[KMGT]i$", description="Limit of /dev/shm in every task.")
    retries: Annotated[int, Field(ge=0)] = Field(3, description="Attempts after the first, for lost (spot) nodes.")
    timeout_hours: PositiveInt = Field(168, description="Longest time that one attempt at a task may take.")
    ttl_hours: PositiveInt = Field(168, description="How long a run's pods and their logs are kept after its end.")
    labels: dict[str, str] = Field({}, description="Labels of the tasks' pods, to account for them.")


LARGE = ("prepare", "finetune", "prune", "distill")
"""Stages whose results, models and datasets, are passed on by reference where they cannot be linked."""

STAGES: dict[str, type[StageConfig]] = {
    "prepare": PrepareConfig,
    "finetune": FinetuneConfig,
    "prune": PruneConfig,
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "register": RegisterConfig,
}
"""Every stage's configuration, in the order of the flow."""


TASKS: dict[str, type[StageConfig]] = {"resolve": ResolveConfig, "promote": PromoteConfig, "conclude": ConcludeConfig}
"""The tasks that decide instead of making something: what they do depends on the registry, so no result is reused."""


def fields_marked(model: type[StageConfig], mark: str) -> list[str]:
    """Return the names of the fields that carry INPUT or EXECUTION."""
    return [name for name, field in model.model_fields.items() if mark in field.metadata]


def parse(stage: str, values: dict[str, Any]) -> StageConfig:
    """Validate the values of one stage, or of one of TASKS.

    Raises:
        ConfigError: a key is unknown, missing or has a value of the wrong kind; all faults are named.
    """
    return validated(stage, (STAGES | TASKS)[stage], values)


def given(stage: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that Kubeflow passed on as given, those that stand for the default left out.

    Inside a condition it cannot leave a parameter out. There an empty text stands for the default, and where that is
    None, 0 or an empty list does.
    """
    fields = (STAGES | TASKS)[stage].model_fields
    optional = {name for name, field in fields.items() if not field.is_required() and field.default is None}
    return {
        name: value for name, value in values.items() if value not in (None, "") and (value or name not in optional)
    }


def parse_cluster(values: dict[str, Any]) -> ClusterConfig:
    """Validate the section `cluster` of a preset.

    Raises:
        ConfigError: as for a stage.
    """
    return validated("cluster", ClusterConfig, values)
