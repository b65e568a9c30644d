"""Host memory of every stage's task, computed from the model: the only place with bytes per parameter.

A task asks for a base per process, /dev/shm, and the most that it holds of the models at a time. Data that stays on a
GPU does not count; data that passes through the host on its way to a GPU or the disk does. `plan` computes this sum for
every stage whose `memory` is not set, and shows it on its page; docs/how-to/deploy.md has it for the presets.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from minitron.config.document import Plan
from minitron.config.parse import apply_kept
from minitron.config.settings import (
    ClusterConfig,
    DistillSettings,
    EvaluateSettings,
    FinetuneSettings,
    PrepareSettings,
    StageSettings,
    TrainingSettings,
)
from minitron.config.shapes import PARALLEL_TRIALS, PruneSettings
from minitron.errors import ConfigError

GIB = 2**30

BASE = 8 * GIB
"""Per process: Python, its libraries, CUDA's host side, batches, buffers of NCCL and the writers."""

DIGESTS = 8 * GIB
"""For prepare: 100 bytes for each of 80 million documents; text is read in small batches."""

LAYER = 8 * GIB
"""For prune: 8 billion parameters were measured to take 2.4 GB; layer, embedding and shard of 70 billion take 7 GB."""

BF16, FP32 = 2, 4

ADAM = 3 * FP32
"""An optimizer's state: the master weight and both moments."""

UNKNOWN = 8_030_261_248
"""Parameters of Llama-3.1-8B, assumed for a teacher whose config.json cannot be read."""

_UNITS = {"": 1} | {unit: 1000**power for power, unit in enumerate("kMGTP", 1)}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("KMGTP", 1)}

_WITH_BIAS = ("qwen2",)
_WITH_NORMS = ("qwen3",)
_FAMILIES = ("llama", "mistral", *_WITH_BIAS, *_WITH_NORMS)


class Models(NamedTuple):
    """Parameters of a run's models, and the bytes that a stored weight takes."""

    teacher: int = UNKNOWN
    student: int = UNKNOWN
    weight: int = BF16


class Term(NamedTuple):
    """An entry of a sum: its meaning, and its bytes."""

    meaning: str
    size: int


def count_parameters(architecture: Mapping[str, Any]) -> int:
    """Count the parameters of the model that a config.json describes; tied embeddings count once.

    Raises:
        ConfigError: the model is of another family, or a size is missing.
    """
    if (family := architecture.get("model_type")) not in _FAMILIES:
        raise ConfigError(f"model_type {family} is not one of {', '.join(_FAMILIES)}")
    try:
        hidden, intermediate, heads, layers, vocabulary = (
            architecture[name]
            for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
        )
    except KeyError as error:
        raise ConfigError(f"config.json has no {error.args[0]}") from None
    groups = architecture.get("num_key_value_heads") or heads
    head = architecture.get("head_dim") or hidden // heads
    layer = 2 * (heads + groups) * head * hidden + 3 * hidden * intermediate + 2 * hidden
    if family in _WITH_BIAS or architecture.get("attention_bias"):
        layer += (heads + 2 * groups) * head + (0 if family in _WITH_BIAS else hidden)
    if architecture.get("mlp_bias"):
        layer += 2 * intermediate + hidden
    if family in _WITH_NORMS:
        layer += 2 * head
    embeddings = vocabulary * hidden * (1 if architecture.get("tie_word_embeddings") else 2)
    return embeddings + layers * layer + hidden


def count_models(architecture: Mapping[str, Any], prune: PruneSettings) -> Models:
    """Count the parameters of a teacher and of the student that prune makes from it.

    Raises:
        ConfigError: as for `count_parameters`.
    """
    teacher = count_parameters(architecture)
    sizes = {"num_key_value_heads": architecture["num_attention_heads"]} | dict(architecture)
    head = {"head_dim": architecture.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]}
    student = count_parameters(sizes | head | apply_kept(prune).compute_student_sizes(sizes))
    dtype = architecture.get("dtype") or architecture.get("torch_dtype")
    return Models(teacher, student, FP32 if dtype == "float32" else BF16)


