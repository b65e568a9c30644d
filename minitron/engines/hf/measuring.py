"""The measurements of an evaluation: scores on the splits, speeds, downstream tasks and texts of all its models.

In several processes, one per GPU, each has all models, and takes every n-th sequence and every n-th batch of answers.
Speeds and texts are those of process 0. It keeps every part, where the stage finds it.
"""

import gc
import math
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minitron.config.metrics import CHAMPION, find_not_finite
from minitron.config.parse import parse
from minitron.config.stages import EvaluateConfig
from minitron.data.contamination import list_questions, measure_contamination
from minitron.data.indexed import IndexedDataset
from minitron.data.packed import PackedDataset
from minitron.data.tokenizer import load_tokenizer
from minitron.engines.hf.device import get_compute_dtype, get_device
from minitron.engines.hf.sharding import score_shares
from minitron.errors import RunError
from minitron.models.checkpoint import count_model_parameters, load_model
from minitron.models.generation import continue_prompts, time_generation
from minitron.models.measurements import Measurements
from minitron.models.processes import ask_first, count_processes, get_rank
from minitron.models.scoring import average_scores
from minitron.models.tasks.downstream import load_tasks, score_tasks
from minitron.storage.hashing import content_hash
from minitron.storage.layout import CONTAMINATION

Content = dict[str, Any]
"""A part of the measurements, in JSON's types."""


def make_job(
    config: EvaluateConfig, paths: dict[str, Path], splits: dict[str, Path], directory: Path, measured: Measurements
) -> dict[str, Any]:
    """Return the job of the workers, in JSON's types: the arguments of `measure`."""
    return {
        "job": "evaluate",
        "config": config.model_dump(mode="json"),
        "paths": {name: str(path) for name, path in paths.items()},
        "splits": {name: str(path) for name, path in splits.items()},
        "work": str(directory),
        "measured": str(measured.directory),
    }


def measure_in_worker(job: dict[str, Any]) -> None:
    """Run a job of `make_job`; all processes call this."""
    paths, splits = ({name: Path(path) for name, path in job[key].items()} for key in ("paths", "splits"))
    config: Any = parse("evaluate", job["config"])
    measure(config, paths, splits, Path(job["work"]), Measurements(Path(job["measured"])))


@torch.inference_mode()
def measure(
    config: EvaluateConfig, paths: dict[str, Path], splits: dict[str, Path], directory: Path, measured: Measurements
) -> tuple[dict[str, Content], dict[str, str], Content]:
    """Measure the models; all of them are in memory while the teacher scores them.

    Args:
        config: of the stage.
        paths: the models by name.
        splits: prefixes of the packed datasets by name; they are not needed if the scores are there.
        directory: directory for temporary files.
        measured: the parts that are there already, and those that are measured now.

    Returns:
        Measurements with `items` by the name of a model; for every model the first one with the same weights; and by
        task the questions in the training text.

    Raises:
        RunError: a metric of a model other than the champion is not finite.
    """
    sources = _find_equal_models(paths)
    names = list(dict.fromkeys(sources.values()))
    models, tokenizer = _Models(paths), load_tokenizer(paths["teacher"])
    with ExitStack() as stack:
        parts = (CONTAMINATION, *(f"tasks-{name}" for name in names))
        answered = all(_read(measured, part) is not None for part in parts)
        tasks = None if answered else stack.enter_context(load_tasks(config, directory))
        measurements = _get(
            measured, "scores", lambda: _score_models(config, splits, models, names, sources["teacher"])
        )
        for name in _list_incomparable(paths, measurements):
            names.remove(name)
            models.pop(name, None)
            del sources[name]
        speeds = _get(
            measured,
            "speeds",
            lambda: ask_first(lambda: time_generation(config, {name: models[name] for name in names}, tokenizer)),
        )
        for name in names:
            measurements[name]["items"] |= speeds[name]
            measurements[name] |= {metric: statistics.median(rates) for metric, rates in speeds[name].items()}
            answer = partial(_answer_questions, config, tasks, models, name, tokenizer)
            answers = _get(measured, f"tasks-{name}", answer)
            measurements[name]["items"] |= answers.pop("items")
            measurements[name] |= answers
            models.pop(name, None)
            gc.collect()  # a model has reference cycles; free its memory before the next model runs
        contamination = _get(measured, CONTAMINATION, lambda: _find_questions(config, tasks, tokenizer))
    return measurements, sources, contamination


def _read(measured: Measurements, part: str) -> Content | None:
    """Return a part to all processes; None if it is missing."""
    return ask_first(lambda: measured.read(part))


