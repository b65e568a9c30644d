"""Pruning with the transformers engine: layer by layer from the teacher's files, on a CPU or one GPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron.config.stages import PruneConfig
from minitron.data.packed import PackedDataset
from minitron.engines.hf.device import get_compute_dtype, get_device, say_that_one_gpu_works
from minitron.models.pruning.compensation import (
    CHOSEN,
    check_calibration,
    cut_with_compensation,
    split_calibration,
)
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


def prune(config: PruneConfig, shape: Shape, given: Given, directory: Path) -> Cut:
    """Cut the student out, by importance read in one forward pass: see `engines.Engine.prune`.

    With method compensated what remains is refitted on the same sequences. Layers by loss are chosen before all else.
    """
    say_that_one_gpu_works()
    teacher = LayerReader(config.teacher)
    check_free_space(directory, count_student_bytes(teacher, shape))
    is_compensated = config.method == "compensated" and shape != Shape.from_config(teacher.config)
    if is_compensated:
        calibration = _open_calibration(config)
        check_calibration(_count_calibration(config, calibration), config.sequence_length, teacher.config)
    drops = _drop_layers_by_loss(config, teacher, shape, given)
    if drops:
        gone = {drop.layer for drop in drops}
        given = {**given, "layers": [layer for layer in range(teacher.config.num_hidden_layers) if layer not in gone]}
    importance, sequences = _measure_importance(config, teacher, shape, given)
    plan, fits = choose_plan(importance or Importance.zeros(teacher.config), shape, given), list[dict[str, Any]]()
    if is_compensated:
        where, choose, size = (get_device(), directory), CHOSEN - given.keys(), config.micro_batch_size
        plan, fits = cut_with_compensation(teacher, plan, shape, _read_calibration(config), size, *where, choose)
    else:
        cut_model(teacher, plan, directory)
    if is_compensated or drops:
        sequences = _count_calibration(config, _open_calibration(config))
    return Cut(plan, importance, sequences, fits, drops)


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
    if not is_chosen_by_scores(shape, Shape.from_config(teacher.config), given):
        return None, 0
    calibration = _open_calibration(config)

    def measure() -> Importance:
        # in the dtype of the computation; the student is cut from the stored weights, to the last bit
        where, size = (get_compute_dtype(), get_device()), config.micro_batch_size
        return measure_importance(teacher, calibration, config.calibration_sequences, size, *where)

    return find_or_measure_importance(config, measure), _count_calibration(config, calibration)


def _open_calibration(config: PruneConfig) -> PackedDataset:
    return PackedDataset(config.dataset / "train", config.sequence_length, config.seed)


def _read_calibration(config: PruneConfig) -> Tensor:
    """Return the token ids [sequences, S]."""
    calibration = _open_calibration(config)
    return torch.stack([calibration[index]["input_ids"] for index in range(_count_calibration(config, calibration))])


def _count_calibration(config: PruneConfig, calibration: PackedDataset) -> int:
    return min(config.calibration_sequences, len(calibration))
