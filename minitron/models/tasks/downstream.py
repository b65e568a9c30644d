"""Downstream tasks, run by lm-eval: from its catalog, or from local task files without network access.

Used by `python -m minitron.evaluate --config FILE`.
"""

import difflib
import io
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
from huggingface_hub import constants as hub
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minitron.config.stages import EvaluateConfig
from minitron.errors import ConfigError, RunError
from minitron.models.tasks.shared_context import SharedContextLM

BATCH_SIZE = 8
"""Texts per forward pass if the model generates, or if a text is longer than its window of attention."""

BOOTSTRAP_ITERATIONS = 100
"""For the standard error of metrics that are not means. A mean has a formula, but lm-eval omits it if this is 0."""


@contextmanager
def load_tasks(config: EvaluateConfig, directory: Path) -> Iterator[Any]:
    """Load the tasks with their questions for the block; yield None if there are none.

    The datasets library's copies of local files are deleted after it.

    Args:
        config: names the tasks and the directory of their files.
        directory: directory for temporary files.

    Raises:
        ConfigError: a task is unknown, runs code that models write and is not in `unsafe_tasks`, or has no examples for
            `num_fewshot`; or the files of a local task are invalid.
        RunError: the data of a task in lm-eval's catalog cannot be fetched.
    """
    if not config.tasks:
        yield None
    elif config.task_directory is None:
        yield _load_tasks(config, TaskManager(), Path())
    else:
        manager = TaskManager(include_path=str(config.task_directory.absolute()), include_defaults=False)
        with (
            TemporaryDirectory(dir=directory.absolute()) as cache,
            _override_settings(datasets.config, HF_DATASETS_CACHE=Path(cache), HF_HUB_OFFLINE=True),
            _override_settings(hub, HF_HUB_OFFLINE=True),
        ):
            yield _load_tasks(config, manager, config.task_directory)


@contextmanager
def _override_settings(module: Any, **values: Any) -> Iterator[None]:
    """Change a library's settings for the block: it read their environment variables when it was imported."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)


def _load_tasks(config: EvaluateConfig, manager: TaskManager, directory: Path) -> Any:
    """Load the tasks; file names in them are relative to `directory`."""
    if unknown := [name for name in config.tasks if name not in manager.all_tasks]:
        raise ConfigError(_explain_unknown_task(unknown[0], manager.all_tasks, config.task_directory))
    for name in config.tasks:  # before they are loaded, because loading runs their code
        entry = manager.task_index[name]
        tagged = [manager.task_index[part] for part in entry.tags if part in manager.task_index]
        _check_code(config, name, any((each.cfg or {}).get("unsafe_code") for each in (entry, *tagged)))
    _silence_lm_eval()
    try:
        with chdir(directory), redirect_stderr(io.StringIO()):
            parts = {name: manager.load([name]) for name in config.tasks}
            for name, part in parts.items():
                for task in part["tasks"].values():
                    _configure_task(config, name, task)
            tasks = _merge_tasks(parts)
            _seed_examples(tasks, config.seed)
            for task in tasks["tasks"].values():
                task.build_all_requests(limit=1, rank=0, world_size=1)  # fails when templates do not fit the data
    except ConfigError:
        raise
    except Exception as error:  # a task file can name anything
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())
        reason = f"evaluate.tasks: {', '.join(config.tasks)} cannot be loaded ({reason}); "
        if config.task_directory is None:
            raise RunError(f"{reason}check the network and HF_TOKEN, or give a task_directory") from error
        raise ConfigError(
            f"{reason}correct the files in {config.task_directory}; its tasks can read only datasets beside them"
        ) from error
    return tasks


def _configure_task(config: EvaluateConfig, name: str, task: Any) -> None:
    """Check a task, and set its examples; `name` is its own or that of its group in the settings."""
    _check_code(config, name, getattr(task, "UNSAFE_CODE", False))
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"evaluate.tasks: {name} needs images or sound, which the models cannot read; remove it")
    shots = config.num_fewshot
    if isinstance(shots, dict):
        shots = shots.get(name)
    elif task.get_config("num_fewshot") == 0:
        return  # the task forbids examples; a number for all tasks is not meant for it
    if shots is None:
        return
    if shots and _shows_answers(task):
        raise ConfigError(
            f"evaluate.num_fewshot: {name} has no examples apart from its questions; give the task a training_split or "
            "fewshot_split, or set its number to 0"
        )
    task.set_config("num_fewshot", shots)


def _shows_answers(task: Any) -> bool:
    """Say whether a task's examples could be its own questions; lm-eval excludes that only in a test split."""
    split, settings = task.fewshot_cfg.split, task.config
    if split is None and task.fewshot_cfg.samples is not None:
        return False
    examples = split or settings.training_split or settings.validation_split or settings.test_split
    questions = settings.test_split or settings.validation_split
    return examples == questions and split != settings.test_split