def _get(measured: Measurements, part: str, measure: Callable[[], Content]) -> Content:
    """Return a part to all processes, which measure it together if it is missing; process 0 keeps it."""
    if count_processes() > 1 and _read(measured, part) is None:
        content = measure()
        return ask_first(lambda: measured.get(part, lambda: content))
    return ask_first(lambda: measured.get(part, measure))


class _Models(dict[str, PreTrainedModel]):
    """The models by name; each is loaded when its first measurement is missing."""

    def __init__(self, paths: dict[str, Path]) -> None:
        super().__init__()
        self.paths = paths

    def __missing__(self, name: str) -> PreTrainedModel:
        self[name] = model = _load_model(self.paths[name])
        return model


def _find_questions(config: EvaluateConfig, tasks: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return, by task, how many questions are in the training text; they are reported, and nothing is dropped."""
    if tasks is None or get_rank():
        return {}
    questions = list_questions(tasks, config.tasks, config.task_limit)
    found = measure_contamination(IndexedDataset(config.dataset / "train").tokens, questions, tokenizer)
    for task, entry in found.items():
        print(
            f"evaluate: {task}: {entry['found']} of {entry['questions']} questions are in the training text", flush=True
        )
    return found


def _answer_questions(
    config: EvaluateConfig, tasks: Any, models: _Models, name: str, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return a model's scores on the tasks, their items, and its continuations of the prompts."""
    scores, items = score_tasks(config, tasks, models[name], tokenizer, f"{name}: tasks")
    texts = ask_first(lambda: continue_prompts(config, models[name], tokenizer))
    return {"tasks": scores, "items": items} | texts


def _list_incomparable(paths: dict[str, Path], measurements: dict[str, dict[str, Any]]) -> list[str]:
    """Return the champion, with a warning, if one of its metrics is not finite: nothing can be compared with it.

    Raises:
        RunError: a metric of another model is not finite.
    """
    incomparable = []
    by_loss = sorted(measurements, key=lambda name: math.isfinite(measurements[name]["validation_loss"]))
    for name in by_loss:  # a bad teacher spoils the divergence of all others, so it is named first
        if reason := find_not_finite(measurements[name], name):
            message = f"evaluate: {paths[name]}: {reason}; the weights are damaged, or a training diverged"
            if name != CHAMPION:
                raise RunError(f"{message}; make the model again with a lower learning_rate")
            print(f"warning: {message}: not compared with the champion", file=sys.stderr, flush=True)
            incomparable.append(name)
    return incomparable


def _find_equal_models(paths: dict[str, Path]) -> dict[str, str]:
    """Return the first model with the same weights, for every model: itself, unless finetune kept the teacher."""
    first: dict[tuple[str, ...], str] = {}
    return {name: first.setdefault(_hash_weights(path), name) for name, path in paths.items()}


def _hash_weights(path: Path) -> tuple[str, ...]:
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    return tuple(content_hash(file) for file in files)


def _load_model(path: Path) -> PreTrainedModel:
    model = load_model(path, get_compute_dtype())
    return model.to(get_device())  # type: ignore[arg-type]  # transformers' decorator hides the signature


def _score_models(
    config: EvaluateConfig, splits: dict[str, Path], models: _Models, names: list[str], teacher: str
) -> dict[str, dict[str, Any]]:
    """Score the models, one pass per split; only on validation against the teacher, as in the report."""
    datasets = {split: PackedDataset(prefix, config.sequence_length, config.seed) for split, prefix in splits.items()}
    loaded = {name: models[name] for name in names}
    scores = {
        split: score_shares(
            loaded,
            dataset,
            config.evaluation_sequences,
            config.micro_batch_size,
            split,
            reference=models[teacher] if split == "validation" else None,
        )
        for split, dataset in datasets.items()
    }
    return {name: _describe_model(loaded[name], {split: scores[split][name] for split in splits}) for name in names}


def _describe_model(model: PreTrainedModel, scores: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return the measurements of a model on the splits, and their `items`."""
    validation = scores["validation"]
    means = average_scores(validation)
    items = {f"{split}_loss": terms["loss"] for split, terms in scores.items()}
    return {
        "parameters": count_model_parameters(model),
        "weights_mb": model.get_memory_footprint() / 2**20,
        "validation_loss": means["loss"],
        **{
            f"{split}_loss": average_scores(scores[split])["loss"] if split in scores else None
            for split in ("test", "out_of_domain")
        },
        **{metric: means[metric] for metric in ("perplexity", "kl", "top1_agreement")},
        "items": items | {metric: validation[metric] for metric in ("kl", "top1_agreement")},
    }
