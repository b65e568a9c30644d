"""TrainJobs against a stateful API server: followed, taken up, deleted, with every fault in between."""

import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from urllib3 import Retry

from minitron.cluster import kubernetes_api
from minitron.engines import trainjob
from minitron.errors import ConfigError, RunError
from tests.constants import REPOSITORY
from tests.servers import forks
from tests.servers.http_server import CUT, HALF, Refused
from tests.servers.kubernetes_server import KubernetesServer, cluster_of_a_task
from tests.servers.processes import wait_until

KEY = "0123456789abcdef"
JOB = "minitron-add-0123456789ab"
FIRST = f"{JOB}-node-0-0-abcde"
WORKER = "tests.servers.launcher_worker"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    with cluster_of_a_task(tmp_path, monkeypatch) as state:
        monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
        quick = {"backoff_factor": 0.05, "backoff_max": 0.05, "status_forcelist": (429, 500, 502, 503, 504)}
        monkeypatch.setattr(kubernetes_api, "RETRY", Retry(20, allowed_methods=None, **quick))
        yield state


def launch(directory: Path, follow: Callable[[], None] = lambda: None, job: str = "add") -> None:
    trainjob.launch(WORKER, {"job": job}, directory, 2, 1, KEY, follow)


def later(server: KubernetesServer, action: Callable[[], Any], seconds: float = 0.3) -> None:
    """Do it some time after the job was created."""

    def wait() -> None:
        while not server.objects["trainjobs"]:
            time.sleep(0.01)
        time.sleep(seconds)
        action()

    threading.Thread(target=wait, daemon=True).start()


