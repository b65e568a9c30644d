"""A text begins with the same token wherever a model sees it: in training data, other text, tasks and generation."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM

from minitron.config.stages import EvaluateConfig, PrepareConfig
from minitron.data.indexed import SPLITS, IndexedDataset
from minitron.models.tasks.shared_context import SharedContextLM
from minitron.stages import evaluate, prepare
from minitron.storage.layout import MANIFEST

BOS = 0


@pytest.fixture(params=[True, False], ids=["with BOS", "without"])
def starts(request: pytest.FixtureRequest) -> bool:
    """Say whether the tokenizer sets a BOS, as Llama's does; both have one."""
    return request.param


@pytest.fixture
def model(starts: bool, teacher: Path, tmp_path: Path) -> Path:
    """The tiny teacher, whose tokenizer sets its BOS before every text, or does not."""
    directory = shutil.copytree(teacher, tmp_path / "model")
    if starts:
        path = str(directory / "tokenizer.json")
        tokenizer = Tokenizer.from_file(path)
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)])
        tokenizer.save(path)
    return directory


@pytest.fixture
def dataset(model: Path, inputs: dict[str, Path], tmp_path: Path) -> Path:
    shares = {"validation_fraction": 0.1, "test_fraction": 0.1}
    values = {"corpus": str(inputs["corpus"]), "teacher": str(model), "output": tmp_path / "dataset"}
    prepare.run(PrepareConfig(**values, **shares))
    return tmp_path / "dataset"


def begins_rightly(tokens: list[int], starts: bool) -> bool:
    return (tokens[0] == BOS) is starts and BOS not in tokens[1:]


def test_a_text_begins_alike_in_training_tasks_and_generation(
    model: Path, starts: bool, dataset: Path, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [document for split in SPLITS for document in IndexedDataset(dataset / split)]
    assert len(documents) > 300 and all(begins_rightly(document.tolist(), starts) for document in documents)
    manifest = json.loads((dataset / MANIFEST).read_text())
    assert manifest.get("bos_token_id") == (BOS if starts else None) and manifest["eos_token_id"] == 1

    contexts: list[list[int]] = []
    prompts: list[list[int]] = []
    score, generate, write = (
        SharedContextLM._loglikelihood_tokens, LlamaForCausalLM.generate, evaluate.write_first_documents
    )  # fmt: skip

    def record_contexts(self: Any, requests: list[Any], *arguments: Any, **named: Any) -> Any:
        contexts.extend(list(context) for _, context, _ in requests)
        return score(self, requests, *arguments, **named)

    def record_prompts(self: Any, input_ids: Any, **named: Any) -> Any:
        prompts.extend(input_ids.tolist())
        return generate(self, input_ids, **named)

    def record_other_text(documents: Any, tokenizer: Any, prefix: Path, count: int) -> None:
        write(documents, tokenizer, prefix, count)
        others.extend(document.tolist() for document in IndexedDataset(prefix))

    others: list[list[int]] = []
    monkeypatch.setattr(SharedContextLM, "_loglikelihood_tokens", record_contexts)
    monkeypatch.setattr(LlamaForCausalLM, "generate", record_prompts)
    monkeypatch.setattr(evaluate, "write_first_documents", record_other_text)
    models = dict.fromkeys(("teacher_before", "teacher", "pruned", "student"), str(model))
    tasks = {"tasks": ["tiny_continuation"], "task_directory": inputs["evaluate.task_directory"], "task_limit": 4}
    sizes = {"sequence_length": 32, "evaluation_sequences": 4, "prompts": ["a b"], "generation_tokens": 2}
    values = models | tasks | sizes | {"dataset": dataset, "out_of_domain": str(inputs["corpus"])}
    evaluate.run(EvaluateConfig(output=tmp_path / "out", **values))
    for seen in (contexts, prompts, others):
        assert seen and all(begins_rightly(tokens, starts) for tokens in seen)
