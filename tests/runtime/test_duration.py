"""A run says how long it takes, from the first speed that one of its stages shows."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from minitron.config.document import SAMPLES, make_plan, merge, read_preset
from minitron.runtime.duration import DurationEstimate

ARCHITECTURE = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "num_hidden_layers": 30, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip


def estimate(directory: Path, monkeypatch: pytest.MonkeyPatch, *lines: str, **prune: Any) -> list[str]:
    """Return what is said of lines that come ten seconds apart, with these settings of prune."""
    dataset = directory / "compress-1" / "prepare" / "dataset"
    dataset.mkdir(parents=True, exist_ok=True)
    tokens = {"train": 1_000_000, "validation": 30_000, "test": 30_000}
    (dataset / "manifest.json").write_text(json.dumps({"tokens": tokens}))
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    document = merge({"teacher": "/t", "corpus": "/c"}, read_preset("demo"), {"prune": prune})
    del document[SAMPLES]
    watch = DurationEstimate(make_plan(document), ARCHITECTURE, directory)
    return [text for line in lines if (text := watch.read_line(line))]


def read_minutes(texts: list[str]) -> int:
    (text,) = texts
    return int(text.removeprefix("The run takes about ").split(" minutes on this machine")[0])


@pytest.fixture
def minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The demo's minutes where the teacher reads 300 tokens in a second, and learns from 100."""
    lines = ["prepare: MLflow run 1", "finetune: MLflow run 2", "validation:   0%|  | 0/4.10k [00:00<?, ?tok/s]"]
    bar = "validation:  75%|███▊ | 3.07k/4.10k [00:10<00:03, {}tok/s]"
    return read_minutes(estimate(tmp_path, monkeypatch, *lines, bar.format("300"), bar.format("200")))


def test_it_is_said_once_at_the_first_speed(minutes: int) -> None:
    assert 5 <= minutes <= 14


@pytest.mark.parametrize("speed", ["100", "0.1k"])
def test_training_shows_the_same_speed(
    minutes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speed: str
) -> None:
    bar = f"training:  67%|██▋ | 2.05k/3.07k [00:20<00:10, {speed}tok/s, step=2/3, loss=2.6]"
    lines = ["prepare: MLflow run 1", "finetune: MLflow run 2", "", bar]
    assert read_minutes(estimate(tmp_path, monkeypatch, *lines)) == minutes


def test_stages_that_are_over_take_no_time(minutes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["finetune: result 1 is already in w", "distill: MLflow run 2", "teacher validation: 9% [00:01, 300tok/s]"]
    assert read_minutes(estimate(tmp_path, monkeypatch, *lines)) < minutes
    assert estimate(tmp_path, monkeypatch, "distill: MLflow run 2", "loss: 3.1") == []


def test_layers_that_are_chosen_by_loss_take_time(
    minutes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["finetune: MLflow run 2", "validation:  75%|███▊ | 3.07k/4.10k [00:10<00:03, 300tok/s]"]
    by_loss = read_minutes(
        estimate(tmp_path, monkeypatch, *lines, layers_by="loss", drop_layers=None, num_hidden_layers=17)
    )
    tried = 30 + 12 * 13
    assert by_loss - minutes == pytest.approx(tried * 1024 * 0.75 / 300 / 60, abs=1.5)
