"""What every stage of a run needs on a kind of GPU, whether it fits, and which settings are recommended."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml

from minitron.config.document import Plan, nest_sections
from minitron.config.fields import Fault
from minitron.config.resources.device import Phase, count_gpus, count_trained, find_peak, list_gpu_phases
from minitron.config.resources.gpus import (
    CPU_SPEED,
    GPUS,
    LARGEST_NODE,
    Gpu,
    Utilization,
    find_labeled_gpu,
    find_utilization,
)
from minitron.config.resources.host import list_writing, request_pod, sum_memory
from minitron.config.resources.sizes import Models, Term
from minitron.config.resources.work import count_work
from minitron.config.settings import (
    DistillSettings,
    EvaluateSettings,
    FinetuneSettings,
    PrepareSettings,
    StageSettings,
    TrainingSettings,
)
from minitron.config.shapes import PruneSettings

_KEPT = 2
"""Checkpoints, and best states, on the disk at a time: the last one stays until the next one is complete."""

_BUSY = 16384
"""Tokens of a micro-batch that keep a GPU busy: a larger one would only take memory."""

_USED = {"hf": 0.95, "nemo": 0.85}
"""Share of a GPU's memory that recommended settings use, at most; the sums of engine nemo are not measured."""

_CACHED = 16
"""Bytes per token of a teacher's cache beside ids and weights: entropy, log-probability, first token, number."""

_MOST_GPUS = 64


class StageEstimate(NamedTuple):
    """What a stage needs.

    Attributes:
        engine: who computes it; None: no model is computed.
        nodes: tasks or pods that ask for `cpu` and `memory` each.
        gpus: GPUs on all nodes.
        cpu: cores, as a quantity of Kubernetes.
        memory: host memory, as a quantity of Kubernetes.
        host: the terms of the host memory that is needed.
        phases: what one of its GPUs holds.
        disk: what the stage keeps on the disk, at most.
        tokens: tokens that a training learns from, or that the stage reads.
        operations: floating-point operations of its matrix products.
        utilization: share of the GPUs' peak; None: it runs on a CPU, or computes nothing.
        seconds: how long the operations take; None: not known.
    """

    engine: str | None
    nodes: int
    gpus: int
    cpu: str
    memory: str
    host: list[Term]
    phases: list[Phase]
    disk: list[Term]
    tokens: float
    operations: float
    utilization: Utilization | None
    seconds: float | None

    @property
    def gpu_hours(self) -> float:
        """Hours times GPUs."""
        return (self.seconds or 0.0) / 3600 * self.gpus


class Advice(NamedTuple):
    """Recommended settings, by dotted key; and what the trainings then need on a GPU, and how long they take."""

    settings: dict[str, Any]
    peak: int
    seconds: float

    def as_preset(self) -> str:
        """Return the settings as a preset, to be given after the others."""
        return yaml.safe_dump(nest_sections(self.settings), sort_keys=False)


def estimate_run(plan: Plan, models: Models, gpu: Gpu | None) -> dict[str, StageEstimate]:
    """Estimate what every stage needs.

    Args:
        plan: the settings.
        models: the sizes of teacher and student.
        gpu: the kind of GPU; None: stages with GPUs get no time.
    """
    work = count_work(plan, models, dict.fromkeys(("train", "validation", "test"), math.inf))
    estimates = {}
    for stage, settings in plan.stages.items():
        pod, gpus = request_pod(stage, "", plan, models), count_gpus(settings)
        operations = work[stage].total if stage in work else 0.0
        utilization = find_utilization(settings) if gpus and operations else None
        speed = CPU_SPEED if not gpus else gpus * gpu.peak * utilization.share if gpu and utilization else 0.0
        estimates[stage] = StageEstimate(
            getattr(settings, "engine", None),
            pod.nodes,
            gpus,
            pod.cpu,
            pod.memory,
            sum_memory(settings, models),
            list_gpu_phases(settings, models),
            list(_list_disk(plan, settings, models)),
            work[stage].tokens if stage in work else 0.0,
            operations,
            utilization,
            operations / speed if operations and speed else None,
        )
    return estimates


def _list_disk(plan: Plan, settings: StageSettings, models: Models) -> Iterator[Term]:
    """Yield what a stage keeps on the disk; the dataset has at least the tokens that the trainings read."""
    match settings:
        case PrepareSettings():
            trainings = [other for other in plan.stages.values() if isinstance(other, TrainingSettings)]
            sequences = max(other.max_steps * other.global_batch_size for other in trainings)
            yield Term("dataset, at least", _count_id_bytes(models) * sequences * plan.pipeline.sequence_length)
            yield Term("teacher", models.weight * models.teacher)
        case FinetuneSettings(enabled=False):
            return
        case FinetuneSettings():
            yield Term("corrected teacher", models.weight * models.teacher)
        case PruneSettings() | TrainingSettings():
            yield Term("student", models.weight * models.student)
    if isinstance(settings, DistillSettings) and settings.teacher_cache:
        weight = 1 if settings.teacher_cache == "sampled" else 2
        token = settings.teacher_cache_size * (_count_id_bytes(models) + weight) + _CACHED
        tokens = settings.max_steps * settings.global_batch_size * settings.sequence_length
        yield Term("the teacher's distributions, at most", token * tokens)
    for written in list_writing(settings, models):
        yield Term(written.meaning, min(_KEPT, written.times) * written.size)


