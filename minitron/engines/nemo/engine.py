"""The NeMo engine: NeMo 2's own import, fine-tuning, pruning, distillation and export, on Megatron's parallelism.

This module checks, launches and follows; NeMo itself runs in the workers (engines/nemo/worker.py), one process per GPU.
Models come and go as Hugging Face directories. Everything in between lies in the work in progress, CHECKPOINTS, so that
a killed stage finds it again.
"""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from minitron.config.stages import DistillConfig, PruneConfig, TrainingConfig
from minitron.data.packed import PackedDataset
from minitron.engines.launcher import launch
from minitron.engines.nemo.checks import (
    check_convertible,
    check_installed,
    check_parallelism,
    check_shared,
    check_sizes,
    count_workers,
)
from minitron.engines.nemo.files import BEST, FINISHED, HISTORY, SCORES, TEACHER, forget_lost_steps
from minitron.engines.nemo.progress import Progress
from minitron.models.checkpoint import check_architecture, copy_model, finish_model, load_model, read_config
from minitron.models.importance import Importance
from minitron.models.losses import LossWeights
from minitron.models.scoring import validate_teacher
from minitron.storage.staging import CHECKPOINTS, KEY
from minitron.tracking.stage_run import Tracker

WORKER = "minitron.engines.nemo.worker"


def train(
    config: TrainingConfig,
    initial: Path,
    weights: LossWeights,
    directory: Path,
    tracker: Tracker,
    teacher: Path | None = None,
) -> dict[str, Any]:
    """Train the model in `initial`; write its best state by validation loss, the untrained one included.

    Arguments and result are those of `minitron.engines.hf.train`.

    Raises:
        ConfigError: NeMo is not installed, or a parallel size does not divide what it splits.
        RunError: a worker failed.
    """
    check_installed()
    models = [initial] if teacher is None else [initial, teacher]
    for model in models:
        check_parallelism(config, check_architecture(model), model, count_workers(config))
    work = directory / CHECKPOINTS
    work.mkdir(exist_ok=True)
    if config.num_nodes > 1:
        check_shared(config, [config.dataset, *models])
    metrics: dict[str, Any] = {} if teacher is None else _score_teacher_near_gpus(config, teacher, work)
    _import_models(dict(zip(("student", "teacher"), models, strict=False)), work)
    stage = "distill" if isinstance(config, DistillConfig) else "finetune"
    job = {"job": "train", "stage": stage, "config": config.model_dump(mode="json"), "weights": weights._asdict()}
    if not (work / FINISHED).is_file():  # else it was killed while it exported
        forget_lost_steps(work)
        with Progress(config, work, tracker) as progress:
            if config.num_nodes == 1:
                _run_job(job, work, count_workers(config), progress)
            else:
                _run_job_on_nodes(job, work, config.num_nodes, config.gpus_per_node, progress)
    best = json.loads((work / BEST / "best.json").read_text())
    if best["step"]:
        _export_model(work / BEST, initial, directory)
    else:
        copy_model(initial, directory)
    return _read_result(config, work, best, metrics)


