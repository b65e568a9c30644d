"""A registration or promotion that is killed after any of its requests is continued, and nothing is there twice."""

import json
import signal
from pathlib import Path
from typing import Any

from minitron.config.parse import parse
from minitron.config.stages import RegisterConfig
from minitron.registry.promotion import promote
from minitron.registry.promotion_log import PromotionLog
from minitron.stages import register
from minitron.storage.hashing import list_files
from minitron.tracking.client import connect
from tests.registry.promotions import make_evaluation, read_aliases, register_versions
from tests.servers import forks

DIE = """
import json, os, signal, sys
import requests
limit, values = int(sys.argv[1]), json.loads(sys.argv[2])
changes, send = 0, requests.Session.send
def send_then_die(session, request, **options):
    global changes
    answer = send(session, request, **options)
    changes += request.method != "GET" and not request.url.endswith("/search")
    if changes == limit:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer
requests.Session.send = send_then_die
"""
"""A request that only reads leaves the server as the one before it did."""

REGISTER = """
from minitron.config.parse import parse
from minitron.stages import register
register.run(parse("register", values))
"""

PROMOTE = """
from minitron.registry.promotion import promote
promote(*values)
"""


def _is_killed(code: str, limit: int, values: Any) -> bool:
    """Run code in a process that dies after so many requests that change something; say whether it lived to die."""
    done = forks.run_python("-c", DIE + code, str(limit), json.dumps(values))
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def test_a_killed_registration_goes_on_and_makes_one_version(
    mlflow_server: str, teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    evaluation, limit, killed = tmp_path / "evaluation", 0, True
    evaluation.mkdir()
    (evaluation / "report.html").write_text("<p>report</p>")
    (evaluation / "evaluation.json").write_text(json.dumps({"student": {"parameters": 213568}}))
    while killed:
        limit += 1
        name = f"{tmp_path.name}-{limit}"
        values = {"student": teacher, "dataset": dataset, "evaluation": evaluation, "output": tmp_path / str(limit)}
        values |= {"name": name, "experiment": name, "tracking_uri": mlflow_server, "pipeline_run_id": "run"}
        config = parse("register", values)
        assert isinstance(config, RegisterConfig)
        killed = _is_killed(REGISTER, limit, config.model_dump(mode="json"))
        _check_registration(connect(mlflow_server), register.run(config)["registered"], teacher)
    assert limit > 20, "a registration makes more requests"


def _check_registration(client: Any, registered: dict[str, Any], student: Path) -> None:
    name = registered["name"]
    experiment = client.get_experiment_by_name(name).experiment_id
    (version,), (model,) = client.search_model_versions(f"name = '{name}'"), client.search_logged_models([experiment])
    assert int(client.get_model_version_by_alias(name, "challenger").version) == registered["version"] == 1
    assert (model.status, version.source) == ("READY", f"models:/{model.model_id}")
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": name, "version": "1"}]
    stored = {file.path: file.file_size for file in client.list_logged_model_artifacts(model.model_id)}
    files = {path.relative_to(student).as_posix(): path.stat().st_size for path in list_files(student)}
    assert stored | files == stored and {"MLmodel", "README.md", "requirements.txt"} <= stored.keys()
    parent, stage = sorted(client.search_runs([experiment]), key=lambda run: "kfp.run_id" not in run.data.tags)
    assert [run.info.status for run in (parent, stage)] == ["FINISHED"] * 2
    assert version.run_id == parent.info.run_id == registered["run_id"]
    assert [output.model_id for output in parent.outputs.model_outputs] == [model.model_id]


def test_a_killed_promotion_is_completed_or_was_none(mlflow_server: str, tmp_path: Path) -> None:
    client, limit, killed = connect(mlflow_server), 0, True
    while killed:
        limit += 1
        name = f"{tmp_path.name}-{limit}"
        register_versions(mlflow_server, name, *[make_evaluation(1.0)] * 3)
        promote(mlflow_server, name, 1)
        killed = _is_killed(PROMOTE, limit, [mlflow_server, name, 2])
        promote(mlflow_server, name, 3)
        moves = [(move.source, move.to) for move in PromotionLog(client, name).read_moves()]
        assert moves in ([(None, 1), (1, 2), (2, 3)], [(None, 1), (1, 3)])
        assert read_aliases(mlflow_server, name) == {"challenger": 3, "champion": 3, "previous": moves[-1][0]}
    assert limit > 6, "a promotion makes more requests"