def _count_id_bytes(models: Models) -> int:
    """Return the bytes of a token's id in Megatron's .bin, and in a cache of the teacher."""
    return 2 if models.teacher_sizes.vocabulary < 65500 else 4


def find_memory_faults(plan: Plan, models: Models, gpu: Gpu) -> Iterator[Fault]:
    """Find stages whose GPUs cannot hold what they compute; each fault says what would fit."""
    for stage, settings in plan.stages.items():
        if not (phases := list_gpu_phases(settings, models)) or (peak := find_peak(phases)).total <= gpu.memory:
            continue
        largest = max(peak.terms, key=lambda term: term.size)
        yield Fault(
            f"{stage}.gpus",
            f"{count_gpus(settings)} x {gpu.name}, but each would hold {peak.total / 1e9:.0f} GB, of which "
            f"{largest.size / 1e9:.0f} GB {largest.meaning}; {_find_remedy(stage, settings, models, gpu)}",
        )


def find_labeled_faults(plan: Plan, models: Models) -> list[Fault]:
    """Find the same for the GPUs that the node selector names; none if it names no kind of GPU."""
    gpu = find_labeled_gpu(plan.pipeline.gpu_node_selector)
    return list(find_memory_faults(plan, models, gpu)) if gpu else []


def recommend(plan: Plan, models: Models, gpu: Gpu) -> Advice | None:
    """Recommend an engine, GPUs, micro-batches and recomputation for the trainings, and GPUs for prune.

    None: no training fits. The first that fits: with as few GPUs as the plan has, or else more; with engine hf, or else
    nemo, which can divide a layer; without recomputation, or else with it; with the largest micro-batch that still
    makes a GPU busier.
    """
    trainings = {s: settings for s, settings in plan.stages.items() if _is_training(settings)}
    growth = 1
    while growth * max((count_gpus(settings) for settings in trainings.values()), default=_MOST_GPUS) <= _MOST_GPUS:
        for engine in ("hf", "nemo"):
            fitting = {
                stage: _fit(settings, models, gpu, engine, growth * (count_gpus(settings) or 1))
                for stage, settings in trainings.items()
            }
            if found := {stage: settings for stage, settings in fitting.items() if settings}:
                if len(found) < len(fitting):
                    continue
                return _advise(plan, models, gpu, found)
        growth *= 2
    return None


def _advise(plan: Plan, models: Models, gpu: Gpu, found: Mapping[str, TrainingSettings]) -> Advice:
    engine = next(iter(found.values())).engine
    prune = _fit_prune(plan.stages["prune"], models, gpu, engine)
    stages: dict[str, StageSettings] = {**plan.stages, **found, "prune": prune or plan.stages["prune"]}
    estimates = estimate_run(Plan(plan.pipeline, stages, plan.resources, plan.search), models, gpu)
    settings: dict[str, Any] = {"engine": engine}
    for stage, chosen in stages.items():
        settings |= {f"{stage}.{name}": value for name, value in _list_changes(plan.stages[stage], chosen).items()}
    peak = max(find_peak(estimates[stage].phases).total for stage in found)
    return Advice(settings, peak, sum(estimates[stage].seconds or 0.0 for stage in found))


def _is_training(settings: StageSettings) -> bool:
    enabled = not isinstance(settings, FinetuneSettings) or settings.enabled
    return isinstance(settings, TrainingSettings) and enabled


def _list_changes(old: StageSettings, new: StageSettings) -> dict[str, Any]:
    """Return the settings that differ, but for the engine, which all stages share."""
    names = (name for name in type(new).model_fields if name != "engine")
    return {name: getattr(new, name) for name in names if getattr(new, name) != getattr(old, name)}


