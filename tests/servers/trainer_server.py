"""Kubeflow Trainer's status server, which the containers of a TrainJob post their progress to.

It answers as Trainer v2.3.0: pkg/statusserver/server.go (paths, statuses, size), auth.go (the token), the limits of
pkg/apis/trainer/v1alpha1/trainjob_types.go (TrainerStatus, Metric), and the models of kubeflow-trainer-api.
"""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kubeflow_trainer_api.models import TrainerV1alpha1UpdateTrainJobStatusRequest
from pydantic import ValidationError

from tests.servers.http_server import Refused, State, http_server

PATH = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs/minitron-train/status"
"""statusserver.StatusUrl of a TrainJob."""


class TrainerServer(State):
    """The statuses that it took, when, and the variables that Trainer sets in the containers of the TrainJob."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.token, self.certificate = directory / "token", (directory / "ca.crt", directory / "ca.key")
        self.statuses: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.seconds = 0.0
        """Seconds that an answer takes."""

    @property
    def variables(self) -> dict[str, str]:
        """pkg/runtime/framework/plugins/trainjobstatus/trainjobstatus.go: createEnvVars."""
        return {
            "KUBEFLOW_TRAINER_SERVER_URL": f"{self.url}{PATH}",
            "KUBEFLOW_TRAINER_SERVER_CA_CERT": str(self.certificate[0]),
            "KUBEFLOW_TRAINER_SERVER_TOKEN": str(self.token),
        }

    def answer(self, method: str, path: str, query: dict[str, str], data: bytes, headers: Any) -> Any:
        self.times.append(time.monotonic())
        time.sleep(self.seconds)
        if (method, path) != ("POST", PATH):
            raise Refused(404, "Not found")
        if headers.get("Authorization") != f"Bearer {self.token.read_text()}":
            raise Refused(403, "Forbidden")
        assert len(data) <= 1 << 16, "maxBodySize"
        self.statuses.append(_read_status(json.loads(data)))
        return json.loads(data)

    def error(self, status: int, message: str) -> Any:
        return {"metadata": {}, "status": "Failure", "message": message, "code": status}


def _read_status(body: dict[str, Any]) -> dict[str, Any]:
    """Return the trainerStatus of a request, or refuse it as the API server does after Status().Apply: 422."""
    try:
        request = TrainerV1alpha1UpdateTrainJobStatusRequest.from_dict(body)
    except ValidationError as error:
        raise Refused(422, "Invalid payload") from error
    status = body["trainerStatus"]
    assert request and request.trainer_status and request.trainer_status.last_updated_time, (
        "lastUpdatedTime is required"
    )
    assert request.trainer_status.last_updated_time.tzinfo, "metav1.Time is RFC 3339"
    assert set(status) <= {"progressPercentage", "estimatedRemainingSeconds", "metrics", "lastUpdatedTime"}
    valid = 0 <= status["progressPercentage"] <= 100 and 0 <= status.get("estimatedRemainingSeconds", 0) < 2**31
    lengths = [len(text) for metric in status["metrics"] for text in (metric["name"], metric["value"])]
    if not (valid and len(status["metrics"]) <= 256 and all(1 <= length <= 64 for length in lengths)):
        raise Refused(422, "Validation failed")
    return status


@contextmanager
def trainer_server(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrainerServer]:
    """Serve until the block ends; this process is the container of the TrainJob meanwhile."""
    state = TrainerServer(directory)
    state.token.write_text("a-token")
    certificate, key = map(str, state.certificate)
    command = ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-subj", "/CN=trainer", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    with http_server(state, state.certificate) as state:
        for name, value in state.variables.items():
            monkeypatch.setenv(name, value)
        yield state
