"""`minitron submit --wait`: a line per stage, retries, and why a run failed: in MLflow, in its pods, or nowhere."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minitron.cluster import pipelines_api, runs
from minitron.tracking import pipeline_run
from minitron.tracking.client import connect, find_or_create_experiment
from tests.cluster.commands import JOB, run_minitron, run_ok, run_refused
from tests.servers.argo_workflow import Workflow
from tests.servers.http_server import CUT, HALF, Page, free_port, http_server
from tests.servers.kubeflow_server import KubeflowServer, kubeflow_server
from tests.servers.kubernetes_server import kubernetes_server

RETRAIN = ["retrain", *JOB[1:], "--set", "model_name=llama"]


@pytest.fixture(params=["2.15.0", "2.17.0"])
def server(request: pytest.FixtureRequest) -> Iterator[KubeflowServer]:
    """A server; 2.17.0's Argo makes more nodes of the same pipeline."""
    with kubeflow_server(version=request.param) as state:
        yield state


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither MLflow nor Kubernetes can be reached, unless a test starts one."""
    monkeypatch.setattr(pipelines_api, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(runs, "_ONCE", 0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("KF_PIPELINES_ENDPOINT", "MINITRON_NAMESPACE", "MINITRON_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def read_lines(shown: str) -> list[str]:
    """Return the lines about stages, without the time of day."""
    return [line[9:] for line in shown.splitlines() if line[:2].isdigit() and line[2] == ":"]


def do(call: str, *arguments: Any) -> Any:
    return lambda workflow: getattr(workflow, call)(*arguments)


def succeed(*stages: str) -> Any:
    def steps(workflow: Workflow) -> None:
        for stage in stages:
            workflow.start(stage)
            workflow.finish(stage)

    return steps


def test_a_run_is_followed_to_its_end_a_line_per_stage(server: KubeflowServer) -> None:
    server.steps = [lambda workflow: None, do("start", "plan"), do("finish", "plan"), do("start", "prepare")]
    server.steps += [
        lambda workflow: None,
        do("finish", "prepare"),
        succeed("finetune", "prune"),
        do("start", "distill"),
    ]
    server.steps += [do("finish", "distill"), succeed("evaluate", "register"), do("end")]
    shown = run_ok("submit", *JOB, "--host", server.url, "--wait")
    assert read_lines(shown) == [
        "plan: running", "plan: succeeded", "prepare: running", "prepare: succeeded", "finetune: succeeded",
        "prune: succeeded", "distill: running", "distill: succeeded", "evaluate: succeeded", "register: succeeded",
    ]  # fmt: skip
    assert shown.rstrip().endswith(": succeeded") and "executor" not in shown and "driver" not in shown


def test_the_attempts_at_a_stage_are_counted(server: KubeflowServer) -> None:
    server.steps = [succeed("plan"), do("start", "prepare"), do("retry", "prepare", "Error"), do("finish", "prepare")]
    server.steps += [
        do("start", "finetune"),
        do("retry", "finetune"),
        do("retry", "finetune"),
        do("finish", "finetune"),
    ]
    server.steps += [do("end")]
    assert read_lines(run_ok("submit", *JOB, "--host", server.url, "--wait")) == [
        "plan: succeeded", "prepare: running", "prepare: attempt 2", "prepare: succeeded",
        "finetune: running", "finetune: attempt 2", "finetune: attempt 3", "finetune: succeeded",
    ]  # fmt: skip


def test_each_candidate_of_a_search_has_its_own_line(server: KubeflowServer) -> None:
    """Four trials run at a time; each has attempts of its own, and those of the next round are others."""
    trials = [f"for-loop-1/trial/{number}" for number in range(4)]
    server.steps = [succeed("plan", "select", "prepare", "finetune")]
    server.steps += [*(do("start", trial) for trial in trials), do("retry", trials[1]), do("finish", trials[3])]
    server.steps += [do("retry", trials[1]), do("finish", trials[1]), do("finish", trials[0], "Failed")]
    server.steps += [do("finish", trials[2]), do("finish", "for-loop-1"), succeed("select-2")]
    server.steps += [do("start", "for-loop-2/trial/0"), do("fail_driver", "for-loop-2/trial/1"), do("end", "Failed")]
    done = run_minitron("submit", "search", *JOB[1:], "--set", "search.parameters=4e9", "--host", server.url, "--wait")
    lines = read_lines(done.stdout)
    assert [line for line in lines if not line.startswith("trial")] == [
        f"{name}: succeeded" for name in ("plan", "select", "prepare", "finetune", "select-2")
    ], done.output
    assert [line for line in lines if line.startswith("trial")] == [
        "trial 1 of round 1: running", "trial 2 of round 1: running", "trial 3 of round 1: running",
        "trial 4 of round 1: running", "trial 2 of round 1: attempt 2", "trial 4 of round 1: succeeded",
        "trial 2 of round 1: attempt 3", "trial 2 of round 1: succeeded", "trial 1 of round 1: failed",
        "trial 3 of round 1: succeeded", "trial 1 of round 2: running",
        "trial 2 of round 2: failed before it started, in Kubeflow's driver", "trial 1 of round 2: failed",
    ]  # fmt: skip


def test_the_stages_of_a_retraining_are_followed_inside_its_conditions(server: KubeflowServer) -> None:
    server.steps = [succeed("resolve"), do("start", "plan"), do("finish", "plan"), do("start", "prepare")]
    server.steps += [do("finish", "prepare"), do("fail_driver", "finetune"), do("finish", "exit-handler-1", "Failed")]
    server.steps += [succeed("conclude"), do("end", "Failed")]
    done = run_minitron("submit", *RETRAIN, "--host", server.url, "--wait")
    assert read_lines(done.stdout) == [
        "resolve: succeeded", "plan: running", "plan: succeeded", "prepare: running", "prepare: succeeded",
        "finetune: failed before it started, in Kubeflow's driver", "conclude: succeeded",
    ]  # fmt: skip
    assert done.exit_code == 1 and "failed; Kubeflow gives no reason; see http://" in done.stderr


def test_a_retraining_without_news_ends_well(server: KubeflowServer) -> None:
    server.steps = [succeed("resolve"), do("skip", "condition-2"), succeed("conclude"), do("end")]
    shown = run_ok("submit", *RETRAIN, "--host", server.url, "--wait")
    assert read_lines(shown) == ["resolve: succeeded", "conclude: succeeded"]


def fail_in_prune(server: KubeflowServer) -> None:
    server.steps = [succeed("plan", "prepare", "finetune"), do("start", "prune"), do("finish", "prune", "Failed")]
    server.steps += [do("end", "Failed")]


def wait_for_failure(server: KubeflowServer, *arguments: str) -> str:
    """Return the reason between the run's state and its address."""
    message = run_refused("submit", *JOB, *arguments, "--host", server.url, "--wait")
    (run_id,) = server.runs
    state, _, reason = message.removesuffix(f"; see {server.url}/#/runs/details/{run_id}").partition("; ")
    assert state == f"run {run_id}: failed"
    return reason


