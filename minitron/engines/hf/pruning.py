"""Pruning with the transformers engine: layer by layer from the teacher's files, on a CPU or all GPUs of a task.

In several processes, one per GPU, each reads the layers, and runs its share of the calibration.
"""

import pickle
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron.config.parse import parse
from minitron.config.stages import PruneConfig
from minitron.data.packed import PackedDataset
from minitron.engines.hf.device import get_compute_dtype, get_device, say_what_stands_idle
from minitron.engines.hf.training import WORKER
from minitron.engines.launcher import launch
from minitron.models.processes import ask_first, get_rank
from minitron.models.pruning.calibration import check_calibration, split_calibration
from minitron.models.pruning.compensation import CHOSEN, Compensated, cut_with_compensation
from minitron.models.pruning.depth import drop_layers_by_loss
from minitron.models.pruning.importance import Importance, measure_importance
from minitron.models.pruning.layers import LayerReader
from minitron.models.pruning.scores import find_or_drop_layers, find_or_measure_importance
from minitron.models.pruning.surgery import (
    Cut,
    Drop,
    Given,
    LayerOrder,
    Shape,
    choose_plan,
    count_student_bytes,
    cut_model,
    is_chosen_by_scores,
)
from minitron.storage.files import check_free_space
from minitron.storage.staging import checkpoints_path

CUT = "cut.pickle"
"""Among the checkpoints: what the workers return. The stage that reads it has started them."""


def prune(config: PruneConfig, shape: Shape, given: Given, directory: Path) -> Cut:
    """Cut the student out, in this process or in one per GPU: see `engines.Engine.prune`."""
    teacher = LayerReader(config.teacher)
    check_free_space(directory, count_student_bytes(teacher, shape))
    if _is_compensated(config, teacher, shape):
        check_calibration(_count_calibration(config), config.sequence_length, teacher.config)
    processes = _count_processes(config) if _needs_calibration(config, teacher, shape, given) else 1
    say_what_stands_idle(processes)
    if processes == 1:
        return cut_student(config, shape, given, directory)
    work = checkpoints_path(directory)
    work.mkdir(exist_ok=True)
    print(f"prune: {processes} processes, which share the calibration", flush=True)
    launch(WORKER, make_job(config, shape, given, directory, work), work, processes)
    return read_cut(work)


def make_job(config: PruneConfig, shape: Shape, given: Given, directory: Path, work: Path) -> dict[str, Any]:
    """Return the job of the workers, in JSON's types: the arguments of `cut_student`."""
    return {
        "job": "prune",
        "config": config.model_dump(mode="json"),
        "shape": asdict(shape),
        "given": dict(given),
        "directory": str(directory),
        "work": str(work),
    }


def prune_in_worker(job: dict[str, Any]) -> None:
    """Run a job of `make_job`; all processes call this."""
    config: Any = parse("prune", job["config"])
    cut = cut_student(config, Shape(**job["shape"]), job["given"], Path(job["directory"]))
    if get_rank() == 0:
        (Path(job["work"]) / CUT).write_bytes(pickle.dumps(cut))


def read_cut(work: Path) -> Cut:
    """Return what the workers of a job cut."""
    return pickle.loads((work / CUT).read_bytes())


def cut_student(config: PruneConfig, shape: Shape, given: Given, directory: Path) -> Cut:
    """Cut the student out, by importance read in one forward pass; all processes call this, and process 0 writes.

    With method compensated what remains is refitted on the same sequences. Layers by loss are chosen before all else.
    """
    teacher = LayerReader(config.teacher)
    drops = _drop_layers_by_loss(config, teacher, shape, given)
    if drops:
        gone = {drop.layer for drop in drops}
        given = {**given, "layers": [layer for layer in range(teacher.config.num_hidden_layers) if layer not in gone]}
    importance, sequences = _measure_importance(config, teacher, shape, given)
    plan = choose_plan(importance or Importance.zeros(teacher.config), shape, given)
    compensated = Compensated(plan, [], None)
    if is_compensated := _is_compensated(config, teacher, shape):
        where, choose, size = (get_device(), directory), CHOSEN - given.keys(), config.micro_batch_size
        compensated = cut_with_compensation(teacher, plan, shape, _read_calibration(config), size, *where, choose)
    else:
        ask_first(lambda: cut_model(teacher, plan, directory))
    if is_compensated or drops:
        sequences = _count_calibration(config)
    plan, fits, explained = compensated
    return Cut(plan, importance, sequences, fits, drops, explained)


def _count_processes(config: PruneConfig) -> int:
    """Count the processes that share the calibration: one per GPU, and each has a sequence."""
    return min(config.gpus or torch.cuda.device_count() or 1, _count_calibration(config))


def _needs_calibration(config: PruneConfig, teacher: LayerReader, shape: Shape, given: Given) -> bool:
    """Say whether a cut reads more than the weights."""
    return _needs_scores(config, teacher, shape, given) or _is_compensated(config, teacher, shape)


def _needs_scores(config: PruneConfig, teacher: LayerReader, shape: Shape, given: Given) -> bool:
    """Say whether scores decide a cut; a compensated one chooses all but layers by itself."""
    settled = given.keys() | (CHOSEN if config.method == "compensated" else set())
    return is_chosen_by_scores(shape, Shape.from_config(teacher.config), settled)


def _is_compensated(config: PruneConfig, teacher: LayerReader, shape: Shape) -> bool:
    return config.method == "compensated" and shape != Shape.from_config(teacher.config)


def _drop_layers_by_loss(config: PruneConfig, teacher: LayerReader, shape: Shape, given: Given) -> list[Drop]:
    """Return the layers to drop by loss, in their order; none if they are given, or go by block influence."""
    count = teacher.config.num_hidden_layers - shape.num_hidden_layers
    if config.layers_by != "loss" or "layers" in given or not count:
        return []
    parts, size = split_calibration(_read_calibration(config)), config.micro_batch_size
    where, refit = (get_compute_dtype(), get_device()), config.method == "compensated"

    def drop(begun: LayerOrder) -> Iterator[LayerOrder]:
        return drop_layers_by_loss(teacher, count, *parts, size, *where, refit, begun)

    return find_or_drop_layers(config, count, drop)


def _measure_importance(
    config: PruneConfig, teacher: LayerReader, shape: Shape, given: Given
) -> tuple[Importance | None, int]:
    """Return the scores and the number of sequences they were read on; None and 0 if no axis is chosen by scores."""
    if not _needs_scores(config, teacher, shape, given):
        return None, 0

    def measure() -> Importance:
        # in the dtype of the computation; the student is cut from the stored weights, to the last bit
        where, size = (get_compute_dtype(), get_device()), config.micro_batch_size
        return measure_importance(teacher, _open_calibration(config), config.calibration_sequences, size, *where)

    return find_or_measure_importance(config, measure), _count_calibration(config)


def _open_calibration(config: PruneConfig) -> PackedDataset:
    return PackedDataset(config.dataset / "train", config.sequence_length, config.seed)


def _read_calibration(config: PruneConfig) -> Tensor:
    """Return the token ids [sequences, S]."""
    calibration = _open_calibration(config)
    return torch.stack([calibration[index]["input_ids"] for index in range(_count_calibration(config))])


def _count_calibration(config: PruneConfig) -> int:
    return min(config.calibration_sequences, len(_open_calibration(config)))
