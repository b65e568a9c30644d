"""The NeMo engine: NeMo 2's own import, fine-tuning, pruning, distillation and export, with Megatron's parallelism.

This module checks, launches and follows; NeMo itself runs in the workers (engines/nemo/worker.py), one process per GPU.
Its input and output models are Hugging Face directories. NeMo's own files are among the checkpoints of the work in
progress, where a resumed stage finds them.
"""

import gc
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from minitron.config.stages import DistillConfig, PruneConfig, TrainingConfig
from minitron.data.packed import PackedDataset
from minitron.engines.checkpoints import read_checkpoint
from minitron.engines.divergence import check_untrained
from minitron.engines.gpus import check_shared, count_workers
from minitron.engines.launcher import launch
from minitron.engines.nemo.checks import (
    check_convertible,
    check_installed,
    check_parallelism,
    check_sizes,
    check_unmasked,
)
from minitron.engines.progress import Progress, follow_training, measure_cost
from minitron.errors import RunError
from minitron.models.checkpoint import copy_model, finish_derived_model, finish_model, load_model
from minitron.models.checks import check_architecture, read_config
from minitron.models.pruning.importance import Importance
from minitron.models.pruning.surgery import Cut, Given, Shape, choose_plan
from minitron.models.scoring import validate_teacher
from minitron.storage.staging import KEY, checkpoints_path
from minitron.tracking.stage_run import Tracker

WORKER = "minitron.engines.nemo.worker"

SCORES, TEACHER = "scores.pt", "teacher-scores"
"""Among the checkpoints: the importance, and the teacher's scores, which have a marker."""


def train(
    config: TrainingConfig,
    initial: Path,
    directory: Path,
    tracker: Tracker,
    teacher: Path | None = None,
) -> dict[str, Any]:
    """Train the model in `initial`; write its best state by validation loss, the untrained one included.

    Arguments and result: see `engines.Engine.train`.

    Raises:
        ConfigError: NeMo is not installed, a parallel size does not divide the size that it splits, or the dataset has
            masks.
        RunError: a worker failed.
    """
    check_unmasked(config.dataset)
    check_installed()
    models = [initial] if teacher is None else [initial, teacher]
    for model in models:
        check_parallelism(config, check_architecture(model), model, count_workers(config))
    work = checkpoints_path(directory)
    work.mkdir(exist_ok=True)
    if config.num_nodes > 1:
        check_shared(config, [config.dataset, *models])
    metrics: dict[str, Any] = {} if teacher is None else _score_teacher_near_gpus(config, teacher, work)
    if teacher is not None:
        check_untrained(teacher, metrics["teacher_validation_loss"])
    _import_models(dict(zip(("student", "teacher"), models, strict=False)), work)
    stage = "distill" if isinstance(config, DistillConfig) else "finetune"
    job = {"job": "train", "stage": stage, "config": config.model_dump(mode="json")}
    job["model"] = str(initial)
    cost = measure_cost(config, initial, teacher, count_workers(config))

    def run(progress: Progress) -> None:
        if config.num_nodes == 1:
            _run_job(job, work, count_workers(config), progress)
        else:
            _run_job_on_nodes(job, work, config.num_nodes, config.gpus_per_node, progress)

    def write(best: Path, target: Path) -> None:
        _export_model(work, best, initial, target)

    result, end = follow_training(config, initial, directory, tracker, cost, run, write)
    result["metrics"] = metrics | result["metrics"]
    peaks = {name: end[name] for name in ("peak_rss_mb", "peak_gpu_mb")}
    return result | peaks | {"gpus": count_workers(config)}


def prune(config: PruneConfig, shape: Shape, given: Given, directory: Path) -> Cut:
    """Prune the teacher by Model-Optimizer and write the student: see `engines.Engine.prune`.

    Model-Optimizer keeps the same channels and heads as engine hf, the most important first. Of what may be given, it
    takes only `config.drop_layers`.

    Raises:
        ConfigError: NeMo is not installed, Model-Optimizer cannot cut to a size, or the dataset has masks.
        RunError: the worker failed, or the scores are not finite.
    """
    check_unmasked(config.dataset)
    check_installed()
    check_convertible(check_architecture(config.teacher), config.teacher)
    teacher_config = read_config(config.teacher)
    sizes = _list_sizes(shape, Shape.from_config(teacher_config))
    check_sizes(config, sizes)
    importance = _prune_to(config, sizes, teacher_config, directory)
    plan = choose_plan(importance or Importance.zeros(teacher_config), shape, given)
    return Cut(plan, importance, 0 if importance is None else split_calibration(config)[0], [], [])


def _list_sizes(shape: Shape, teacher: Shape) -> dict[str, int]:
    """Return the sizes to cut, under the names of config.json; heads and groups change together."""
    sizes, heads = asdict(shape), {"num_attention_heads", "num_key_value_heads"}
    changed = {name for name, size in sizes.items() if size != getattr(teacher, name)}
    return {name: size for name, size in sizes.items() if name in changed or (name in heads and changed & heads)}


