"""Evaluations as evaluation.json has them, with round numbers."""

import copy
from typing import Any

from minitron.config import metrics
from minitron.config.gates import Gate
from minitron.config.stages import EvaluateConfig
from minitron.registry import gates


def answer(share: float) -> list[float]:
    """A hundred answers, the first of them right."""
    return [float(number < round(100 * share)) for number in range(100)]


def spread(value: float, half: float) -> tuple[float, float]:
    """An interval around a value."""
    return value - half, value + half


def make_model(parameters: int, loss: float, accuracy: float, speed: float, text: str) -> dict[str, Any]:
    return {
        "parameters": parameters,
        "validation_loss": loss,
        "test_loss": loss + 0.25,
        "perplexity": 10 * loss,
        "kl": loss - 2,
        "top1_agreement": 1 / loss,
        "tasks": {"arc": {"acc": accuracy, "acc_stderr": 0.03, "acc_norm": accuracy + 0.01, "acc_norm_stderr": 0.02}},
        "items": {"arc_acc": answer(accuracy), "arc_acc_norm": answer(accuracy + 0.01)},
        "intervals": {"arc_acc": spread(accuracy, 0.1), "validation_loss": spread(loss, 0.05)},
        "differences": {"arc_acc": spread(accuracy - 0.6, 0.04), "validation_loss": spread(loss - 2, 0.03)},
        "generation_tokens_per_second": speed,
        "weights_mb": parameters / 250_000,
        "samples": [f" {text} one", f" {text} two"],
    }


EVALUATION = {
    "teacher_before": make_model(134_515_008, 2.5, 0.58, 20.0, "base"),
    "teacher": make_model(134_515_008, 2.0, 0.6, 20.0, "teacher"),
    "pruned": make_model(90_214_488, 6.0, 0.3, 25.0, "pruned"),
    "student": make_model(90_214_488, 3.0, 0.5, 30.0, "student"),
    "gap_closed": 0.75,
    "sequences": {"validation": 640, "test": 320},
    "prompts": ["Once upon", "In physics"],
}


def change_evaluation(**values: Any) -> dict[str, Any]:
    """The evaluation with other values; model__key names a model's."""
    evaluation = copy.deepcopy(EVALUATION)
    for name, value in values.items():
        model_name, _, key = name.partition("__")
        if key:
            evaluation[model_name][key] = value
        else:
            evaluation[name] = value
    return evaluation


def judge_evaluation(evaluation: dict[str, Any], *declared: dict[str, Any]) -> dict[str, Any]:
    """The evaluation with the gates of a preset."""
    config = EvaluateConfig.model_construct(gates=[Gate(**gate) for gate in declared])
    rows = gates.judge_student(gates.read_gates(config), evaluation, evaluation.get("champion"))
    return evaluation | {"gates": rows, "passed": gates.are_gates_met(rows)}


def make_gated_evaluation() -> dict[str, Any]:
    """An evaluation without a test split, with a champion and gates of every outcome that there is with one."""
    champion = make_model(90_214_488, 2.9, 0.55, 30.0, "champion")
    champion |= {"address": "models:/small/3", "out_of_domain_loss": 3.2, "test_loss": None}
    nothing = {f"{name}__test_loss": None for name in metrics.MODELS}
    return judge_evaluation(
        change_evaluation(champion=champion, student__out_of_domain_loss=3.1, **nothing),
        {"metric": "validation_loss", "against": "champion", "at_most": 0.15},
        {"metric": "arc_acc", "against": "champion", "at_least": 0.05},
        {"metric": "arc_acc_norm", "at_least": 0.53},
        {"metric": "perplexity", "against": "teacher", "by": "ratio", "at_most": 1.6},
        {"metric": "test_loss", "at_most": 3.5},
        {"metric": "out_of_domain_loss", "at_most": 3.5},
    )