def test_the_jobs_pods_are_like_the_tasks_own(server: KubernetesServer, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    later(server, lambda: (seen.append(server.job()), server.end("Complete")))
    launch(tmp_path)
    (job,) = seen
    assert job["metadata"]["name"] == JOB
    assert job["metadata"]["ownerReferences"] == [
        {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "compress-x", "uid": "w1"}
    ]
    trainer = job["spec"]["trainer"]
    assert trainer["command"] == ["python", "-m", "torch.distributed.run", "-m", WORKER, str(tmp_path / "add.json")]
    assert (trainer["image"], trainer["numNodes"], trainer["numProcPerNode"]) == ("registry/trainer:0.1.0", 2, 1)
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "1"}
    assert [entry["name"] for entry in trainer["env"]] == ["HF_TOKEN", "MINITRON_CACHE"]
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert [volume["name"] for volume in pod["volumes"]] == ["minitron-workspace", "shared-memory"]
    assert [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]] == ["/workspace", "/dev/shm"]
    assert pod["serviceAccountName"] == "minitron" and pod["imagePullSecrets"] == [{"name": "pull"}]
    assert pod["tolerations"] and pod["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert not server.objects["trainjobs"], "deleted when it is done"


def test_the_nodes_are_one_group_and_are_followed(
    server: KubernetesServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.run_jobs = True
    calls: list[int] = []
    launch(tmp_path, lambda: calls.append(len(list(tmp_path.glob("rank*")))))
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["3", "3"]
    assert calls[-1] == 2 and not server.objects["trainjobs"]
    assert f"TrainJob {JOB}: 2 x 1 GPUs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("job", "kind", "message"),
    [
        ("fail", RunError, r"^fail: ValueError: no such layer; see the log .*fail.log$"),
        ("refuse", ConfigError, r"^size 3: too odd; choose 4$"),
    ],
)
def test_a_workers_own_words_come_back(
    server: KubernetesServer, tmp_path: Path, job: str, kind: type[Exception], message: str
) -> None:
    server.run_jobs = True
    with pytest.raises(kind, match=message):
        launch(tmp_path, job=job)
    assert not server.objects["trainjobs"]


def test_without_a_workers_words_the_last_lines_come_back(
    server: KubernetesServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later(server, lambda: server.say(FIRST, *[f"line {number}" for number in range(30)], "Segmentation fault"))
    later(server, lambda: server.end("Failed", "jobset failed due to one or more job failures"), 0.6)
    with pytest.raises(RunError) as caught:
        launch(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"add: TrainJob {JOB} failed (JobsFailed: jobset failed due to one or more job failures)")
    assert "line 29 | Segmentation fault; see" in message and "line 10 " not in message
    log = (tmp_path / "add.log").read_text()
    assert log.startswith("line 0\n") and log.count("\n") == 31
    assert capsys.readouterr().out.count("line 7\n") == 1


def test_every_line_of_the_log_comes_once_though_connections_are_cut(
    server: KubernetesServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def speak() -> None:
        for number in range(20):
            server.say(FIRST, f"step {number}")
            if number % 6 == 0:
                server.faults = [CUT, HALF, 503, HALF]
            time.sleep(0.05)
        server.faults = []
        server.end("Complete")

    later(server, speak)
    launch(tmp_path)
    lines = (tmp_path / "add.log").read_text().splitlines()
    assert lines == [f"step {number}" for number in range(20)]
    assert re.findall(r"step \d+", capsys.readouterr().out) == lines


def test_an_api_server_that_is_away_for_a_while_costs_nothing(server: KubernetesServer, tmp_path: Path) -> None:
    later(server, lambda: setattr(server, "faults", [503, CUT, 429, CUT, 500]))
    later(server, lambda: server.end("Complete"), 1.0)
    launch(tmp_path)
    assert sum(request.startswith("POST") for request in server.requests) == 1


def test_an_api_server_that_stays_away_is_named_and_the_job_may_run_on(
    server: KubernetesServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later(server, lambda: setattr(server, "faults", [CUT] * 1000))
    with pytest.raises(
        RunError, match=r"no answer from the Kubernetes API \(MaxRetryError\); check that it is running"
    ):
        launch(tmp_path)
    server.faults = []
    assert f"delete it with 'kubectl delete trainjob {JOB} -n team'" in capsys.readouterr().err


def test_a_restarted_task_takes_up_the_job_of_the_lost_one(
    server: KubernetesServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = threading.Event()

    def follow() -> None:
        if lost.is_set():
            raise KeyboardInterrupt  # stands for a kill: but nothing may be deleted then

    later(server, lost.set)
    server.forbidden.add("DELETE trainjobs")
    with pytest.raises(KeyboardInterrupt):
        launch(tmp_path, follow)
    server.forbidden.clear()
    server.say(FIRST, "step 7")
    later(server, lambda: server.end("Complete"))
    (tmp_path / "add.json").write_text("what the running workers read")
    launch(tmp_path)
    assert (tmp_path / "add.json").read_text() == "what the running workers read"
    assert f"TrainJob {JOB}: exists, following it" in capsys.readouterr().out
    assert sum(request.startswith("POST") for request in server.requests) == 1
    assert "step 7" in (tmp_path / "add.log").read_text()


def test_two_tasks_that_create_it_at_once_follow_one_job(server: KubernetesServer, tmp_path: Path) -> None:
    """The other's job appears between the look and the creation: 409."""
    found = server._found
    looks = []

    def first_not_there(kind: str, name: str) -> Any:
        looks.append(name)
        if kind == "trainjobs" and looks.count(name) == 1:
            server._create("trainjobs", _plain_job(name))
        elif kind != "trainjobs" or looks.count(name) > 1:
            return found(kind, name)
        raise Refused(404, "not found")

    server._found = first_not_there  # type: ignore[method-assign]
    later(server, lambda: server.end("Complete"))
    launch(tmp_path)
    assert sum(request.startswith("POST") for request in server.requests) == 1 and not server.objects["trainjobs"]


def test_a_job_that_failed_before_is_made_again_once_it_is_gone(server: KubernetesServer, tmp_path: Path) -> None:
    server._create("trainjobs", _plain_job(JOB))
    server.end("Failed", "node lost")
    (tmp_path / "add.failure").write_text(json.dumps({"kind": "ValueError", "message": "of the first attempt"}))
    server.lingering = True
    later(server, lambda: server.end("Complete"), 0.8)
    launch(tmp_path)
    assert [request.split()[0] for request in server.requests if "trainjobs" in request][:4] == [
        "GET",
        "DELETE",
        "GET",
        "GET",
    ]
    assert not (tmp_path / "add.failure").exists()


def test_a_job_that_somebody_deletes_is_an_error(server: KubernetesServer, tmp_path: Path) -> None:
    later(server, lambda: server.objects["trainjobs"].clear())
    with pytest.raises(RunError, match=f"^TrainJob {JOB}: it was deleted; run the stage again to resume it$"):
        launch(tmp_path)


def test_an_account_without_the_right_is_named(
    server: KubernetesServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.forbidden.add("POST trainjobs")
    with pytest.raises(
        RunError, match=r"cannot POST trainjobs; apply manifests/base, and use its service account minitron"
    ):
        launch(tmp_path)
    assert capsys.readouterr().err == "" and not any(request.startswith("DELETE") for request in server.requests)


def test_a_quota_that_is_exceeded_gives_the_job_up(server: KubernetesServer, tmp_path: Path) -> None:
    server.create_pods = False
    refusal = (
        'pods "x" is forbidden: exceeded quota: minitron, requested: requests.nvidia.com/gpu=16, used: 8, limited: 8'
    )
    event = {"reason": "FailedCreate", "message": refusal, "involvedObject": {"name": f"{JOB}-node-0"}}
    later(server, lambda: server.add("events", "e1", **event))
    with pytest.raises(RunError, match=r"its pods are refused: .*exceeded quota.*; ask for less, or raise the quota"):
        launch(tmp_path)
    assert not server.objects["trainjobs"]


def test_what_an_earlier_job_met_does_not_count(server: KubernetesServer, tmp_path: Path) -> None:
    """Kubernetes keeps events for an hour: meanwhile the quota was raised, and the stage is tried again."""
    server.create_pods = False
    event = {
        "reason": "FailedCreate",
        "message": "exceeded quota: minitron",
        "involvedObject": {"name": f"{JOB}-node-0"},
    }
    server.add("events", "old", lastTimestamp="2000-01-01T00:00:00Z", **event)
    later(server, lambda: server.end("Complete"), 0.5)
    launch(tmp_path)


def test_of_a_node_that_was_restarted_the_last_pod_is_followed(server: KubernetesServer, tmp_path: Path) -> None:
    def restart() -> None:
        labels = server.objects["pods"][FIRST]["metadata"]["labels"]
        again = {"labels": labels, "creationTimestamp": "9999-12-31T00:00:00Z"}
        server.add("pods", f"{FIRST}-again", metadata=again, status={"phase": "Running"})
        server.say(f"{FIRST}-again", "second attempt")

    later(server, restart)
    later(server, lambda: server.end("Complete"), 0.6)
    launch(tmp_path)
    assert "second attempt" in (tmp_path / "add.log").read_text()


def test_an_image_that_cannot_be_pulled_gives_the_job_up(
    server: KubernetesServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainjob, "STUCK_SECONDS", 0.5)

    def refuse() -> None:
        waiting = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "registry/trainer:0.1.0"'}
        status = {"name": "node", "image": "i", "imageID": "", "ready": False, "restartCount": 0}
        server.objects["pods"][FIRST]["status"] = {
            "phase": "Pending", "containerStatuses": [status | {"state": {"waiting": waiting}}],
        }  # fmt: skip

    later(server, refuse)
    with pytest.raises(
        RunError, match=r"ImagePullBackOff in pod .*Back-off pulling image .*; correct the parameter image"
    ):
        launch(tmp_path)
    assert not server.objects["trainjobs"]


def test_a_pod_that_is_not_ready_has_no_log_yet(server: KubernetesServer, tmp_path: Path) -> None:
    later(server, lambda: server.objects["pods"][FIRST].update(status={"phase": "Pending"}), 0.1)
    later(server, lambda: server.objects["pods"][FIRST].update(status={"phase": "Running"}), 0.4)
    later(server, lambda: server.say(FIRST, "hello"), 0.5)
    later(server, lambda: server.end("Complete"), 0.8)
    launch(tmp_path)
    assert (tmp_path / "add.log").read_text() == "hello\n"


def test_a_canceled_step_deletes_its_job(server: KubernetesServer, tmp_path: Path) -> None:
    """SIGTERM to the process of a stage: the handler that entry.launch sets unwinds it."""
    program = (
        "from pathlib import Path\nfrom minitron.runtime.entry import _exit_on_signals\n"
        "from minitron.engines import trainjob\n"
        "_exit_on_signals()\ntrainjob.POLL_SECONDS = 0.1\n"
        f"trainjob.launch('{WORKER}', {{'job': 'add'}}, Path({str(tmp_path)!r}), 2, 1, '{KEY}')\n"
    )
    task = forks.start_python(["-c", program], tmp_path / "log", tmp_path / "log")
    wait_until(lambda: JOB in server.objects["trainjobs"] or task.exitcode)
    time.sleep(0.3)
    task.terminate()
    task.join(20)
    assert task.exitcode == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    assert not server.objects["trainjobs"] and not [pod for pod in server.objects["pods"] if pod.startswith(JOB)]


def test_outside_a_cluster_there_are_no_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINITRON_NAMESPACE", raising=False)
    with pytest.raises(ConfigError, match=r"num_nodes: several nodes need a cluster, but this process is not in a pod"):
        launch(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"Kubernetes: no access \(.*\); run it in a pod, or set KUBECONFIG"):
        kubernetes_api.core_api(kubernetes_api.RETRY)


@pytest.mark.parametrize("label", ["minitron.io/train-job-queue", "kueue.x-k8s.io/queue-name"])
def test_a_queued_job_waits_and_is_neither_failed_nor_lost(
    server: KubernetesServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], label: str
) -> None:
    server.objects["pods"]["distill-task"]["metadata"]["labels"][label] = "gpus"
    server.run_jobs = True
    seen: list[dict[str, Any]] = []
    later(server, lambda: (seen.append(server.job()), server.admit()), 0.6)
    launch(tmp_path)
    assert seen[0]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert "queue-name" not in json.dumps(seen[0]["spec"]), "Kueue suspends the job, and gates none of its pods"
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["3", "3"]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("TrainJob")]
    assert said[1:] == [
        f"TrainJob {JOB}: waiting in queue gpus; 'kubectl get workloads -n team' shows the reason",
        f"TrainJob {JOB}: starting",
    ]


def test_a_preempted_job_waits_again_and_resumes(
    server: KubernetesServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kueue ends the pods right after the state was read: a worker that lost the others first has left an error."""
    server.objects["pods"]["distill-task"]["metadata"]["labels"]["minitron.io/train-job-queue"] = "gpus"
    failure, get_state, preempted = tmp_path / "add.failure", trainjob._TrainJob.get_state, threading.Event()

    def get_state_and_preempt(train_job: Any, path: Path) -> str | None:
        state = get_state(train_job, path)
        if not preempted.is_set() and (log := tmp_path / "add.log").exists() and "step 1" in log.read_text():
            server.preempt()
            failure.write_text(json.dumps({"kind": "RuntimeError", "message": "Connection closed by peer"}))
            preempted.set()
        return state

    def resume() -> None:
        preempted.wait()
        while failure.exists():
            time.sleep(0.01)
        server.admit()
        server.say(FIRST, "step 2")

    monkeypatch.setattr(trainjob._TrainJob, "get_state", get_state_and_preempt)
    later(server, server.admit, 0.3)
    later(server, lambda: server.say(FIRST, "step 1"), 0.5)
    later(server, resume)

    def end() -> None:
        while "step 2" not in (tmp_path / "add.log").read_text():
            time.sleep(0.01)
        server.end("Complete")

    later(server, lambda: (preempted.wait(), end()))
    launch(tmp_path)
    out = capsys.readouterr().out
    assert out.count("waiting in queue gpus") == out.count(f"TrainJob {JOB}: starting") == 2
    assert (tmp_path / "add.log").read_text() == "step 1\nstep 2\n" and not failure.exists()
    assert sum(request.startswith("POST") for request in server.requests) == 1


def test_a_job_that_somebody_suspends_is_named(
    server: KubernetesServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later(server, server.preempt, 0.2)
    later(server, server.admit, 0.6)
    later(server, lambda: server.end("Complete"), 0.9)
    launch(tmp_path)
    assert f"TrainJob {JOB}: suspended, without a queue; " in capsys.readouterr().out


def _plain_job(name: str) -> dict[str, Any]:
    trainer = {"numNodes": 2, "numProcPerNode": 1, "command": ["true"]}
    return {"metadata": {"name": name}, "spec": {"runtimeRef": {"name": "torch-distributed"}, "trainer": trainer}}
