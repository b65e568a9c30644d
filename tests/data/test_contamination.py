"""Questions in the training text: which are found, against a plain search, and what does not count."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minitron.data import contamination
from minitron.data.contamination import LENGTH, list_questions, measure_contamination


class Numbers:
    """A tokenizer whose text is its token ids."""

    backend_tokenizer: Any = SimpleNamespace(
        no_truncation=lambda: None,
        no_padding=lambda: None,
        encode=lambda text, add_special_tokens: SimpleNamespace(ids=[int(word) for word in text.split()]),
    )


def write(ids: Any) -> str:
    return " ".join(map(str, ids))


def count(text: Any, *questions: Any) -> float:
    return measure_contamination(np.asarray(text), {"task": [*map(write, questions)]}, Numbers())["task"]["found"]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_every_question_that_a_plain_search_finds_is_found(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contamination, "_CHUNK", 1000)  # questions across the end of a chunk, too
    rng = np.random.default_rng(0)
    text = rng.integers(0, 40_000, 20_000).astype(dtype)
    copied = [[*rng.integers(0, 40_000, 9), *text[at : at + LENGTH], 1, 2] for at in range(0, 19_900, 97)]
    almost = [[*text[at : at + LENGTH - 1], 40_001, *text[at + LENGTH : at + 20]] for at in range(0, 19_900, 97)]
    assert count(text, *copied) == len(copied)
    assert count(text, *almost) == 0
    found = measure_contamination(text, {"a": [write(copied[0]), write(almost[0])], "b": []}, Numbers())
    assert found == {
        "a": {"questions": 2, "found": 1, "share": 0.5},
        "b": {"questions": 0, "found": 0, "share": 0.0},
    }


def test_a_short_question_counts_as_a_whole() -> None:
    text = range(100, 200)
    assert count(text, [150, 151, 152]) == 1
    assert count(text, [150, 151, 153]) == 0 and count(text, []) == 0


def test_a_template_does_not_count() -> None:
    template, rng = list(range(500, 520)), np.random.default_rng(0)
    own = [rng.integers(1000, 40_000, 30).tolist() for _ in range(10)]
    text = [*template, 7, *own[0], 7]
    assert count(text, *([*template, *question] for question in own)) == 1, "only the first one's own words are there"


def test_the_text_of_a_question_is_what_its_task_declares(teacher: Path) -> None:
    class Task:
        def __init__(self, **values: Any) -> None:
            self.values = values

        def should_decontaminate(self) -> bool:
            return "query" in self.values

        def doc_iterator(self, rank: int, limit: int | None, world_size: int) -> Any:
            return enumerate(range(limit or 3))

        def __getattr__(self, name: str) -> Any:
            key = {"doc_to_decontamination_query": "query", "doc_to_text": "text", "doc_to_choice": "choices"}[name]
            return lambda document: self.values[key]

    tasks = {
        "tasks": {
            "plain": Task(text="prompt\r\n"),
            "first": Task(query="query", text="prompt"),
            "second": Task(text=0, choices=["one", "two"]),
        },
        "group_map": {"group": ["nested"], "nested": ["first", "second"]},
    }
    assert list_questions(tasks, ["plain", "group"], 2) == {
        "plain": ["prompt"] * 2,
        "group": ["query"] * 2 + ["one two"] * 2,
    }
