"""Report a training's progress to Kubeflow Trainer, which shows it in the TrainJob: percent, seconds left, metrics.

    kubectl get trainjob NAME -o jsonpath='{.status.trainerStatus}'

Trainer 2.3 tells the containers of a TrainJob where to post (pkg/runtime/framework/plugins/trainjobstatus), if its
feature gate TrainJobStatus is on. transformers' KubeflowCallback posts within the training step and waits for the
answer, up to five seconds every five seconds; NeMo's image has a transformers without it.
"""

import json
import os
import ssl
import sys
import threading
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

URL, CA_CERT, TOKEN = (f"KUBEFLOW_TRAINER_SERVER_{name}" for name in ("URL", "CA_CERT", "TOKEN"))
"""Variables of a TrainJob's containers: an address, the file of its certificate, and the file of a rotating token."""

INTERVAL_SECONDS = 5.0
TIMEOUT_SECONDS = 5.0


class TrainerStatus:
    """Posts the newest progress from a thread of its own: at most every five seconds, and once more at the end.

    The training waits only for the last post, five seconds at most. A failed post is dropped. Outside a TrainJob
    nothing is posted.
    """

    def __init__(self, first_step: int, max_steps: int) -> None:
        """Start the clock of a training that continues after `first_step`."""
        self._first_step, self._max_steps = first_step, max_steps
        self._url, self._began = os.environ.get(URL), time.monotonic()
        self._metrics: dict[str, float] = {"total_steps": max_steps}
        self._body = b""
        self._changed, self._ended = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._warned = False

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Report a finished step; its metrics are added to those of earlier reports."""
        if self._url is None:
            return
        self._metrics |= metrics | {"current_step": step}
        self._body = self._make_request(step)
        self._changed.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._post_changes, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Post the last report, if the server accepts it in time."""
        if self._thread:
            self._ended.set()
            self._thread.join(TIMEOUT_SECONDS)

    def _make_request(self, step: int) -> bytes:
        """Return an UpdateTrainJobStatusRequest (pkg/apis/trainer/v1alpha1/trainjob_types.go)."""
        status = {
            "progressPercentage": 100 * step // self._max_steps,
            "metrics": [{"name": name, "value": f"{value:.6g}"} for name, value in self._metrics.items()],
            "lastUpdatedTime": datetime.now(UTC).isoformat(),
        }
        if done := step - self._first_step:
            left = (time.monotonic() - self._began) / done * (self._max_steps - step)
            status["estimatedRemainingSeconds"] = round(left)
        return json.dumps({"trainerStatus": status}).encode()

    def _post_changes(self) -> None:
        while not self._ended.is_set():
            if self._changed.wait(INTERVAL_SECONDS):
                self._try_post()
                self._ended.wait(INTERVAL_SECONDS)
        if self._changed.is_set():
            self._try_post()

    def _try_post(self) -> None:
        self._changed.clear()
        try:
            token = Path(os.environ[TOKEN]).read_text().strip()
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            request = urllib.request.Request(str(self._url), self._body, headers)
            context = ssl.create_default_context(cafile=os.environ[CA_CERT])
            urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS, context=context).close()
        except Exception as error:  # the training continues whatever happens
            if not self._warned:
                print(f"warning: Kubeflow Trainer rejected the progress: {error!r}", file=sys.stderr, flush=True)
            self._warned = True