def _read_result(config: TrainingConfig, work: Path, best: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """Return what the stage's record gets, of what the workers left."""
    history = [json.loads(row) for row in (work / HISTORY).read_text().splitlines()]
    end = json.loads((work / FINISHED).read_text())
    step_tokens = config.global_batch_size * config.sequence_length
    metrics = metrics | {
        "tokens": config.max_steps * step_tokens,
        "tokens_per_second": round(end["steps"] * step_tokens / end["seconds"], 1),
        "validation_loss_before": history[0]["validation_loss"],
        "validation_loss": best["loss"],
        "best_step": best["step"],
    }
    peaks = {name: end[name] for name in ("peak_rss_mb", "peak_gpu_mb")}
    return {"metrics": metrics, "history": history, "gpus": count_workers(config)} | peaks


def prune(config: PruneConfig, sizes: dict[str, int], directory: Path) -> tuple[Importance, int]:
    """Prune the teacher by Model-Optimizer and write the student.

    Args:
        config: the stage's settings.
        sizes: the student's sizes that differ from the teacher's, under the names of config.json.
        directory: the stage's directory of work in progress.

    Returns:
        The scores that Model-Optimizer found, and the sequences it read: none where nothing is chosen by scores.

    Raises:
        ConfigError: NeMo is not installed, or Model-Optimizer cannot cut to such a size.
        RunError: the worker failed, or the scores are not finite.
    """
    check_installed()
    check_convertible(check_architecture(config.teacher), config.teacher)
    check_sizes(config, sizes)
    teacher_config = read_config(config.teacher)
    if not sizes:
        copy_model(config.teacher, directory)
        return Importance.zeros(teacher_config), 0
    work = directory / CHECKPOINTS
    work.mkdir(exist_ok=True)
    _import_models({"teacher": config.teacher}, work)
    _run_job({"job": "prune", "config": config.model_dump(mode="json"), "sizes": sizes}, work)
    _export_model(work / "pruned", config.teacher, directory)
    if config.drop_layers:
        return Importance.zeros(teacher_config), 0
    return _read_importance(work / SCORES, teacher_config), count_calibration_sequences(config)


def _read_importance(scores: Path, config: Any) -> Importance:
    """Read the sums that Model-Optimizer collected, by the names of its modules; layers are counted from 1 there."""
    found = torch.load(scores, weights_only=True)
    (activations,) = found["activations"]  # of one process
    layers = range(config.num_hidden_layers)

    def stack(name: str) -> torch.Tensor:
        return torch.stack(
            [next(v for k, v in activations.items() if k.endswith(f"layers.{i}.{name}")) for i in layers]
        )

    norms = next(value for value in activations.values() if isinstance(value, dict))
    return Importance.from_squares(
        config,
        torch.tensor([found["layers"][layer + 1] for layer in layers]),
        torch.stack(list(norms.values())),
        stack("mlp"),
        stack("self_attention"),
    ).check_finite()


def export_checkpoint(checkpoint: Path, target: Path) -> None:
    """Write a NeMo 2 checkpoint as a Hugging Face directory.

    Raises:
        RunError: it is damaged, or no language model that NeMo can export.
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


def count_calibration_sequences(config: PruneConfig) -> int:
    """Return how many sequences importance is read on: whole micro-batches, which is what NeMo takes."""
    train = PackedDataset(config.dataset / "train", config.sequence_length, config.seed)
    batches = max(1, min(config.calibration_sequences, len(train)) // config.micro_batch_size)
    return batches * config.micro_batch_size


def _run_job(job: dict[str, Any], work: Path, processes: int = 1, follow: Any = lambda: None) -> None:
    print(f"engine nemo: {job['job']}, {processes} process{'es' if processes > 1 else ''}", flush=True)
    launch(WORKER, job | {"work": str(work)}, work, processes, follow)


def _run_job_on_nodes(job: dict[str, Any], work: Path, nodes: int, gpus: int, follow: Any = lambda: None) -> None:
    """Run a job's workers in a TrainJob, named after the key of the stage whose work in progress this is."""
    from minitron.engines import trainjob

    trainjob.launch(WORKER, job | {"work": str(work)}, work, nodes, gpus, (work.parent / KEY).read_text(), follow)


def _import_models(models: dict[str, Path], work: Path) -> None:
    """Convert Hugging Face directories to NeMo checkpoints in `work`, by name; those that are there are whole."""
    missing = {name: str(path) for name, path in models.items() if not (work / name).exists()}
    if missing:
        _run_job({"job": "import", "models": missing}, work)


def _export_model(checkpoint: Path, like: Path, directory: Path) -> None:
    """Write a NeMo checkpoint as a Hugging Face directory with the settings and tokenizer of the model `like`."""
    work = directory / CHECKPOINTS
    exported = work / "exported"
    shutil.rmtree(exported, ignore_errors=True)
    exports = [{"checkpoint": str(checkpoint), "like": str(like), "output": str(exported)}]
    _run_job({"job": "export", "exports": exports}, work)
    finish_model(exported, tokenizer_from=like)
    copy_model(exported, directory)


def _score_teacher_near_gpus(config: TrainingConfig, teacher: Path, work: Path) -> dict[str, float]:
    """Score the teacher: here, or where the GPUs are."""
    if config.num_nodes == 1:
        return score_teacher(config, teacher)
    scores = work / TEACHER
    if not scores.is_file():
        job = {"job": "score", "config": config.model_dump(mode="json"), "teacher": str(teacher)}
        _run_job_on_nodes(job, work, 1, 1)
    return json.loads(scores.read_text())


def score_teacher(config: TrainingConfig, teacher: Path) -> dict[str, float]:
    """Score the teacher, and give its memory back before the workers start."""
    from minitron.engines import hf

    model: Any = load_model(teacher, hf.get_compute_dtype())
    metrics = validate_teacher(config, model.to(hf.get_device()))
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return metrics