def sum_memory(settings: StageSettings, models: Models) -> list[Term]:
    """Return the terms of the host memory of a stage's task, or of each of its nodes; base and /dev/shm come first."""
    gpus = _count_gpus(settings)
    processes = 1 + _count_workers(settings, gpus)
    terms = [Term(f"{processes} process{'es' if processes > 1 else ''} of {BASE // GIB} Gi", processes * BASE)]
    if gpus:
        terms.append(Term("/dev/shm", parse_quantity(ClusterConfig().shared_memory)))
    match settings:
        case PrepareSettings():
            phases = [[Term("digests of 80 million documents", DIGESTS)]]
        case FinetuneSettings(enabled=False):
            phases = []
        case TrainingSettings(engine="nemo"):
            phases = _list_nemo_phases(settings, gpus, models)
        case TrainingSettings():
            phases = _list_hf_phases(settings, gpus, models)
        case PruneSettings():
            phases = _list_prune_phases(settings, gpus, models)
        case EvaluateSettings() if gpus:
            phases = [[Term("a model on its way to the GPU, bf16", BF16 * models.teacher)]]
        case EvaluateSettings():
            compared = 2 * models.teacher + (3 if settings.champion else 2) * models.student
            phases = [[Term("all models, fp32", FP32 * compared)]]
        case _:
            phases = []
    return terms + max(phases, key=total, default=[])


def total(terms: list[Term]) -> int:
    """Return the bytes of a sum."""
    return sum(term.size for term in terms)


def format_request(terms: list[Term]) -> str:
    """Return the memory to ask for, in whole Gi."""
    return f"{math.ceil(total(terms) / GIB)}Gi"


def parse_quantity(text: str) -> int:
    """Return the bytes of a quantity of memory, such as 64Gi."""
    number = text.rstrip("kKMGTPi")
    return int(float(number) * _UNITS[text[len(number) :]])


class Writing(NamedTuple):
    """Files that a training writes to the workspace beside its result: bytes per set, and number of sets."""

    meaning: str
    size: int
    times: int

    @property
    def total(self) -> int:
        """The bytes of all sets."""
        return self.size * self.times


def list_writing(settings: StageSettings, models: Models) -> list[Writing]:
    """Return a training's files: checkpoints to resume from, and at most as many best states as validations."""
    match settings:
        case FinetuneSettings(enabled=False):
            return []
        case TrainingSettings(engine="nemo"):
            weight, state = BF16, ADAM
        case TrainingSettings():
            weight, state = FP32, 2 * FP32
        case _:
            return []
    trained = _count_trained(settings, models)
    checkpoints = (settings.max_steps - 1) // settings.checkpoint_interval
    best = math.ceil(settings.max_steps / settings.validation_interval)
    return [
        Writing("checkpoints", (weight + state) * trained, checkpoints),
        Writing("best states, at most", weight * trained, best),
    ]


class PodRequest(NamedTuple):
    """What a task asks a cluster for. Several nodes, a TrainJob's, ask for this each."""

    task: str
    image: str
    nodes: int
    gpus: int
    cpu: str
    memory: str


def request_pod(stage: str, image: str, plan: Plan, models: Models) -> PodRequest:
    """Return what a stage's task asks for; memory that is not set is the sum."""
    settings, resources = plan.stages[stage], plan.resources[stage]
    nodes = settings.num_nodes if isinstance(settings, TrainingSettings) else 1
    memory = resources.memory or format_request(sum_memory(settings, models))
    return PodRequest(stage, image, nodes, _count_gpus(settings), resources.cpu, memory)


def request_trial(image: str, plan: Plan, models: Models) -> PodRequest:
    """Return what the trial of a candidate asks for: it prunes and distills, one after the other.

    As many as `PARALLEL_TRIALS` run at a time; they count as nodes.
    """
    prune, distill = (request_pod(stage, image, plan, models) for stage in ("prune", "distill"))
    memory = max(prune.memory, distill.memory, key=parse_quantity)
    count = min(PARALLEL_TRIALS, plan.search.candidates)
    return PodRequest("trial", image, count, plan.trial_gpus, distill.cpu, memory)


