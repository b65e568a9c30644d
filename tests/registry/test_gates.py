"""Gates: absolute and relative bounds, intervals, what is not there."""

from typing import Any

import pytest

from minitron.config.parse import parse
from minitron.config.stages import EvaluateConfig
from minitron.errors import ConfigError
from minitron.registry import gates
from minitron.registry.intervals import compare_items

REQUIRED = {name: "x" for name, field in EvaluateConfig.model_fields.items() if field.is_required()}
REQUIRED |= {"tasks": ["arc"]}


ONLY_CHAMPION, ONLY_STUDENT = 15, 5
"""Of 200 questions, those that only one of the two answers."""

COUNT = 200


def make_model(loss: float, right: list[float]) -> dict[str, Any]:
    accuracy = sum(right) / len(right)
    return {"validation_loss": loss, "test_loss": None, "parameters": 100 * loss} | {
        "tasks": {"arc": {"acc": accuracy, "rank": 7.0}},
        "items": {"arc_acc": right, "validation_loss": [loss - 0.3, loss, loss + 0.3]},
    }


def answer(*runs: tuple[int, float]) -> list[float]:
    """Return whether each question is answered: so many right or wrong ones in a row."""
    return [value for count, value in runs for _ in range(count)]


STUDENT = answer((95, 1.0), (ONLY_STUDENT, 1.0), (ONLY_CHAMPION, 0.0), (85, 0.0))
EVALUATION = {
    "student": make_model(3.0, STUDENT),
    "teacher": make_model(2.0, answer((120, 1.0), (80, 0.0))),
    "teacher_before": make_model(2.5, answer((130, 1.0), (70, 0.0))),
}
CHAMPION = make_model(3.1, answer((95, 1.0), (ONLY_STUDENT, 0.0), (ONLY_CHAMPION, 1.0), (85, 0.0)))


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
        ({"metric": "validation_loss", "at_most": 2.9}, 3.0, -0.1, "within error"),
        ({"metric": "validation_loss", "at_most": 2.0}, 3.0, -1.0, "failed"),
        ({"metric": "validation_loss", "against": "champion", "at_most": 0.0}, -0.1, 0.1, "passed"),
        ({"metric": "validation_loss", "against": "teacher", "at_most": 0.5}, 1.0, -0.5, "failed"),
        ({"metric": "parameters", "against": "teacher", "by": "ratio", "at_most": 1.5}, 1.5, 0.0, "passed"),
        ({"metric": "arc_acc", "at_least": 0.45}, 0.5, 0.05, "passed"),
        ({"metric": "validation_loss", "against": "teacher_before", "at_most": 0.4}, 0.5, -0.1, "failed"),
        ({"metric": "arc_acc", "at_least": 0.53}, 0.5, -0.03, "within error"),
        ({"metric": "arc_acc", "at_least": 0.58}, 0.5, -0.08, "failed"),
        ({"metric": "arc_acc", "against": "champion", "at_least": -0.01}, -0.05, -0.04, "within error"),
        ({"metric": "arc_acc", "against": "champion", "at_least": 0.0}, -0.05, -0.05, "failed"),
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


def test_two_models_are_compared_on_the_same_questions() -> None:
    """Each alone is known to 7 points, so that 5 points less would pass for nothing; in pairs they are a loss."""
    row = judge_gate(metric="arc_acc", against="champion", at_least=0.0)
    assert row["interval"] == compare_items("arc_acc", STUDENT, CHAMPION["items"]["arc_acc"], "difference")
    assert row["interval"][0] < -0.05 < row["interval"][1] < 0
    alone = judge_gate(metric="arc_acc", at_least=0.0)["interval"]
    assert alone[1] - alone[0] > 0.13


def test_none_of_four_right_is_not_certain() -> None:
    evaluation = {"student": make_model(3.0, answer((4, 0.0)))}
    gate = {"metric": "arc_acc", "against": None, "by": None, "bound": "at_least", "threshold": 0.25}
    (row,) = gates.judge_student([gate], evaluation, None)
    assert row["outcome"] == "within error" and row["interval"] == pytest.approx((0.0, 0.4899), abs=1e-4)
    assert "0.0 % (0.0 to 49.0 %), at least 25.0 %: within error" in gates.describe_gate(row)


def test_without_the_questions_a_number_decides() -> None:
    """A version that an earlier release evaluated has left none."""
    old = {name: value for name, value in CHAMPION.items() if name != "items"}
    row = judge_gate(old, metric="arc_acc", against="champion", at_least=-0.01)
    assert (row["interval"], row["outcome"]) == (None, "failed")


