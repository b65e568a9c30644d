"""Find the questions of evaluation tasks in the training text.

A question is found if 13 successive tokens of it are in the text, or all of it, if it is shorter. This is the test of
GPT-3 (Brown et al., Language Models are Few-Shot Learners, 2020, appendix C) on tokens instead of words, as for Llama 2
(Touvron et al., 2023, appendix A.6), because the dataset has tokens. Tokens that most questions of a task share are its
template, and do not count. The text of a question is what the task declares for this purpose in lm-eval, else its
prompt.

A core searches some 13 million tokens per second.

T = tokens of the text.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitron.data.text import configure_for_plain_text, normalize_text

LENGTH = 13
"""Tokens that a question and the training text must share."""

_CHUNK = 1 << 20
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_BITS = 22
"""A table of 2^22 bytes says which hashes to look up: a look-up in a sorted array misses the cache."""


@dataclass(frozen=True)
class Windows:
    """The hashes of all runs of one length in the questions, and the number of each one's question."""

    hashes: np.ndarray
    questions: np.ndarray


def list_questions(tasks: Any, names: list[str], limit: int | None) -> dict[str, list[str]]:
    """Return the texts of the questions of each task; those of a group are together.

    Args:
        tasks: the tasks, as `load_tasks` returns them.
        names: their names in the settings, which may be groups.
        limit: number of questions per task; None: all.
    """
    leaves = {leaf: name for name in names for leaf in _list_leaves(tasks, name)}
    questions: dict[str, list[str]] = {}
    for leaf, task in tasks["tasks"].items():
        documents = task.doc_iterator(rank=0, limit=limit, world_size=1)
        questions.setdefault(leaves.get(leaf, leaf), []).extend(_get_text(task, document) for _, document in documents)
    return questions


def _list_leaves(tasks: Any, name: str) -> list[str]:
    if name in tasks["tasks"]:
        return [name]
    return [leaf for child in tasks["group_map"].get(name, []) for leaf in _list_leaves(tasks, child)]


def _get_text(task: Any, document: Any) -> str:
    text = task.doc_to_decontamination_query(document) if task.should_decontaminate() else task.doc_to_text(document)
    if not isinstance(text, str):  # the number of a choice: the choices are prompts
        text = " ".join(map(str, task.doc_to_choice(document)))
    return normalize_text(text)


def measure_contamination(text: Any, questions: dict[str, list[str]], tokenizer: Any) -> dict[str, dict[str, float]]:
    """Return for each task the number of questions, how many of them are found in the text, and their share.

    Args:
        text: token ids of the training text [T]; an EOS between two documents keeps them apart.
        questions: texts of the questions by task.
        tokenizer: the tokenizer of the text.
    """
    windows = {task: _hash_questions(texts, tokenizer) for task, texts in questions.items()}
    wanted: dict[int, np.ndarray] = {}
    for length in range(1, LENGTH + 1):
        if hashes := [by_length[length].hashes for by_length in windows.values() if length in by_length]:
            wanted[length] = np.unique(np.concatenate(hashes))
    found = _find_hashes(text, wanted)
    result = {}
    for task, by_length in windows.items():
        numbers = [part.questions[np.isin(part.hashes, found[length])] for length, part in by_length.items()]
        count = len(np.unique(np.concatenate(numbers))) if numbers else 0
        total = len(questions[task])
        result[task] = {"questions": total, "found": count, "share": count / total if total else 0.0}
    return result


def _hash_questions(texts: list[str], tokenizer: Any) -> dict[int, Windows]:
    """Return the runs of a task's questions by their length, without those of its template."""
    backend = configure_for_plain_text(tokenizer)
    hashes: dict[int, list[np.ndarray]] = {}
    numbers: dict[int, list[np.ndarray]] = {}
    for number, text in enumerate(texts):
        # In mid-text the first word has a space before it, and so other tokens.
        variants = [backend.encode(start + text, add_special_tokens=False).ids for start in ("", " ")]
        runs: dict[int, list[np.ndarray]] = {}
        for ids in filter(None, variants):
            length, last = list(_hash_runs(np.array(ids), LENGTH))[-1]
            runs.setdefault(length, []).append(last)
        for length, parts in runs.items():
            unique = np.unique(np.concatenate(parts))
            hashes.setdefault(length, []).append(unique)
            numbers.setdefault(length, []).append(np.full(len(unique), number))
    found = {}
    for length, parts in hashes.items():
        flat = np.concatenate(parts)
        _, inverse, counts = np.unique(flat, return_inverse=True, return_counts=True)
        own = counts[inverse] <= max(1, len(texts) // 2)
        found[length] = Windows(flat[own], np.concatenate(numbers[length])[own])
    return found


def _hash_runs(tokens: np.ndarray, longest: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each length up to the longest, or to that of the text, and the hashes of all runs of so many tokens."""
    values = tokens.astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(len(values), np.uint64)
    for length in range(1, min(longest, len(values)) + 1):
        hashes = hashes[: len(values) - length + 1] * _FACTOR + values[length - 1 :]
        yield length, hashes


def _find_hashes(text: Any, wanted: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Return, per length, which of the wanted hashes are those of runs in the text."""
    shift = np.uint64(64 - _BITS)
    tables = {length: np.zeros(1 << _BITS, bool) for length in wanted}
    for length, hashes in wanted.items():
        tables[length][hashes >> shift] = True

    def search(start: int) -> dict[int, np.ndarray]:
        found = {}
        for length, hashes in _hash_runs(np.asarray(text[start : start + _CHUNK + LENGTH - 1]), max(wanted)):
            if length in wanted:
                candidates = hashes[tables[length][hashes >> shift]]
                found[length] = np.intersect1d(candidates, wanted[length])
        return found

    result: dict[int, list[np.ndarray]] = {length: [] for length in wanted}
    if wanted:
        with ThreadPoolExecutor() as pool:  # numpy works without Python's lock
            for found in pool.map(search, range(0, len(text), _CHUNK)):
                for length, hashes in found.items():
                    result[length].append(hashes)
    return {length: np.unique(np.concatenate([np.zeros(0, np.uint64), *parts])) for length, parts in result.items()}