def test_why_a_stage_failed_is_read_in_mlflow(
    server: KubeflowServer, mlflow_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    client = connect(mlflow_server)
    experiment = find_or_create_experiment(client, tmp_path.name)

    def report(workflow: Workflow) -> None:
        (run_id,) = server.runs
        parent = client.create_run(experiment, tags={pipeline_run.RUN_TAG: run_id})
        tags = {
            pipeline_run.PARENT_TAG: parent.info.run_id,
            pipeline_run.ERROR_TAG: "ConfigError: hidden_size: too large",
        }
        client.create_run(experiment, tags=tags, run_name="prune")

    fail_in_prune(server)
    server.steps.insert(2, report)
    reason = wait_for_failure(server, "--set", f"experiment={tmp_path.name}")
    assert reason == "prune: ConfigError: hidden_size: too large"


@pytest.mark.parametrize(("recorded", "found"), [("resolve: no such corpus", True), (pipeline_run.NO_REASON, False)])
def test_what_conclude_recorded_is_the_reason_unless_it_has_none(
    mlflow_file: str, recorded: str, found: bool, tmp_path: Path
) -> None:
    client, name = connect(mlflow_file), tmp_path.name
    run = client.create_run(find_or_create_experiment(client, name), tags={pipeline_run.RUN_TAG: "run-1"})
    assert pipeline_run.find_reason(client, name, "run-1") is None
    pipeline_run.record_outcome(client, run.info.run_id, "failed", recorded)
    assert pipeline_run.find_reason(client, name, "run-1") == (recorded if found else None)
    assert pipeline_run.find_reason(client, name, "run-2") is pipeline_run.find_reason(client, "f", "run-1") is None


OUT_OF_MEMORY = {
    "name": "main", "image": "trainer", "imageID": "", "ready": False, "restartCount": 0,
    "state": {"terminated": {"reason": "OOMKilled", "exitCode": 137}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("log", "status", "reason"),
    [
        (["I1124 launch", "error: first", "    error: hidden_size: 128 is too large", "F1124 1 main.go:1] exit 2"], {},
         "prune: exit 2"),
        (["error: hidden_size: 128 is too large", "I1124 02:00 1 launcher.go:1] done"], {},
         "prune: hidden_size: 128 is too large"),
        ([], {"reason": "Evicted", "message": "The node was low on resource: memory."},
         "prune: Evicted: The node was low on resource: memory."),
        (["no word of an error"], {"containerStatuses": [OUT_OF_MEMORY]},
         "prune: OOMKilled: exit status 137"),
        ([], {}, "prune: its pod prune-2 failed"),
    ],
)  # fmt: skip
def test_without_mlflow_the_pod_that_failed_last_says_why(
    log: list[str], status: Any, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with kubeflow_server(multi_user=True) as server, kubernetes_server(tmp_path, monkeypatch) as kubernetes:

        def add_pods(workflow: Workflow) -> None:
            (run_id,) = server.runs
            for number, name in enumerate(("prune-1", "prune-2", "evaluate")):
                labels = {"pipeline/runid": run_id, "app.kubernetes.io/component": name.split("-")[0]}
                metadata = {"labels": labels, "creationTimestamp": f"2026-11-24T02:0{number}:00Z"}
                phase = {"phase": "Running" if name == "evaluate" else "Failed"}
                kubernetes.add("pods", name, metadata=metadata, status=phase | (status if name == "prune-2" else {}))
            kubernetes.add("pods", "other", metadata={"labels": {}}, status={"phase": "Failed"})
            kubernetes.say("prune-1", "error: of the first attempt")
            kubernetes.say("prune-2", *log)

        fail_in_prune(server)
        server.steps.insert(2, add_pods)
        assert wait_for_failure(server, "--namespace", "team") == reason


@pytest.mark.parametrize("forbidden", [{"pods"}, {"GET pods"}])
def test_where_pods_may_not_be_seen_kubeflow_gives_no_reason(
    server: KubeflowServer, forbidden: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with kubernetes_server(tmp_path, monkeypatch) as kubernetes:
        kubernetes.forbidden |= forbidden
        fail_in_prune(server)
        assert wait_for_failure(server, "--namespace", "team") == "Kubeflow gives no reason"


@pytest.mark.parametrize("config", ["{", "clusters: 3", "users: [{name: ann, user: {exec: {command: /none}}}]"])
def test_where_the_access_to_kubernetes_is_broken_kubeflow_gives_no_reason(
    server: KubeflowServer, config: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text(config)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    fail_in_prune(server)
    assert wait_for_failure(server) == "Kubeflow gives no reason"


@pytest.mark.parametrize(("status", "text"), [(200, "<html>Sign in</html>"), (500, "{}"), (403, "no")])
def test_where_something_else_answers_kubeflow_gives_no_reason(
    server: KubeflowServer, status: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with http_server(Page(status, text)) as page:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", page.url)
        fail_in_prune(server)
        assert wait_for_failure(server) == "Kubeflow gives no reason"


@pytest.mark.parametrize("faults", [[429, 500], [502, 503, 504], [CUT] * 6, [HALF]])
def test_a_server_that_is_away_for_a_while_is_waited_for(server: KubeflowServer, faults: list[int]) -> None:
    def fail(workflow: Workflow) -> None:
        server.faults = list(faults)

    server.steps = [do("start", "plan"), fail, do("finish", "plan"), do("end")]
    shown = run_ok("submit", *JOB, "--host", server.url, "--wait")
    assert ("; trying again" in shown) == (faults != [HALF]), "the client itself asks again after half an answer"
    assert read_lines(shown) == ["plan: running", "plan: succeeded"]


def test_a_server_that_stays_away_ends_the_wait(server: KubeflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines_api, "PATIENCE_SECONDS", 0.05)

    def fail(workflow: Workflow) -> None:
        server.faults = [500] * 1000

    server.steps = [fail]
    assert "refused (500): out of order" in run_refused("submit", *JOB, "--host", server.url, "--wait")
