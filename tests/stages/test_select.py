"""The selection of a search: halves by loss, failures named, latency measured on real models."""

import json
from pathlib import Path
from typing import Any

import pytest

from minitron.config.shapes import SearchSettings
from minitron.config.stages import SelectConfig
from minitron.errors import RunError
from minitron.runtime.candidates import describe_student
from minitron.stages import select

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 4,
}  # fmt: skip


@pytest.fixture
def planned(tmp_path: Path) -> Path:
    plan = {"teacher": "sample://tiny/teacher", "prune": {}, "search": {"parameters": 165_000, "candidates": 4}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    return tmp_path


def make_result(name: str, *losses: float, error: str | None = None) -> str:
    row = {"name": name, "sizes": SIZES, "cost": 1.0, "parameters": 1, "memory_gb": 0.1, "teacher_loss": 2.0}
    return json.dumps(row | {"losses": losses, "seconds": 1.0, "error": error})


def run(planned: Path, **values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    outputs = select.run(SelectConfig(planned=planned, output=planned / "selected", **values))["outputs"]
    return outputs, json.loads((planned / "selected" / "search.json").read_text())


def list_names(rows: list[str]) -> list[str]:
    return [json.loads(row)["name"] for row in rows]


def test_first_the_budget_selects(planned: Path) -> None:
    outputs, search = run(planned)
    assert len(outputs["Output"]) == 4 == len(search["candidates"]) and outputs["rest"] == [] == search["steps"][4:]
    assert all(148_500 <= row["parameters"] <= 165_000 for row in search["candidates"])
    assert search["winner"] is None and outputs["settings"] == {} and search["teacher"]["parameters"] == 213_568


def test_the_better_half_goes_on_and_a_failure_does_not(planned: Path) -> None:
    results = [make_result("a", 3.0), make_result("b", error="no room"), make_result("c", 2.5), make_result("d", 2.9)]
    outputs, search = run(planned, results=results)
    assert list_names(outputs["Output"]) == ["c", "d"] and list_names(outputs["rest"]) == ["a", "b"]
    states = {row["name"]: (row["state"], row["error"]) for row in search["candidates"]}
    assert states["b"] == ("failed", "no room") and states["a"] == ("eliminated", None)


def test_after_the_last_round_the_winner_is_added_to_the_settings(planned: Path) -> None:
    results = [make_result("a", 3.0, 2.9, 2.8), make_result("c", 2.5, 2.4, 2.3)]
    document = {"seed": 1, "prune": {"intermediate_size": 32, "method": "compensated"}}
    outputs, search = run(planned, results=results, rest=[make_result("d", 4.0)], document=document)
    assert search["winner"] == "c" and list_names(outputs["rest"]) == ["a", "d"]
    assert outputs["settings"] == {"seed": 1, "prune": {"method": "compensated"} | SIZES}
    assert (planned / "selected" / "winner.yaml").exists() and search["teacher"]["loss"] == 2.0


def test_a_race_that_nobody_survives_says_why(planned: Path) -> None:
    with pytest.raises(RunError, match="every candidate failed, so the race has no winner: a: no room; b: no memory"):
        run(planned, results=[make_result("a", error="no room"), make_result("b", error="no memory")])


def test_latency_is_that_of_real_forward_passes() -> None:
    teacher = {"model_type": "llama", "vocab_size": 64, "max_position_embeddings": 512, "tie_word_embeddings": True}
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}
    student = describe_student(teacher | sizes, sizes | {"num_hidden_layers": 4})
    without, layer = select._measure_latency(student, SearchSettings(latency_ms=1, batch=2, context=256))
    assert without >= 0 and 0 < layer < 1000