def test_a_chain_of_promotions_cannot_lose_more_than_the_floor_allows() -> None:
    """Every version is one point below the champion before it: never certainly worse, in the end a disaster."""
    rows = [
        {"metric": "arc_acc", "against": against, "by": "difference", "bound": "at_least", "threshold": threshold}
        for against, threshold in (("champion", 0.0), ("teacher_before", -0.1))
    ]
    teacher = make_model(2.0, answer((120, 1.0), (80, 0.0)))
    champion, outcomes = teacher, []
    for version in range(1, 21):
        right = 120 - 2 * version
        student = make_model(2.0, answer((right, 1.0), (COUNT - right, 0.0)))
        judged = gates.judge_student(rows, {"student": student, "teacher_before": teacher}, champion)
        outcomes.append([row["outcome"] for row in judged])
        champion = student
    assert {against_champion for against_champion, _ in outcomes} == {"within error"}, "it would go on for ever"
    floors = [floor for _, floor in outcomes]
    assert floors[:10] == ["passed"] * 10 and floors[-1] == "failed"


@pytest.mark.parametrize(
    ("gate", "champion", "judged"),
    [
        ({"metric": "validation_loss", "against": "teacher", "at_most": 9}, None, True),
        ({"metric": "arc_acc", "at_least": 0.9}, None, True),
        ({"metric": "arc_acc", "against": "champion", "at_least": 0}, CHAMPION, True),
        ({"metric": "arc_acc", "against": "champion", "at_least": 0}, None, False),
        ({"metric": "test_loss", "at_most": 3}, None, False),
        ({"metric": "parameters", "at_most": 3000}, None, False),
        ({"metric": "generation_tokens_per_second", "at_least": 3}, None, False),
    ],
)
def test_size_and_speed_say_nothing_of_the_quality(
    gate: dict[str, Any], champion: dict[str, Any] | None, judged: bool
) -> None:
    assert gates.is_quality_judged([judge_gate(champion, **gate)]) is judged


def test_what_is_not_there() -> None:
    assert judge_gate(None, metric="validation_loss", against="champion", at_most=0)["outcome"] == "no champion"
    assert judge_gate(metric="test_loss", at_most=9)["outcome"] == "not measured"
    assert judge_gate(metric="arc_exact", at_least=0)["outcome"] == "not measured"
    missing = judge_gate(metric="test_loss", at_most=9)
    assert gates.are_gates_met([missing]) is False and "not measured" in gates.describe_gate(missing)
    assert gates.are_gates_met([]) is None


def test_a_judged_gate_can_be_judged_again() -> None:
    row = judge_gate(metric="validation_loss", against="champion", at_most=0.0)
    (again,) = gates.judge_student([row], EVALUATION, make_model(2.5, STUDENT))
    assert (row["outcome"], again["outcome"]) == ("passed", "failed")
    assert gates.describe_gate(again) == (
        "Validation loss, difference from the champion's: 0.500 (0.500 to 0.500) (student: 3.000, champion: 2.500), "
        "at most 0.000: failed"
    )


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"metric": "kl"}, "evaluate.gates.0: gate on kl: needs one bound; give either at_most or at_least"),
        ({"metric": "kl", "at_most": 1, "at_least": 0}, "gate on kl: needs one bound"),
        ({"metric": "kl", "by": "ratio", "at_most": 1}, "by=ratio needs `against`"),
        (
            {"metric": "kl", "against": "best", "at_most": 1},
            "evaluate.gates.0.against: .*'teacher_before', 'teacher' or 'champion'",
        ),
        ({"metric": "kl", "most": 1}, "evaluate.gates.0.most: "),
        ({"metric": "kl", "at_mots": 1}, "evaluate.gates.0.at_mots: unknown key; correct or remove it"),
        ({"metric": "kl", "at_most": float("nan")}, "evaluate.gates.0.at_most: .* finite number"),
        ({"metric": "loss", "at_most": 3}, "evaluate.gates.0.metric: loss is not measured; give one of parameters"),
        ({"metric": "mmlu_acc", "at_least": 0}, r"mmlu_acc is not measured; .* of a task in evaluate.tasks \(arc\)"),
        ({"metric": "out_of_domain_loss", "at_most": 3}, "out_of_domain_loss needs evaluate.out_of_domain"),
        (
            {"metric": "kl", "against": "teacher", "by": "ratio", "at_most": 1},
            "evaluate.gates.0.metric: kl is 0 for the teacher, so there is no ratio",
        ),
    ],
)
def test_a_gate_that_says_nothing_is_refused(gate: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse("evaluate", REQUIRED | {"gates": [gate]})
