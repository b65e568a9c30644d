"""Measure how long a training waits for MLflow while it logs ten thousand points, and when all points have arrived.

    python benchmarks/tracking.py

A real MLflow server on SQLite, a process of its own, gets one point at a time from `log`, as from a training. The time
runs from the first point to the end of the run, which follows the last batch's answer. For comparison: a request with
one point, times the points.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from servers import free_port, run_server

from minitron.config.parse import parse
from minitron.tracking.client import connect
from minitron.tracking.stage_run import MlflowTracker

REQUESTS = 20


def main() -> None:
    """Log, wait for the end, count the points that arrived, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=10_000)
    points = parser.parse_args().points
    with tempfile.TemporaryDirectory() as name, run_mlflow(Path(name)) as uri:
        os.environ["MINITRON_CACHE"] = f"{name}/cache"
        tracker = open_tracker(uri)
        request = time_request(tracker)
        started = time.perf_counter()
        for step in range(points):
            tracker.log({"loss": float(step)}, step)
        logged = time.perf_counter() - started
        tracker.close("FINISHED")
        took = time.perf_counter() - started
        arrived = len(tracker.client.get_metric_history(tracker.run_id, "loss"))
    claim = {"claim": "seconds_until_all_points_are_in_mlflow", "value": round(took, 3), "points": points}
    figures = {"arrived": arrived, "seconds_the_training_waited": round(logged, 3)}
    print(json.dumps(claim | figures | {"seconds_one_by_one": round(request * points, 1)}))


def open_tracker(uri: str) -> MlflowTracker:
    """Return the tracker of a stage with a run."""
    config = parse("prepare", {"output": "out", "corpus": "corpus", "teacher": "teacher", "tracking_uri": uri})
    return MlflowTracker(connect(uri), config, {"stage": "prepare", "key": "key", "inputs": {}})


def time_request(tracker: MlflowTracker) -> float:
    """Return the seconds that a request with one point takes."""
    started = time.perf_counter()
    for step in range(REQUESTS):
        tracker.client.log_metric(tracker.run_id, "other", 1.0, step=step)
    return (time.perf_counter() - started) / REQUESTS


@contextmanager
def run_mlflow(directory: Path) -> Iterator[str]:
    """Run MLflow on a new database, and yield its URI."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{directory}/mlflow.db", "--artifacts-destination", str(directory)]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with run_server(command, f"{uri}/health", directory / "log", os.environ | quiet):
        yield uri


if __name__ == "__main__":
    main()
