"""Training with the transformers engine: in this process, or in one worker per GPU of the task or of several nodes.

The two stages differ only in the loss (minitron/models/losses.py). A killed training resumes from its last complete
checkpoint, on any number of GPUs.
"""

from pathlib import Path
from typing import Any

import torch

from minitron.config.parse import SectionError
from minitron.config.stages import DistillConfig, TrainingConfig
from minitron.data.packed import open_training_data
from minitron.engines.divergence import check_untrained
from minitron.engines.gpus import check_shared, count_workers
from minitron.engines.hf import loop
from minitron.engines.hf.teacher_cache import cache_teacher
from minitron.engines.launcher import launch
from minitron.engines.progress import Progress, find_start, follow_training, measure_cost
from minitron.models.checkpoint import load_model, save_derived_model
from minitron.storage.staging import KEY, checkpoints_path
from minitron.tracking.stage_run import Tracker

WORKER = "minitron.engines.hf.worker"


def train(
    config: TrainingConfig,
    initial: Path,
    directory: Path,
    tracker: Tracker,
    teacher: Path | None = None,
) -> dict[str, Any]:
    """Train the model in `initial`; write its best state by validation loss: see `engines.Engine.train`.

    Raises:
        ConfigError: the micro-batches of a step cannot be divided among the GPUs.
    """
    workers = count_workers(config)
    if faults := list(config.find_division_faults(workers)):
        raise SectionError(faults)
    work = checkpoints_path(directory)
    work.mkdir(exist_ok=True)
    source, metrics = loop.Teacher(teacher) if teacher else None, dict[str, float]()
    if isinstance(config, DistillConfig) and config.teacher_cache:
        cached, metrics = cache_teacher(config, open_training_data(config)[0])
        check_untrained(config.teacher, metrics["teacher_validation_loss"])
        source = loop.Teacher(config.teacher, cached.directory)
    online = source and not source.cache
    cost = measure_cost(config, initial, teacher if online else None, workers)

    def run(progress: Progress) -> None:
        if workers == 1:
            start = find_start(work)
            progress()  # the last rows may not have arrived before the kill
            loop.train(config, initial, source, work, start, progress.report)
        else:
            _launch_workers(config, initial, source, work, workers, progress)

    def write(best: Path, target: Path) -> None:
        save_derived_model(load_model(best, torch.float32), target, initial)

    result, end = follow_training(config, initial, directory, tracker, cost, run, write)
    result["metrics"] = metrics | end["metrics"] | result["metrics"]
    if workers > 1:
        result |= {"gpus": workers} | {name: end[name] for name in ("peak_rss_mb", "peak_gpu_mb")}
    return result


def make_job(config: TrainingConfig, initial: Path, teacher: loop.Teacher | None, work: Path) -> dict[str, Any]:
    """Return the job of the workers, in JSON's types."""
    return {
        "job": "train",
        "stage": "distill" if isinstance(config, DistillConfig) else "finetune",
        "config": config.model_dump(mode="json"),
        "initial": str(initial),
        "teacher": teacher and [place and str(place) for place in teacher],
        "work": str(work),
    }


def _launch_workers(
    config: TrainingConfig,
    initial: Path,
    teacher: loop.Teacher | None,
    work: Path,
    workers: int,
    progress: Progress,
) -> None:
    job = make_job(config, initial, teacher, work)
    print(f"engine hf: {workers} processes, each with 1/{workers} of the parameters", flush=True)
    if config.num_nodes == 1:
        launch(WORKER, job, work, workers, progress)
        return
    from minitron.engines import trainjob

    check_shared(config, [config.dataset, initial, *([teacher.path] if teacher else [])])
    key = (work.parent / KEY).read_text()
    trainjob.launch(WORKER, job, work, config.num_nodes, config.gpus_per_node, key, progress)
