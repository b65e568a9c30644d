"""Text generation: prompts continued greedily, and timed."""

import time
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from minitron.config.stages import EvaluateConfig


def continue_prompts(
    config: EvaluateConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Continue every prompt greedily, one by one.

    Returns:
        `generation_tokens_per_second` over all prompts, and `samples`, the new text of each.
    """
    end = model.generation_config.eos_token_id  # type: ignore[union-attr]
    # A new one: the model's own may ask for sampling, beams or penalties.
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.eos_token_id)
    _generate_tokens(model, tokenizer, config.prompts[0], 1)  # untimed: a GPU's first pass is slow
    started = time.perf_counter()
    continuations = [_generate_tokens(model, tokenizer, prompt, config.generation_tokens) for prompt in config.prompts]
    seconds = time.perf_counter() - started
    return {
        "generation_tokens_per_second": sum(map(len, continuations)) / seconds,
        "samples": [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in continuations],
    }


def _generate_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, count: int) -> list[int]:
    """Return the ids of at most `count` new tokens."""
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    generate: Any = model.generate
    tokens = generate(**encoded, max_new_tokens=count)
    return tokens[0, encoded["input_ids"].shape[1] :].tolist()
