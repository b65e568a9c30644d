"""Near-duplicates: which documents are dropped, from which split, how they are counted, and the memory they take."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from minitron.config.parse import parse
from minitron.config.stages import PrepareConfig
from minitron.data.near_duplicates import NearDuplicates, list_shingles
from minitron.errors import ConfigError
from minitron.stages import prepare
from minitron.storage.layout import MANIFEST

WORDS = [f"word{number}" for number in range(3000)]


def make_texts(count: int, words: int = 200, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)) for _ in range(count)]


def change_words(text: str, count: int, seed: int = 0) -> str:
    """Replace a run of words."""
    words = text.split()
    start = random.Random(seed).randrange(len(words) - count)
    return " ".join([*words[:start], *(f"new{seed}-{number}" for number in range(count)), *words[start + count :]])


def measure_similarity(left: str, right: str) -> float:
    first, second = set(list_shingles(left)), set(list_shingles(right))
    return len(first & second) / len(first | second)


def test_what_resembles_an_earlier_document_is_found() -> None:
    texts, found = make_texts(400), NearDuplicates(0.8)
    assert all(map(found.add, texts)), "unrelated documents"
    shares = {words: [change_words(text, words, seed) for seed, text in enumerate(texts)] for words in (2, 60)}
    for words, changed in shares.items():
        similarity = measure_similarity(texts[0], changed[0])
        assert similarity > 0.9 if words == 2 else similarity < 0.6
        kept = [text for text in changed if found.add(text)]
        assert len(kept) == (0 if words == 2 else len(texts))


def test_case_and_punctuation_do_not_count_and_texts_without_spaces_have_words() -> None:
    found = NearDuplicates(0.8)
    text = make_texts(1)[0]
    chinese = "".join(random.Random(0).choices([chr(0x4E00 + number) for number in range(500)], k=300))
    assert found.add(text) and found.add(chinese) and found.add("short")
    assert (
        not found.add(text.upper().replace(" ", ", "))
        and not found.add(f"{chinese[:-3]}。")
        and not found.add("short!")
    )
    assert found.add(chinese[::-1])


def test_memory_grows_with_the_documents_and_not_with_their_text() -> None:
    def measure() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def fill(words: int) -> float:
        found, texts = NearDuplicates(0.8), (text for seed in range(3000) for text in make_texts(1, words, seed))
        before = measure()
        for text in texts:
            found.add(text)
        return (measure() - before) / 3000

    fill(5)
    assert fill(500) < 4000, "bytes per document: 2,500, and what the allocator keeps"


def test_held_out_documents_come_first_and_the_dropped_are_counted(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = make_texts(60)
    parts = {
        "train": [change_words(texts[50], 3), *texts[:40], *(change_words(text, 2) for text in texts[:7])],
        "validation": texts[40:50],
        "test": texts[50:],
    }
    for split, part in parts.items():
        (tmp_path / "corpus").mkdir(exist_ok=True)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (tmp_path / "corpus" / f"{split}.jsonl").write_text(lines)

    def run(**settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        output = tmp_path / f"out{len(settings)}"
        values = {"corpus": str(tmp_path / "corpus"), "teacher": str(teacher), "output": output} | settings
        return prepare.run(PrepareConfig(**values)), json.loads((output / MANIFEST).read_text())

    record, manifest = run(near_duplicates=0.8)
    assert manifest["documents"] == {"train": 40, "validation": 10, "test": 10}
    assert manifest["near_duplicates"] == record["metrics"]["near_duplicates"] == 8
    assert "0 duplicates, 8 near-duplicates and 0 empty documents dropped" in capsys.readouterr().out
    plain, manifest = run()
    assert manifest["documents"]["train"] == 48 and "near_duplicates" not in manifest
    assert plain["key"] != record["key"]


def test_a_similarity_that_cannot_be_found_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prepare\.near_duplicates: Input should be greater than or equal to 0\.7"):
        parse("prepare", {"corpus": "a", "teacher": "t", "output": "o", "near_duplicates": 0.5})