def _check_code(config: EvaluateConfig, name: str, unsafe: bool) -> None:
    if unsafe and name not in config.unsafe_tasks:
        raise ConfigError(
            f"evaluate.tasks: {name} runs code that the models write; remove it, or add it to evaluate.unsafe_tasks "
            "if that code can do no harm"
        )


def _merge_tasks(parts: dict[str, Any]) -> Any:
    """Return the tasks of all names in one, as lm-eval's `evaluate` takes them."""
    merged: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name, part in parts.items():
        if twice := merged["tasks"].keys() & part["tasks"].keys():
            raise ConfigError(f"evaluate.tasks: {name} and another task both have {min(twice)}; remove one of them")
        for kind, entries in merged.items():
            entries |= part.get(kind, {})
    return merged


def _seed_examples(tasks: Any, seed: int) -> None:
    """Reset the choice of examples, so that every model sees the same ones."""
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed)


def _explain_unknown_task(name: str, known: list[str], directory: Path | None) -> str:
    if directory is None:
        close = " or ".join(difflib.get_close_matches(name, known, n=3)) or "a name that 'lm-eval ls tasks' lists"
        return f"evaluate.tasks: {name} is not a task of lm-eval; give {close}, or a task_directory of your own"
    if known:
        return f"evaluate.tasks: {name} is not a task in {directory}; give one of {', '.join(known)}"
    return f"evaluate.task_directory: {directory} holds no task; give a directory with lm-eval's .yaml files"


def _silence_lm_eval() -> None:
    """Silence lm-eval's warnings: they are about choices made on purpose, such as a model in memory."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def score_tasks(
    config: EvaluateConfig, tasks: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, description: str
) -> tuple[dict[str, dict[str, float]], dict[str, list[float]]]:
    """Score a model on the tasks.

    Args:
        config: its `task_limit` is the number of questions per task, its `seed` chooses the examples before them.
        tasks: the tasks from `load_tasks`.
        model: the model in eval mode, on the device to compute on.
        tokenizer: its tokenizer.
        description: label of the progress bar.

    Returns:
        Per task, metrics by name, each with its `_stderr` if it has one; a group replaces its tasks. Then, for metrics
        that are means over questions, the values of every question by TASK_METRIC.
    """
    if tasks is None:
        return {}, {}
    _silence_lm_eval()
    _seed_examples(tasks, config.seed)
    with tqdm(desc=description, unit="answer", file=sys.stderr) as bar, redirect_stderr(io.StringIO()):
        # lm-eval would draw a bar for every task and step, most of them nameless.
        answerer = SharedContextLM(bar, pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE)
        results: Any = evaluate(
            answerer,
            tasks,
            limit=config.task_limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            confirm_run_unsafe_code=True,  # load_tasks has refused those that the settings do not name
        )
    subtasks = results["group_subtasks"]
    parts = {part for group in results.get("groups", {}) for part in subtasks[group]}
    numbers = {task: _rename_metrics(row) for task, row in results["results"].items() if task not in parts}
    scores = {task: metrics for task, metrics in numbers.items() if metrics}
    items = {
        f"{task}_{metric}": values
        for task, metrics in scores.items()
        for metric, values in _list_items(task, subtasks, results["samples"]).items()
        if metric in metrics and math.isclose(math.fsum(values) / len(values), metrics[metric], abs_tol=1e-9)
    }
    return scores, items


def _list_items(task: str, subtasks: dict[str, list[str]], samples: dict[str, Any]) -> dict[str, list[float]]:
    """Return the values of every question by metric; a group has those of its tasks, one after the other."""
    items: dict[str, list[float]] = {}
    if task not in samples:
        for part in subtasks.get(task, []):
            for metric, values in _list_items(part, subtasks, samples).items():
                items.setdefault(metric, []).extend(values)
    for sample in samples.get(task, []):
        for metric in sample["metrics"]:
            if isinstance(sample[metric], int | float):
                items.setdefault(_name_metric(metric, sample["filter"]), []).append(float(sample[metric]))
    return items


def _rename_metrics(row: dict[str, Any]) -> dict[str, float]:
    """Turn lm-eval's keys into names: acc,none is acc; exact_match_stderr,strict is exact_match_strict_stderr."""
    numbers = {}
    for key, value in row.items():
        metric, comma, variant = key.partition(",")
        if comma and isinstance(value, int | float) and math.isfinite(value):
            name = _name_metric(metric.removesuffix("_stderr"), variant)
            numbers[f"{name}_stderr" if metric.endswith("_stderr") else name] = float(value)
    return numbers


def _name_metric(metric: str, variant: str) -> str:
    return metric if variant == "none" else f"{metric}_{variant}"
