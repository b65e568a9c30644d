"""A search, as a user starts it: the race, the winner's compression, a candidate that fails, a budget nobody meets."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron.config.shapes import PRUNED_SIZES
from tests.flows.test_flow import asked, forked

RUN = "minitron run search --preset tiny --set search.candidates=3 --work-dir runs/search"


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("search")
    done = forked(RUN, root)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    directory = root / "runs" / "search"
    return {"root": root, "directory": directory, "stdout": done.stdout}


def read_search(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "search.json").read_text())


def test_the_winner_of_three_rounds_is_compressed_and_registered(searched: dict[str, Any]) -> None:
    search, summary = (
        read_search(searched["directory"]),
        json.loads((searched["directory"] / "summary.json").read_text()),
    )
    rows = {row["name"]: row for row in search["candidates"]}
    assert len(rows) == 3 and all(row["error"] is None for row in rows.values())
    assert sorted(len(row["losses"]) for row in rows.values()) == [1, 2, 3]
    kept = [row for row in rows.values() if len(row["losses"]) > 1]
    assert max(row["losses"][0] for row in kept) <= min(row["losses"][0] for row in rows.values() if row not in kept)
    winner = rows[search["winner"]]
    assert winner["state"] == "won" and len(winner["losses"]) == 3 and search["teacher"]["loss"] < winner["losses"][0]
    assert summary["search"]["winner"] == search["winner"]
    assert summary["student"]["parameters"] == winner["parameters"] <= 165_000
    assert summary["registered"]["name"] == "tiny"
    for text in (f"winner:     {search['winner']}, of 3 candidates", "search.html", "registered: tiny version 1"):
        assert text in searched["stdout"]


def test_the_winner_is_a_preset_of_compress(searched: dict[str, Any]) -> None:
    preset = yaml.safe_load((searched["directory"] / "winner.yaml").read_text())
    winner = read_search(searched["directory"])["winner"]
    row = next(row for row in read_search(searched["directory"])["candidates"] if row["name"] == winner)
    assert preset == {"prune": row["sizes"]} and preset["prune"].keys() == {*PRUNED_SIZES}


def test_a_candidate_that_fails_is_named_and_the_others_are_not_tried_again(searched: dict[str, Any]) -> None:
    """A file lies where the cut of the best candidate is made: no directory can be made there."""
    directory, before = searched["directory"], read_search(searched["directory"])
    won = next(row for row in before["candidates"] if row["name"] == before["winner"])
    for path in directory.glob("workspace/prune/*"):
        sizes = json.loads((path / "pruning.json").read_text())["student"]
        if all(sizes[name] == won["sizes"][name] for name in PRUNED_SIZES):
            path.rename(directory / path.name)
            path.with_name(f"{path.name}.partial").write_text("in the way")
    done = forked(f"{RUN} --set stop_after_race=true", searched["root"])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    after = read_search(directory)
    failed = next(row for row in after["candidates"] if row["name"] == won["name"])
    assert failed["state"] == "failed" and failed["losses"] == [] and failed["error"]
    assert f"failed:     {won['name']} (" in done.stdout and won["name"] in (directory / "search.html").read_text()
    others = {row["name"]: row["losses"][0] for row in before["candidates"] if row is not won}
    assert {row["name"]: row["losses"][0] for row in after["candidates"] if row["losses"]} == others
    assert after["winner"] in others and "evaluate:" not in done.stdout
    assert len(re.findall(r"prune: result \w+ is already in", done.stdout)) == 5, "two in the first round, two, one"
    assert "registered:" not in done.stdout


def test_a_budget_that_no_shape_meets_ends_the_command_before_anything_is_written(tmp_path: Path) -> None:
    settings = {
        "search.parameters=1000": "search.parameters: 1,000 is less than any shape has; the nearest, 1x16-32-1/1, has",
        "search.parameters=null": "search: no budget; give one of search.parameters, search.memory_gb, search.lat",
        "search.memory_gb=1": "search.memory_gb: parameters is given, too; a search has one budget, so remove one",
    }
    for setting, message in settings.items():
        result = asked("run", "search", "--preset", "tiny", "--set", setting, "--work-dir", str(tmp_path / "run"))
        assert result.exit_code == 2 and message in result.stderr, result.stderr
        assert not (tmp_path / "run").exists()