def _prune_to(config: PruneConfig, sizes: dict[str, int], teacher_config: Any, directory: Path) -> Importance | None:
    """Write the student with these sizes; return Model-Optimizer's scores, or None if no scores were used."""
    if not sizes:
        copy_model(config.teacher, directory)
        return None
    work = checkpoints_path(directory)
    work.mkdir(exist_ok=True)
    _import_models({"teacher": config.teacher}, work)
    _run_job({"job": "prune", "config": config.model_dump(mode="json"), "sizes": sizes}, work)
    _export_model(work, work / "pruned", config.teacher, directory)
    if config.drop_layers:
        return None
    sequences, micro_batch_size = split_calibration(config)
    return _read_importance(work / SCORES, teacher_config, sequences // micro_batch_size)


def _read_importance(scores: Path, config: Any, batches: int) -> Importance:
    """Read the sums that Model-Optimizer collected by the names of its modules; it counts layers from 1.

    It sums the block influence over the batches; ours is the mean.
    """
    sums = torch.load(scores, weights_only=True)
    (activations,) = sums["activations"]  # one process's
    layers = range(config.num_hidden_layers)

    def stack_layers(name: str) -> torch.Tensor:
        return torch.stack(
            [next(v for k, v in activations.items() if k.endswith(f"layers.{i}.{name}")) for i in layers]
        )

    norms = next(value for value in activations.values() if isinstance(value, dict))
    return Importance.from_squares(
        config,
        torch.tensor([sums["layers"][layer + 1] for layer in layers]) / batches,
        torch.stack(list(norms.values())),
        stack_layers("mlp"),
        stack_layers("self_attention"),
    ).check_finite()


def export_checkpoint(checkpoint: Path, target: Path) -> None:
    """Write a NeMo 2 checkpoint as a Hugging Face directory.

    Raises:
        RunError: the checkpoint is damaged, or NeMo cannot export the model.
    """
    output = target / "exported"
    shutil.rmtree(output, ignore_errors=True)
    exports = [{"checkpoint": str(checkpoint), "like": None, "output": str(output)}]
    _run_job({"job": "export", "exports": exports}, target)
    finish_model(output, tokenizer_from=output)
    for path in list(output.iterdir()):
        path.rename(target / path.name)
    output.rmdir()
    for name in ("export.json", "export.log"):
        (target / name).unlink()


def split_calibration(config: PruneConfig) -> tuple[int, int]:
    """Return the number of calibration sequences, and the largest micro-batch size that divides it.

    NeMo takes only whole micro-batches. A larger one than the setting's might not fit on the GPU.
    """
    train = PackedDataset(config.dataset / "train", config.sequence_length, config.seed)
    sequences = min(config.calibration_sequences, len(train))
    return sequences, next(size for size in range(config.micro_batch_size, 0, -1) if sequences % size == 0)


def _run_job(job: dict[str, Any], work: Path, processes: int = 1, follow: Any = lambda: None) -> None:
    print(f"engine nemo: {job['job']}, {processes} process{'es' if processes > 1 else ''}", flush=True)
    launch(WORKER, job | {"work": str(work)}, work, processes, follow)


def _run_job_on_nodes(job: dict[str, Any], work: Path, nodes: int, gpus: int, follow: Any = lambda: None) -> None:
    """Run a job's workers in a TrainJob that is named after the key of the stage."""
    from minitron.engines import trainjob

    trainjob.launch(WORKER, job | {"work": str(work)}, work, nodes, gpus, (work.parent / KEY).read_text(), follow)


def _import_models(models: dict[str, Path], work: Path) -> None:
    """Convert Hugging Face directories to NeMo checkpoints in `work`, by name, unless they exist already."""
    missing = {name: str(path) for name, path in models.items() if not read_checkpoint(work / name)}
    if missing:
        _run_job({"job": "import", "models": missing}, work)


def _export_model(work: Path, checkpoint: Path, like: Path, directory: Path) -> None:
    """Write a NeMo checkpoint as a Hugging Face directory; all but weights and sizes is the model `like`'s."""
    exported = work / "exported"
    shutil.rmtree(exported, ignore_errors=True)
    exports = [{"checkpoint": str(checkpoint), "like": str(like), "output": str(exported)}]
    _run_job({"job": "export", "exports": exports}, work)
    finish_derived_model(exported, like)
    copy_model(exported, directory)


def _score_teacher_near_gpus(config: TrainingConfig, teacher: Path, work: Path) -> dict[str, float]:
    """Score the teacher here, or on a node if the nodes have the GPUs."""
    if config.num_nodes == 1:
        return score_teacher(config, teacher)
    if not (scores := read_checkpoint(work / TEACHER)):
        job = {"job": "score", "config": config.model_dump(mode="json"), "teacher": str(teacher)}
        _run_job_on_nodes(job, work, 1, 1)
        scores = read_checkpoint(work / TEACHER)
    if not scores:
        raise RunError(f"{work / TEACHER}: the teacher's scores are damaged; check the disk, then run it again")
    return scores.note


def score_teacher(config: TrainingConfig, teacher: Path) -> dict[str, float]:
    """Score the teacher, and free its memory before the workers start."""
    from minitron.engines import hf

    model: Any = load_model(teacher, hf.get_compute_dtype())
    metrics = validate_teacher(config, model.to(hf.get_device()))
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return metrics
