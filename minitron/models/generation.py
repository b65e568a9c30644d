"""Text generation: continue prompts greedily, and time it as a server would.

Speeds are those of transformers' `generate`, with the key-value cache. On a GPU it spends most of its time in Python
while a model is small or reads few texts at a time. A serving engine such as vLLM is faster, and the ratio of two
models may differ there.
"""

import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from minitron.config.metrics import BATCH_SPEED, SPEED, SPEED_BATCH
from minitron.config.stages import EvaluateConfig

_NAMES = ("_name_or_path", "architectures", "transformers_version")
"""Entries of a config.json that say nothing about the computation."""

ROUNDS = 6
"""Timings per model. The slowest and the fastest of six enclose the median with a probability of 97 %."""


def continue_prompts(
    config: EvaluateConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Continue every prompt greedily, one by one; return `samples`, the new texts."""
    end = model.generation_config.eos_token_id  # type: ignore[union-attr]
    _configure_greedy(model, tokenizer, end)
    continuations = [
        _generate_tokens(model, tokenizer, [prompt], config.generation_tokens)[0] for prompt in config.prompts
    ]
    return {"samples": [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in continuations]}


def time_generation(
    config: EvaluateConfig, models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, list[float]]]:
    """Time the models' continuation of the first prompt: one text at a time, and in a batch.

    All models take turns in every round, in alternating order. So a machine that is slower or warmer for a while
    affects all of them. Every continuation has `generation_tokens` tokens, even after an end-of-text token. Models with
    the same architecture and sizes are timed once, because the values of the weights do not affect the time.

    Returns:
        Tokens per second of every round, by model and metric.
    """
    first: dict[str, str] = {}
    same = {name: first.setdefault(_describe_architecture(model), name) for name, model in models.items()}
    speeds = _time_models(config, {name: models[name] for name in first.values()}, tokenizer)
    return {name: speeds[timed] for name, timed in same.items()}


def _describe_architecture(model: PreTrainedModel) -> str:
    """Return a model's config.json without the names of files and versions."""
    return json.dumps(
        {key: value for key, value in model.config.to_dict().items() if key not in _NAMES}, sort_keys=True
    )


def _time_models(
    config: EvaluateConfig, models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, list[float]]]:
    """Time models that differ in their architecture or size."""
    speeds: dict[str, dict[str, list[float]]] = {name: {SPEED: [], BATCH_SPEED: []} for name in models}
    ends = {name: model.generation_config for name, model in models.items()}
    for model in models.values():
        _configure_greedy(model, tokenizer, None)
    for metric, count in ((SPEED, 1), (BATCH_SPEED, SPEED_BATCH)):
        prompts = [config.prompts[0]] * count
        for name in models:
            _generate_tokens(models[name], tokenizer, prompts, config.generation_tokens)  # untimed warm-up
        for name in _take_turns(list(models)):
            started = time.perf_counter()
            continuations = _generate_tokens(models[name], tokenizer, prompts, config.generation_tokens)
            seconds = time.perf_counter() - started
            speeds[name][metric].append(sum(map(len, continuations)) / seconds)
    for name, model in models.items():
        model.generation_config = ends[name]
    return speeds


def _take_turns(names: list[str]) -> Iterator[str]:
    for turn in range(ROUNDS):
        yield from names if turn % 2 == 0 else reversed(names)


def _configure_greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end: Any) -> None:
    """Give a model a new configuration: its own may set sampling, beams, penalties, or no cache."""
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.eos_token_id, use_cache=True)


@torch.inference_mode()
def _generate_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], count: int
) -> list[list[int]]:
    """Return the ids of at most `count` new tokens for each of the equal prompts; the result is on the CPU."""
    encoded = tokenizer(prompts, return_tensors="pt", return_token_type_ids=False).to(model.device)
    generate: Any = model.generate
    tokens = generate(**encoded, max_new_tokens=count)
    return tokens[:, encoded["input_ids"].shape[1] :].tolist()
