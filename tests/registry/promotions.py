"""Versions with gates, and processes that promote them at the same time."""

import json
from pathlib import Path
from typing import Any

from minitron.registry.promotion_log import PromotionLog
from minitron.tracking.client import connect
from tests.servers import forks
from tests.servers.mlflow_server import register_version


def register_versions(uri: str, name: str, *evaluations: dict[str, Any] | None) -> None:
    """Register versions that are nothing but their evaluation; the last one is the challenger."""
    for evaluation in evaluations:
        files = {} if evaluation is None else {"evaluation": json.dumps(evaluation)}
        register_version(uri, name, "challenger", {}, **files)


def read_aliases(uri: str, name: str) -> dict[str, int]:
    return {alias: int(version) for alias, version in connect(uri).get_registered_model(name).aliases.items()}


def make_evaluation(loss: float, against: str | None = None, test_set: str = "a", **others: Any) -> dict[str, Any]:
    """Return an evaluation with the gate that the student's loss is at most 2, or at most the champion's."""
    gate = {"metric": "validation_loss", "against": against, "by": "difference" if against else None}
    gate |= {"bound": "at_most", "threshold": 0.0 if against else 2.0, "student": loss, "reference": None}
    gate |= {"found": loss, "margin": 2.0 - loss, "error": None, "outcome": "passed" if loss <= 2 else "failed"}
    common = {"student": {"validation_loss": loss}, "teacher": {"validation_loss": 1.0}, "test_set": test_set}
    return common | {"champion": None, "gates": [gate], "passed": loss <= 2} | others


RIVAL = """
import json, sys, time
from pathlib import Path
from minitron.errors import RunError
from minitron.registry.promotion import promote
uri, name, directory, me, rounds = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
made, lost = [], []
for number in range(rounds):
    (directory / f"{number}-{me}").touch()
    while not (directory / f"{number}-{1 - me}").exists():
        time.sleep(0.001)
    try:
        made.append(promote(uri, name, 1 + 2 * me + number % 2).move.id)
    except RunError as error:
        lost.append(str(error))
print(json.dumps([made, lost]))
"""


def race_promotions(uri: str, name: str, directory: Path, rounds: int) -> None:
    """Let two processes promote at the same time, again and again: one wins each move, and none is lost."""
    register_versions(uri, name, *[make_evaluation(1.0)] * 4)
    commands = [["-c", RIVAL, uri, name, str(directory), str(me), str(rounds)] for me in range(2)]
    answers = [json.loads(done.stdout) for done in forks.run_together(*commands)]
    made, lost = ([entry for answer in answers for entry in answer[kind]] for kind in range(2))
    found = PromotionLog(connect(uri), name)
    moves = found.read_moves()
    assert sorted(move.id for move in moves) == sorted(made), lost
    assert [move.source for move in moves] == [None, *(move.to for move in moves[:-1])]
    assert lost and all("at the same time; run the command again" in error for error in lost)
    aliases = read_aliases(uri, name)
    assert (aliases["champion"], aliases["previous"]) == (moves[-1].to, moves[-1].source)
    assert found.settle_moves().moves == len(moves) == len({move.id for move in moves})
