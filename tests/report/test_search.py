"""The page of a search names every candidate, with its losses or its error, and marks the winner."""

import html
import re
from pathlib import Path
from typing import Any

import pytest

from minitron.report.search import write_search_page

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 4,
}  # fmt: skip


def make_row(number: int, state: str, losses: list[float], error: str | None = None) -> dict[str, Any]:
    row = {"name": f"{number}x64-96-4/2", "sizes": SIZES | {"num_hidden_layers": number}, "cost": 1e6 - number}
    row |= {"parameters": 10**6 - number, "memory_gb": 0.004, "losses": losses, "seconds": 3.5}
    return row | {"state": state, "error": error}


def make_search(won: bool) -> dict[str, Any]:
    rows = [
        make_row(4, "won" if won else "racing", [3.4, 3.2, 3.1] if won else [3.4]),
        make_row(3, "eliminated", [3.5, 3.3] if won else [3.5]),
        make_row(2, "failed", [], "prune.intermediate_size: <96> does not fit"),
    ]
    return {
        "budget": {"parameters": 10**6, "batch": 1, "context": 4096},
        "steps": [0, 10, 30],
        "teacher": {"sizes": SIZES, "parameters": 2 * 10**6, "memory_gb": 0.008, "loss": 2.9},
        "candidates": rows,
        "winner": rows[0]["name"] if won else None,
        "settings": {"prune": rows[0]["sizes"]} if won else None,
    }


@pytest.mark.parametrize("won", [True, False], ids=["won", "racing"])
def test_every_candidate_is_named_with_its_losses_or_its_error(won: bool, tmp_path: Path) -> None:
    search = make_search(won)
    write_search_page(tmp_path, search)
    page = (tmp_path / "search.html").read_text()
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for row in search["candidates"]:
        assert row["name"] in text and all(f"{loss:.4f}" in text for loss in row["losses"])
    assert "prune.intermediate_size: <96> does not fit" in text and "<96>" not in page
    assert ("4x64-96-4/2 wins" in text) == won and ("num_hidden_layers: 4" in text) == won
    assert page.count('class="won"') == int(won) and "corrected teacher: 2.900" in text
    assert "http:" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page) and "https:" not in page, "it opens offline"


def test_before_the_first_round_there_is_no_chart(tmp_path: Path) -> None:
    search = make_search(False)
    for row in search["candidates"]:
        row |= {"losses": [], "state": "racing", "error": None}
    write_search_page(tmp_path, search | {"teacher": search["teacher"] | {"loss": None}})
    page = (tmp_path / "search.html").read_text()
    assert "<svg" not in page and "3 candidates for the next round" in page
