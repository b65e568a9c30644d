"""A real MLflow server, and registered versions that are nothing but tags and files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron.tracking.client import connect, find_or_create_experiment
from tests.servers import forks
from tests.servers.processes import wait_until_healthy

MLFLOW_SERVER = """
import os, runpy, sys
import mlflow.cli, mlflow.server

def become(command, extra_env, **_):
    os.environ.update(extra_env)
    _, _, module, *sys.argv[1:] = command
    runpy.run_module(module, run_name="__main__")

mlflow.server._exec_cmd = become
mlflow.cli.cli()
"""
"""`mlflow server`, which would start `python -m uvicorn`, becomes it."""


@contextmanager
def mlflow_serving(
    directory: Path, port: int, *options: str, database: str | None = None, **environment: str
) -> Iterator[int]:
    """Run a real MLflow server; a restart on the same directory or database finds the stored data."""
    command = ["-c", MLFLOW_SERVER, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database or f"sqlite:///{directory}/mlflow.db", *options]
    command += ["--artifacts-destination", str(directory)]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = directory / "log"
    process = forks.start_python(command, log, log, os.environ | quiet | environment, directory)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", log)
        yield process.pid or 0
    finally:
        process.kill()
        process.join()


def register_version(uri: str, name: str, alias: str | None, tags: dict[str, str], **files: str) -> None:
    """Register a version that has only tags, and JSON files of its run."""
    client = connect(uri)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    run = client.create_run(find_or_create_experiment(client, name))
    client.log_text(run.info.run_id, "{}", "model/MLmodel")
    for stem, text in files.items():
        client.log_text(run.info.run_id, text, f"{stem}.json")
    source = f"{run.info.artifact_uri}/model"
    version = client.create_model_version(name, source, run.info.run_id, tags=tags).version
    if alias:
        client.set_registered_model_alias(name, alias, str(version))