def _fit(settings: Any, models: Models, gpu: Gpu, engine: str, gpus: int) -> TrainingSettings | None:
    """Return a training's settings on so many GPUs with which a GPU holds it; None if there are none."""
    if gpus > LARGEST_NODE and gpus % LARGEST_NODE:
        return None
    nodes = max(1, gpus // LARGEST_NODE)
    where = {"num_nodes": nodes, "gpus": gpus, "engine": engine}
    if nodes > 1:
        where |= {"gpus": 0, "gpus_per_node": LARGEST_NODE}
    _, sizes = count_trained(settings, models)
    for tensor in [1] if engine == "hf" else [size for size in (1, 2, 4, 8) if not gpus % size]:
        if any(number % tensor for number in (sizes.heads, sizes.groups, sizes.intermediate, sizes.vocabulary)):
            continue
        split = {"tensor_parallel_size": tensor, "sequence_parallel": tensor > 1}
        split |= {"pipeline_parallel_size": 1, "context_parallel_size": 1}
        for recompute in (False, True):
            for size in _list_micro_batches(settings, gpus // tensor):
                batch = {"gradient_checkpointing": recompute, "micro_batch_size": size}
                changed = settings.model_copy(update=where | split | batch)
                if list(changed.find_faults()):
                    continue
                if find_peak(list_gpu_phases(changed, models)).total <= _USED[engine] * gpu.memory:
                    return changed
    return None


def _fit_prune(settings: StageSettings, models: Models, gpu: Gpu, engine: str) -> PruneSettings | None:
    """Return prune's settings on at least as many GPUs as it has, with which each holds it; None if there are none."""
    values = settings.model_dump()
    own = PruneSettings.model_validate(values | {"engine": engine, "gpus": 1})
    if own.engine == "hf":
        own = own.model_copy(update={"gpus": settings.gpus or 1})
    candidates = (own, *_list_more_gpus(own))
    return next((c for c in candidates if find_peak(list_gpu_phases(c, models)).total <= gpu.memory), None)


def _list_more_gpus(settings: PruneSettings) -> Iterator[PruneSettings]:
    """Yield prune's settings on more GPUs of one node."""
    gpus = settings.gpus
    while settings.engine == "hf" and (gpus := 2 * gpus) <= LARGEST_NODE:
        yield settings.model_copy(update={"gpus": gpus})


def _list_micro_batches(settings: TrainingSettings, copies: int) -> list[int]:
    """Return micro-batches that can be divided among the copies of the model, the largest first."""
    most = max(1, _BUSY // settings.sequence_length)
    return [size for size in range(most, 0, -1) if not settings.global_batch_size % (size * copies)]


def _find_remedy(stage: str, settings: StageSettings, models: Models, gpu: Gpu) -> str:
    """Return what would fit: the end of a message."""
    for changed in _list_smaller(settings, models, gpu):
        if changed and find_peak(list_gpu_phases(changed, models)).total <= gpu.memory:
            changes = _list_changes(settings, changed)
            if getattr(changed, "engine", None) != getattr(settings, "engine", None):
                changes = {"engine": changed.engine, **changes}
            keys = (f"{'' if name == 'engine' else f'{stage}.'}{name}={value}" for name, value in changes.items())
            return f"it fits with {' '.join(keys)}"
    for other in GPUS.values():
        if other.memory > gpu.memory and find_peak(list_gpu_phases(settings, models)).total <= other.memory:
            return f"it fits on {other.name}"
    return f"up to {_MOST_GPUS} of any of {', '.join(GPUS)} are too few; take a smaller teacher or shorter sequences"


def _list_smaller(settings: Any, models: Models, gpu: Gpu) -> Iterator[Any]:
    """Yield settings that need less memory on a GPU, the least change first."""
    match settings:
        case TrainingSettings():
            gpus = count_gpus(settings)
            while gpus <= _MOST_GPUS:
                for engine in dict.fromkeys((settings.engine, "hf", "nemo")):
                    yield _fit(settings, models, gpu, engine, gpus)
                gpus *= 2
        case PruneSettings():
            yield from _list_more_gpus(settings)
            sequences = settings.calibration_sequences
            while settings.method == "compensated" and (sequences := sequences // 2):
                yield settings.model_copy(update={"calibration_sequences": sequences})
            yield settings.model_copy(update={"layers_by": "influence"})
            yield settings.model_copy(update={"micro_batch_size": 1})
        case EvaluateSettings():
            size = settings.micro_batch_size
            while size := size // 2:
                yield settings.model_copy(update={"micro_batch_size": size})


def describe_estimate(
    models: Models, gpu: Gpu | None, estimates: Mapping[str, StageEstimate], advice: Advice | None, faults: list[Fault]
) -> dict[str, Any]:
    """Return an estimate as a JSON document: bytes, operations, seconds, and terms by their meaning."""
    stages = {}
    for stage, entry in estimates.items():
        stages[stage] = entry._asdict() | {
            "host": _describe_terms(entry.host),
            "phases": {phase.name: _describe_terms(phase.terms) for phase in entry.phases},
            "disk": _describe_terms(entry.disk),
            "utilization": entry.utilization and entry.utilization._asdict(),
            "gpu_hours": entry.gpu_hours,
        }
    return {
        "parameters": {"teacher": models.teacher, "student": models.student},
        "gpu": gpu and {name: value for name, value in gpu._asdict().items() if name != "labels"},
        "stages": stages,
        "recommended": advice and advice._asdict(),
        "does_not_fit": dict(faults),
    }


def _describe_terms(terms: list[Term]) -> dict[str, int]:
    return {term.meaning: term.size for term in terms}
