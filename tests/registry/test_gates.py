"""Gates: absolute and relative bounds, intervals, what is not there."""

from typing import Any

import pytest

from minitron.config.parse import parse
from minitron.config.stages import EvaluateConfig
from minitron.errors import ConfigError
from minitron.registry import gates

REQUIRED = {name: "x" for name, field in EvaluateConfig.model_fields.items() if field.is_required()}
REQUIRED |= {"tasks": ["arc"]}


def make_model(loss: float, accuracy: float, error: float = 0.02) -> dict[str, Any]:
    return {"validation_loss": loss, "test_loss": None, "parameters": 100 * loss} | {
        "tasks": {"arc": {"acc": accuracy, "acc_stderr": error, "rank": 7.0}}
    }


EVALUATION = {"student": make_model(3.0, 0.50), "teacher": make_model(2.0, 0.60)}
CHAMPION = make_model(3.1, 0.55, 0.03)


def judge_gate(champion: dict[str, Any] | None = CHAMPION, **gate: Any) -> dict[str, Any]:
    config = parse("evaluate", REQUIRED | {"gates": [gate]})
    assert isinstance(config, EvaluateConfig)
    (row,) = gates.judge_student(gates.read_gates(config), EVALUATION, champion)
    return row


@pytest.mark.parametrize(
    ("gate", "found", "margin", "outcome"),
    [
        ({"metric": "validation_loss", "at_most": 3.5}, 3.0, 0.5, "passed"),
        ({"metric": "validation_loss", "at_most": 3.0}, 3.0, 0.0, "passed"),
        ({"metric": "validation_loss", "at_most": 2.9}, 3.0, -0.1, "failed"),
        ({"metric": "validation_loss", "against": "champion", "at_most": 0.0}, -0.1, 0.1, "passed"),
        ({"metric": "validation_loss", "against": "teacher", "at_most": 0.5}, 1.0, -0.5, "failed"),
        ({"metric": "parameters", "against": "teacher", "by": "ratio", "at_most": 1.5}, 1.5, 0.0, "passed"),
        ({"metric": "arc_acc", "at_least": 0.45}, 0.5, 0.05, "passed"),
        ({"metric": "arc_acc", "at_least": 0.53}, 0.5, -0.03, "within error"),
        ({"metric": "arc_acc", "at_least": 0.55}, 0.5, -0.05, "failed"),
        ({"metric": "arc_acc", "against": "champion", "at_least": 0.0}, -0.05, -0.05, "within error"),
        ({"metric": "arc_acc", "against": "teacher", "at_least": 0.0}, -0.1, -0.1, "failed"),
        ({"metric": "arc_rank", "at_most": 6.0}, 7.0, -1.0, "failed"),
    ],
)
def test_a_gate_is_met_or_not(gate: dict[str, Any], found: float, margin: float, outcome: str) -> None:
    row = judge_gate(**gate)
    assert (row["found"], row["margin"]) == (pytest.approx(found), pytest.approx(margin))
    assert row["outcome"] == outcome
    assert gates.are_gates_met([row]) is (outcome != "failed")
    assert gates.describe_gate(row).endswith(outcome)


def test_the_interval_is_that_of_both_models() -> None:
    row = judge_gate(metric="arc_acc", against="champion", at_least=0.0)
    assert row["error"] == pytest.approx(1.96 * (0.02**2 + 0.03**2) ** 0.5)
    ratio = judge_gate(metric="arc_acc", against="champion", by="ratio", at_least=1.0)
    relative = ((0.02 / 0.50) ** 2 + (0.03 / 0.55) ** 2) ** 0.5
    assert ratio["error"] == pytest.approx(1.96 * relative * 0.50 / 0.55)


def test_an_error_that_lm_eval_does_not_know_is_none() -> None:
    row = judge_gate(make_model(3.0, 0.55, "N/A"), metric="arc_acc", against="champion", at_least=0.0)  # type: ignore[arg-type]
    assert row["error"] == pytest.approx(1.96 * 0.02)


def test_what_is_not_there() -> None:
    assert judge_gate(None, metric="validation_loss", against="champion", at_most=0)["outcome"] == "no champion"
    assert judge_gate(metric="test_loss", at_most=9)["outcome"] == "not measured"
    assert judge_gate(metric="arc_exact", at_least=0)["outcome"] == "not measured"
    missing = judge_gate(metric="test_loss", at_most=9)
    assert gates.are_gates_met([missing]) is False and "not measured" in gates.describe_gate(missing)
    assert gates.are_gates_met([]) is None


def test_a_judged_gate_can_be_judged_again() -> None:
    row = judge_gate(metric="validation_loss", against="champion", at_most=0.0)
    (again,) = gates.judge_student([row], EVALUATION, make_model(2.5, 0.5))
    assert (row["outcome"], again["outcome"]) == ("passed", "failed")
    assert gates.describe_gate(again) == (
        "Validation loss, difference from the champion's: 0.500 (student: 3.000, champion: 2.500), "
        "at most 0.000: failed"
    )


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"metric": "kl"}, "evaluate.gates.0: gate on kl: needs one bound; give either at_most or at_least"),
        ({"metric": "kl", "at_most": 1, "at_least": 0}, "gate on kl: needs one bound"),
        ({"metric": "kl", "by": "ratio", "at_most": 1}, "by=ratio needs `against`"),
        ({"metric": "kl", "against": "best", "at_most": 1}, "evaluate.gates.0.against: .*'teacher' or 'champion'"),
        ({"metric": "kl", "most": 1}, "evaluate.gates.0.most: "),
        ({"metric": "kl", "at_mots": 1}, "evaluate.gates.0.at_mots: unknown key; correct or remove it"),
        ({"metric": "kl", "at_most": float("nan")}, "evaluate.gates.0.at_most: .* finite number"),
        ({"metric": "loss", "at_most": 3}, "evaluate: gates.0.metric: loss is not measured; give one of parameters"),
        ({"metric": "mmlu_acc", "at_least": 0}, r"mmlu_acc is not measured; .* of a task in evaluate.tasks \(arc\)"),
        ({"metric": "out_of_domain_loss", "at_most": 3}, "out_of_domain_loss needs evaluate.out_of_domain"),
    ],
)
def test_a_gate_that_says_nothing_is_refused(gate: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse("evaluate", REQUIRED | {"gates": [gate]})