def _count_gpus(settings: StageSettings) -> int:
    """Count the GPUs of the task or, if it starts several nodes (with pods like its own), of one node."""
    if isinstance(settings, TrainingSettings) and settings.num_nodes > 1:
        return settings.gpus_per_node
    return settings.gpus


def _count_workers(settings: StageSettings, gpus: int) -> int:
    """Count the processes that a stage starts; engine nemo starts one per GPU."""
    match settings:
        case FinetuneSettings(enabled=False):
            return 0
        case TrainingSettings(engine="nemo"):
            return gpus or settings.model_parallel_size
        case PruneSettings(engine="nemo"):
            return 1
        case _:
            return 0


def _list_nemo_phases(settings: TrainingSettings, gpus: int, models: Models) -> list[list[Term]]:
    """Return the memory of engine nemo while it converts the models, and while it saves a checkpoint.

    A checkpoint that can be resumed on another number of GPUs is gathered first: every process holds the state of its
    part of the model, in fp32 (megatron/core/optimizer/distrib_optimizer.py, get_parameter_state_dp_zero). The writers
    copy it, because it is a view (dist_checkpointing/strategies/filesystem_async.py, prepare_write_data). Exchanged
    parts and, later, the weights in pinned memory, whose sizes PyTorch rounds up to powers of two, take at most as much
    again. On a CPU the peaks were 35 to 37 bytes per parameter.
    """
    trained = _count_trained(settings, models)
    workers = gpus or settings.model_parallel_size
    copies = workers / (settings.tensor_parallel_size * settings.pipeline_parallel_size)
    written = trained // settings.num_nodes
    saving = [
        Term("a checkpoint's optimizer state in fp32, gathered", int(ADAM * trained * copies)),
        Term("its copy for the writers", ADAM * written),
        Term("parts in exchange, then the weights in pinned memory", ADAM * written),
    ]
    if not gpus:
        saving.append(Term("training without a GPU, fp32", (FP32 + ADAM) * trained + FP32 * models.teacher))
    return [_list_conversion(models), saving]


def _list_hf_phases(settings: TrainingSettings, gpus: int, models: Models) -> list[list[Term]]:
    """Return the memory of engine hf: on a GPU while it loads, on a CPU the whole training."""
    trained = _count_trained(settings, models)
    teacher = models.teacher if isinstance(settings, DistillSettings) else 0
    if gpus:
        return [
            [Term("the teacher on its way to the GPU, bf16", BF16 * teacher)],
            [Term("weights and Adam's moments of a checkpoint, fp32", ADAM * trained)],
        ]
    training = Term("weights, gradients and Adam's moments, fp32", (FP32 + ADAM) * trained)
    return [[training, Term("the best state, read at the end, fp32", FP32 * trained), Term("teacher", FP32 * teacher)]]


def _list_prune_phases(settings: PruneSettings, gpus: int, models: Models) -> list[list[Term]]:
    if settings.engine == "nemo":
        scoring = Term("the teacher while it is scored", (BF16 if gpus else FP32) * models.teacher)
        return [_list_conversion(models), [scoring]]
    is_compensated, dtype = settings.method == "compensated", BF16 if gpus else FP32
    cutting = [Term("a layer, a shard, and states of the calibration", LAYER)]
    if is_compensated and not gpus:
        cutting = [
            Term("the sums of a layer's fits, and both models' states; at most a teacher", FP32 * models.teacher)
        ]
    choosing: list[Term] = []
    if settings.layers_by == "loss" and not gpus:
        choosing.append(Term("the teacher while layers are chosen, fp32", FP32 * models.teacher))
    if settings.layers_by == "loss" and is_compensated:  # 5 tokens per MLP channel, and a layer has 3 matrices of these
        choosing.append(Term("states of two models after every layer", 10 * dtype * models.teacher // 3))
    return [cutting, choosing]


def _list_conversion(models: Models) -> list[Term]:
    """Return the memory of a conversion: Hugging Face's model, NeMo's model, and the buffer for reading or writing."""
    return [Term("the teacher while it is converted, three times", 3 * models.weight * models.teacher)]


def _count_trained(settings: TrainingSettings, models: Models) -> int:
    return models.teacher if isinstance(settings, FinetuneSettings) else models.student
