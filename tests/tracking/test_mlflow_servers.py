"""MLflow as it is deployed: with a login, and on PostgreSQL."""

import getpass
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minitron.cli.app import app
from minitron.config.parse import parse
from minitron.config.stages import StageConfig
from minitron.errors import RunError, without_password
from minitron.runtime import stage
from minitron.tracking import stage_run
from minitron.tracking.client import connect
from minitron.tracking.pipeline_run import STAGE_TAG
from tests.registry.promotions import race_promotions
from tests.servers.http_server import free_port
from tests.servers.mlflow_server import mlflow_serving

PASSWORD = "a long password"


@pytest.fixture(scope="module")
def login_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that wants a name and a password."""
    directory, port = tmp_path_factory.mktemp("login"), free_port()
    secrets = {"MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD, "MLFLOW_FLASK_SERVER_SECRET_KEY": "key"}
    with mlflow_serving(directory, port, "--app-name", "basic-auth", **secrets):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def postgresql_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose database is PostgreSQL, as in the manifests."""
    directory, port = tmp_path_factory.mktemp("postgresql-server"), free_port()
    with _postgresql() as database, mlflow_serving(directory, port, database=database):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def _postgresql() -> Iterator[str]:
    """Run a new PostgreSQL, which refuses to be root's and cannot enter root's tmp_path: it lies in /tmp."""
    programs = max(Path("/usr/lib/postgresql").glob("*/bin/initdb"), default=None)
    if programs is None:
        pytest.skip("PostgreSQL's programs are not installed: apt-get install postgresql")
    user = "postgres" if os.getuid() == 0 else getpass.getuser()
    directory, port = Path(tempfile.mkdtemp(dir="/tmp")), free_port()
    os.chown(directory, pwd.getpwnam(user).pw_uid, -1)

    def call(program: str, *arguments: str, check: bool = True) -> None:
        command = [str(programs.with_name(program)), "-D", str(directory / "data"), *arguments]
        subprocess.run(command, check=check, cwd=directory, user=user, stdout=subprocess.DEVNULL)

    try:
        call("initdb", "--auth=trust", f"--username={user}", "--no-sync")
        call("pg_ctl", "-w", "-l", str(directory / "log"), "-o", f"-p {port} -k {directory} -h 127.0.0.1", "start")
        yield f"postgresql+psycopg2://{user}@127.0.0.1:{port}/postgres"
    finally:
        if (directory / "data" / "postmaster.pid").exists():
            call("pg_ctl", "-m", "immediate", "stop", check=False)
        shutil.rmtree(directory, ignore_errors=True)


def _config(directory: Path, uri: str, teacher: Path) -> StageConfig:
    (directory / "corpus.txt").write_text("some text\n")
    common = {"output": directory / "out", "corpus": f"{directory}/corpus.txt", "teacher": f"{teacher}"}
    return parse("prepare", common | {"tracking_uri": uri, "experiment": directory.name, "pipeline_run_id": "p"})


def _work(config: Any, directory: Path, tracker: stage_run.Tracker) -> dict[str, Any]:
    for step in range(1500):
        tracker.log({"loss": float(step), "other": 1e308}, step)
    return {"metrics": {"best": 1.0}}


def _assert_complete(uri: str, experiment: str) -> None:
    client = connect(uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    runs = {run.data.tags.get(STAGE_TAG, "pipeline"): run for run in found}
    assert {name: run.info.status for name, run in runs.items()} == {"prepare": "FINISHED", "pipeline": "FINISHED"}
    loss, other = (client.get_metric_history(runs["prepare"].info.run_id, name) for name in ("loss", "other"))
    assert sorted((point.step, point.value) for point in loss) == [(step, float(step)) for step in range(1500)]
    assert sorted(point.step for point in other) == list(range(1500))


def test_a_stage_logs_to_a_server_with_a_login(
    login_server: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    stage.run(_config(tmp_path, login_server, teacher), _work)
    _assert_complete(login_server, tmp_path.name)


@pytest.mark.parametrize("password", ["wrong", None])
def test_a_wrong_or_missing_password_is_one_line_that_names_the_remedy(
    login_server: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, password: str | None
) -> None:
    if password:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    with pytest.raises(
        RunError, match=r"MLflow at http.*401.*; set MLFLOW_TRACKING_USERNAME and .*_PASSWORD"
    ) as caught:
        stage.run(_config(tmp_path, login_server, teacher), _work)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_stage_logs_to_postgresql_and_points_that_come_twice_are_there_once(
    postgresql_server: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(config: Any, directory: Path, tracker: Any) -> dict[str, Any]:
        found = _work(config, directory, tracker)
        sent = list(tracker._outbox._queued)
        assert len(sent) == 1500 and tracker._outbox.flush()
        for message in sent:  # as if the answers had been lost
            tracker._outbox.put(message)
        return found

    monkeypatch.setattr("minitron.tracking.outbox._INTERVAL_SECONDS", 600)  # nothing is sent before it is asked for
    stage.run(_config(tmp_path, postgresql_server, teacher), work)
    _assert_complete(postgresql_server, tmp_path.name)


def test_on_postgresql_of_two_processes_one_wins_each_move(postgresql_server: str, tmp_path: Path) -> None:
    race_promotions(postgresql_server, tmp_path.name, tmp_path, rounds=15)


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("http://host/mlflow", "http://host/mlflow"),
        ("https://user:secret@host/mlflow", "https://host/mlflow"),
        ("https://user:se@cret@host", "https://host"),
        ("postgresql://user:se/cret@db/mlflow", "postgresql://db/mlflow"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("request to http://user:secret@host/api for hf://gpt2@main", "request to http://host/api for hf://gpt2@main"),
    ],
)
def test_a_uri_is_shown_without_its_password(uri: str, text: str) -> None:
    assert without_password(uri) == text


def test_errors_of_the_registry_are_one_line_and_hide_the_password(tmp_path: Path) -> None:
    (tmp_path / "not.db").write_text("text " * 1000)
    answers = {
        "postgres://user:secret@db/mlflow": "tracking_uri postgres://db/mlflow: MLflow cannot write there",
        f"sqlite:///{tmp_path}/w?2/mlflow.db": "MLflow would create another file, because of '?' in the URI",
        f"sqlite:///{tmp_path}/not.db": "file is not a database",
    }
    for uri, words in answers.items():
        done = CliRunner().invoke(app, ["lineage", "models:/x/1", "--tracking-uri", uri])
        assert words in done.output and done.output.count("\n") == 1 and "secret" not in done.output


def test_who_only_reads_makes_no_database_of_a_mistyped_path(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/typo/mlflow.db"
    (tmp_path / "workspace").mkdir()
    for command in (
        ["lineage", "models:/x/1"],
        ["reproduce", "models:/x@champion"],
        ["serve-manifest", "models:/x/1"],
        ["promote", "x"],
        ["rollback", "x"],
        ["gc", str(tmp_path / "workspace")],
    ):
        done = CliRunner().invoke(app, [*command, "--tracking-uri", uri])
        assert done.exit_code == 2 and done.stderr.startswith(f"error: tracking_uri {uri}: no such database"), done
    assert not (tmp_path / "typo").exists()
