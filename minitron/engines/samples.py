"""The inputs of the preset `tiny`, made from a seed where they are needed: a teacher, a corpus, a downstream task.

    sample://tiny/teacher       a random four-layer Llama, with a tokenizer of its own
    sample://tiny/corpus        400 documents of a small random language
    sample://tiny/tasks         40 questions on the same language, and the lm-eval task that reads them

Only the teacher needs torch. Tasks on different machines share what the first one makes, in the workspace.
"""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from minitron.config.addresses import SAMPLES
from minitron.errors import ConfigError
from minitron.fast_imports import many_imports

TASK_QUESTIONS = 200
"""Questions written per downstream task: enough for a standard error of about 3 points."""

TEACHER = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "tie_word_embeddings": False,
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip
"""The relevant part of the teacher's config.json, for tasks that read it before the teacher is made."""


def check_address(address: str) -> str:
    """Return the address of a sample.

    Raises:
        ConfigError: there is no such sample.
    """
    if address not in SAMPLES:
        raise ConfigError(f"{address}: no such sample; give one of {', '.join(SAMPLES)}")
    return address


def make_sample(address: str, directory: Path) -> None:
    """Write the sample at an address into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    _MAKERS[address](directory)


def tiny_sentences(count: int, seed: int = 0) -> list[str]:
    """Return documents of a small random language; a word has at most four successors, so a model can learn it."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(200)]
    follows = {word: rng.choices(words, k=4) for word in words}
    documents = []
    for _ in range(count):
        word, text = rng.choice(words), []
        for _ in range(rng.randint(40, 120)):
            text.append(word)
            word = rng.choice(follows[word])
        documents.append(" ".join(text))
    return documents


def tiny_tokenizer(documents: list[str]) -> Any:
    """Train a 512-token byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,  # it prints empty lines
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _make_teacher(directory: Path) -> None:
    with many_imports():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

    from minitron.models.checkpoint import save_model

    save_tokenizer(tiny_tokenizer(tiny_sentences(400)), directory)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {name: value for name, value in TEACHER.items() if isinstance(value, int)}
    config = LlamaConfig(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    save_model(LlamaForCausalLM(config), directory, tokenizer_from=directory)


def _make_corpus(directory: Path) -> None:
    lines = (json.dumps({"text": text}) + "\n" for text in tiny_sentences(400))
    (directory / "tiny.jsonl").write_text("".join(lines))


def _make_tasks(directory: Path) -> None:
    questions = (text.split() for text in tiny_sentences(40, seed=1))
    rows = [
        {"question": " ".join(words[:20]), "choices": [" ".join(words[20:24]), " ".join(words[:4])], "label": 0}
        for words in questions
    ]
    write_task(directory, "tiny_continuation", rows, "{{question}}")


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Save a fast tokenizer under the class name that transformers 4.57 and 5.x both know."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def write_task(directory: Path, name: str, rows: Iterable[dict[str, Any]], prompt: str) -> None:
    """Write questions and the lm-eval task that reads them; file names in it are relative to the directory."""
    with (directory / f"{name}.jsonl").open("w") as stream:
        for _, row in zip(range(TASK_QUESTIONS), rows, strict=False):
            stream.write(json.dumps(row) + "\n")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": prompt,
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))


_MAKERS: dict[str, Callable[[Path], None]] = dict(zip(SAMPLES, (_make_teacher, _make_corpus, _make_tasks), strict=True))
