"""Measure teacher before and after correction, pruned model and student, and write the report.

    python -m minitron.evaluate --config FILE

Writes `evaluation.json`, `lineage.json`, `report.html` and `tensorboard/`. Models with equal weights are measured once.
"""

import gc
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from minitron import lineage, stage
from minitron.checkpoint import check_architecture, load_model, load_tokenizer, parameter_count
from minitron.config import EvaluateConfig
from minitron.data import IndexedDataset, PackedDataset
from minitron.downstream import ask, loaded_tasks
from minitron.engines import hf
from minitron.errors import ConfigError
from minitron.events import write_events
from minitron.figures import MODELS
from minitron.manifest import check_tokenizer
from minitron.report import write_report
from minitron.results import write_atomically
from minitron.scoring import score
from minitron.sources import resolve
from minitron.storage import content_hash
from minitron.tracking import Tracker


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure the four models; `config.output` gets evaluation.json and report.html.

    Returns:
        The stage's record; its metrics are those of evaluation.json, named model_metric or model_task_metric.

    Raises:
        ConfigError: a tokenizer is not the dataset's, a sequence is longer than a model takes, a task is not known.
        RunError: weights, the dataset or a task's data cannot be read.
    """
    return stage.run(config, _work)


def _work(config: EvaluateConfig, directory: Path, tracker: Tracker) -> dict[str, Any]:
    paths = {name: resolve(getattr(config, name), config) for name in MODELS}
    _check(config, paths)
    splits = _splits(config)
    with loaded_tasks(config, directory) as tasks:
        evaluation = _measure(config, paths, splits, tasks, tracker)
    write_atomically(directory / "evaluation.json", evaluation)
    origin = lineage.collect(config)
    write_atomically(directory / lineage.LINEAGE, origin)
    write_events(directory, origin["stages"])
    write_report(directory, config, evaluation)
    return {"metrics": flat(evaluation)}


def flat(evaluation: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of evaluation.json under one name each, as metrics are logged: student_arc_easy_acc."""
    metrics = {"gap_closed": evaluation["gap_closed"]}
    metrics["parameters_ratio"] = evaluation["student"]["parameters"] / evaluation["teacher"]["parameters"]
    for model in MODELS:
        found = evaluation[model]
        metrics |= {f"{model}_{name}": value for name, value in found.items()}
        for task, numbers in found["tasks"].items():
            metrics |= {f"{model}_{task}_{name}": value for name, value in numbers.items()}
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def gap_closed(pruned: float, student: float, teacher: float) -> float | None:
    """Return the share of the loss that pruning added and distillation took back; None if pruning added none."""
    return (pruned - student) / (pruned - teacher) if pruned > teacher else None


def _check(config: EvaluateConfig, paths: dict[str, Path]) -> None:
    for name, path in paths.items():
        longest = check_architecture(path).get("max_position_embeddings")
        if longest is not None and config.sequence_length > longest:
            raise ConfigError(
                f"evaluate.sequence_length: {config.sequence_length} is above max_position_embeddings {longest} of "
                f"{name} {path}; choose at most {longest}"
            )
        check_tokenizer(config.dataset, path)


def _splits(config: EvaluateConfig) -> dict[str, PackedDataset]:
    """Open validation and test; a test split without any document is left out."""
    names = ["validation", *(["test"] if len(IndexedDataset(config.dataset / "test")) else [])]
    return {name: PackedDataset(config.dataset / name, config.sequence_length, config.seed) for name in names}


@torch.inference_mode()
def _measure(
    config: EvaluateConfig, paths: dict[str, Path], splits: dict[str, PackedDataset], tasks: Any, tracker: Tracker
) -> dict[str, Any]:
    """Return the content of evaluation.json. All models are in memory while they are scored against the teacher."""
    sources = _sources(paths)
    models = {name: _load(paths[name]) for name in dict.fromkeys(sources.values())}
    sequences = {name: min(config.evaluation_sequences, len(dataset)) for name, dataset in splits.items()}
    found = _score(config, splits, models, models[sources["teacher"]])
    losses = {name: found[source]["validation_loss"] for name, source in sources.items()}
    tracker.log({f"{name}_validation_loss": loss for name, loss in losses.items()})
    tokenizer = load_tokenizer(paths["teacher"])
    for name in list(models):
        model = models.pop(name)
        found[name] |= {"tasks": ask(tasks, model, tokenizer, config.task_limit, f"{name}: tasks")}
        found[name] |= _continue(config, model, tokenizer)
        del model
        gc.collect()  # a model has reference cycles: its memory is given back before the next one is asked
    return {name: found[source] for name, source in sources.items()} | {
        "gap_closed": gap_closed(losses["pruned"], losses["student"], losses["teacher"]),
        "sequences": {"validation": 0, "test": 0} | sequences,
        "prompts": config.prompts,
    }


def _sources(paths: dict[str, Path]) -> dict[str, str]:
    """Return, for every model, the first one that has its weights: itself, unless finetune kept the base model."""
    first: dict[tuple[str, ...], str] = {}
    return {name: first.setdefault(_weights(path), name) for name, path in paths.items()}


def _weights(path: Path) -> tuple[str, ...]:
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    return tuple(content_hash(file) for file in files)


def _load(path: Path) -> PreTrainedModel:
    model = load_model(path, hf.compute_dtype())
    return model.to(hf.device())  # type: ignore[arg-type]  # transformers' decorator hides the signature


def _score(
    config: EvaluateConfig,
    splits: dict[str, PackedDataset],
    models: dict[str, PreTrainedModel],
    teacher: PreTrainedModel,
) -> dict[str, dict[str, Any]]:
    """Score the models, one pass per split; against the teacher on validation only, which is what is reported."""
    scores = {
        split: score(
            models,
            dataset,
            config.evaluation_sequences,
            config.micro_batch_size,
            teacher if split == "validation" else None,
            description=split,
        )
        for split, dataset in splits.items()
    }
    return {
        name: {
            "parameters": parameter_count(model),
            "weights_mb": model.get_memory_footprint() / 2**20,
            "validation_loss": scores["validation"][name]["loss"],
            "test_loss": scores["test"][name]["loss"] if "test" in scores else None,
            **{metric: scores["validation"][name][metric] for metric in ("perplexity", "kl", "top1_agreement")},
        }
        for name, model in models.items()
    }


def _continue(config: EvaluateConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Continue every prompt greedily, one by one, and time it."""
    end = model.generation_config.eos_token_id  # type: ignore[union-attr]
    # A new configuration: the model's own may ask for sampling, beams or penalties.
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.eos_token_id)
    _generate(model, tokenizer, config.prompts[0], 1)  # what a GPU does only once is not timed
    started = time.perf_counter()
    continuations = [_generate(model, tokenizer, prompt, config.generation_tokens) for prompt in config.prompts]
    seconds = time.perf_counter() - started
    return {
        "generation_tokens_per_second": sum(map(len, continuations)) / seconds,
        "samples": [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in continuations],
    }


def _generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, count: int) -> list[int]:
    """Return the ids of at most `count` new tokens."""
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    generate: Any = model.generate
    tokens = generate(**encoded, max_new_tokens=count)
    return tokens[0, encoded["input_ids"].shape[1] :].tolist()


if __name__ == "__main__":
    stage.main("evaluate")
