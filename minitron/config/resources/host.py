"""Host memory of every stage's task, computed from the model: the only place with bytes per parameter.

A task asks for a base per process, /dev/shm, and the most that it holds of the models at a time. Data that stays on a
GPU does not count; data that passes through the host on its way to a GPU or the disk does. `plan` computes this sum for
every stage whose `memory` is not set, and shows it on its page; docs/how-to/deploy.md has it for the presets.
"""

import math
from typing import NamedTuple

from minitron.config.document import Plan
from minitron.config.resources.device import count_trained, list_fit_phases, list_training_phases
from minitron.config.resources.sizes import ADAM, BF16, FP32, GIB, Models, Term, total
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

BASE = 8 * GIB
"""Per process: Python, its libraries, CUDA's host side, batches, buffers of NCCL and the writers."""

DIGESTS = 8 * GIB
"""For prepare: 100 bytes for each of 80 million documents; text is read in small batches."""

SIGNATURES = 24 * GIB
"""For prepare with near_duplicates: 2.5 kB for each of 10 million documents."""

LAYER = 8 * GIB
"""For prune: 8 billion parameters were measured to take 2.4 GB; layer, embedding and shard of 70 billion take 7 GB."""

_UNITS = {"": 1} | {unit: 1000**power for power, unit in enumerate("kMGTP", 1)}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("KMGTP", 1)}

CPU_PER_GPU = 8
"""Cores beside each GPU: a process, the threads that write and read its files, and the start of its kernels."""

CPU = {"prepare": 8, "register": 2}
"""Cores of a task without GPUs: tokenizing uses them all, registering none."""


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
            if settings.near_duplicates:
                phases[0].append(Term("signatures of 10 million documents", SIGNATURES))
        case FinetuneSettings(enabled=False):
            phases = []
        case TrainingSettings(engine="nemo"):
            phases = _list_nemo_phases(settings, gpus, models)
        case TrainingSettings():
            phases = _list_hf_phases(settings, gpus, models)
        case PruneSettings():
            phases = _list_prune_phases(settings, gpus, models)
        case EvaluateSettings() if gpus:
            phases = [[Term("a model on its way to every GPU, bf16", gpus * BF16 * models.teacher)]]
        case EvaluateSettings():
            compared = models.teachers * models.teacher + (3 if settings.champion else 2) * models.student
            phases = [[Term("all models, fp32", FP32 * compared)]]
        case _:
            phases = []
    return terms + max(phases, key=total, default=[])


def format_request(terms: list[Term]) -> str:
    """Return the memory to ask for, in whole Gi."""
    return f"{math.ceil(total(terms) / GIB)}Gi"


def request_cpu(stage: str, settings: StageSettings) -> str:
    """Return the CPU cores to ask for."""
    return str(max(CPU.get(stage, CPU_PER_GPU), CPU_PER_GPU * _count_gpus(settings)))


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
    trained, _ = count_trained(settings, models)
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
    """Return what a stage's task asks for; what is not set is computed."""
    settings, resources = plan.stages[stage], plan.resources[stage]
    nodes = settings.num_nodes if isinstance(settings, TrainingSettings) else 1
    memory = resources.memory or format_request(sum_memory(settings, models))
    cpu = resources.cpu or request_cpu(stage, settings)
    return PodRequest(stage, image, nodes, _count_gpus(settings), cpu, memory)


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
    """Count the processes that a stage starts: one per GPU, but one GPU of engine hf has its own process."""
    match settings:
        case FinetuneSettings(enabled=False):
            return 0
        case TrainingSettings(engine="nemo"):
            return gpus or settings.model_parallel_size
        case TrainingSettings() if gpus > 1 or settings.num_nodes > 1:
            return gpus
        case PruneSettings(engine="nemo"):
            return 1
        case PruneSettings() | EvaluateSettings() if gpus > 1:
            return gpus
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
    trained, _ = count_trained(settings, models)
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
    """Return the memory of engine hf: on a GPU while it loads and saves, on a CPU the whole training."""
    trained, sizes = count_trained(settings, models)
    if not gpus:
        return [phase.terms for phase in list_training_phases(settings, models)]
    teacher = models.teacher if isinstance(settings, DistillSettings) else 0
    on_its_way = Term("the teacher on its way to the GPU, bf16", BF16 * teacher)
    saving = [Term("a copy of weights and Adam's moments, fp32", ADAM * trained // settings.num_nodes)]
    if gpus > 1 or settings.num_nodes > 1:
        # every process reads layer by layer; one gathers the best state, which is none's own
        largest = max(sizes.layer_weights, models.teacher_sizes.head_weights, sizes.head_weights)
        on_its_way = Term("a layer or the embedding, on its way to every GPU", FP32 * gpus * largest)
        saving.append(Term("the best state, fp32", FP32 * trained))
    return [[on_its_way], saving]


def _list_prune_phases(settings: PruneSettings, gpus: int, models: Models) -> list[list[Term]]:
    if settings.engine == "nemo":
        scoring = Term("the teacher while it is scored", (BF16 if gpus else FP32) * models.teacher)
        return [_list_conversion(models), [scoring]]
    is_compensated, dtype = settings.method == "compensated", BF16 if gpus else FP32
    cutting = [Term("a layer of every process, a shard, and states of the calibration", max(1, gpus) * LAYER)]
    fitting = list_fit_phases(settings, models.teacher_sizes) if is_compensated and not gpus else []
    choosing: list[Term] = []
    if settings.layers_by == "loss" and not gpus:
        choosing.append(Term("the teacher while layers are chosen, fp32", FP32 * models.teacher))
    if settings.layers_by == "loss" and is_compensated:  # 5 tokens per MLP channel, and a layer has 3 matrices of these
        choosing.append(Term("states of two models after every layer", 10 * dtype * models.teacher // 3))
    return [cutting, *(phase.terms for phase in fitting), choosing]


def _list_conversion(models: Models) -> list[Term]:
    """Return the memory of a conversion: Hugging Face's model, NeMo's model, and the buffer for reading or writing."""
    return [Term("the teacher while it is converted, three times", 3 * models.weight * models.teacher)]
