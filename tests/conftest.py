"""Small real inputs, made once per session and never changed."""

import json
from pathlib import Path

import pytest

from minitron import samples
from minitron.data import MANIFEST, IndexedWriter
from minitron.storage import content_hash

SEQUENCE = 32


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The inputs of the preset `tiny`: paths of teacher, corpus and task_directory."""
    return samples.build("tiny", tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def teacher(inputs: dict[str, Path]) -> Path:
    """A random four-layer Llama: hidden 64, intermediate 128, 4 heads, 2 groups, vocabulary 512."""
    return inputs["teacher"]


@pytest.fixture(scope="session")
def dataset(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset as prepare writes it, made by hand so that the other stages are tested apart from prepare."""
    from minitron.checkpoint import load_tokenizer, tokenizer_hash

    directory = tmp_path_factory.mktemp("dataset") / "dataset"
    directory.mkdir()
    tokenizer = load_tokenizer(inputs["teacher"])
    documents = [
        tokenizer(json.loads(line)["text"])["input_ids"] + [tokenizer.eos_token_id]
        for line in (inputs["corpus"] / "tiny.jsonl").read_text().splitlines()
    ]
    for split, part in (("train", documents[:340]), ("validation", documents[340:370]), ("test", documents[370:])):
        writer = IndexedWriter(directory / split, len(tokenizer))
        writer.add(part)
        writer.close()
    manifest = {"tokenizer_sha256": tokenizer_hash(inputs["teacher"]), "licence": "none"}
    (directory / MANIFEST).write_text(json.dumps(manifest))
    assert content_hash(directory)
    return directory
