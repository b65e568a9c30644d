"""`minitron submit`, `schedule`, `runs` and `unschedule` against a server that speaks Kubeflow Pipelines' API.

How a run is followed is in test_runs.py.
"""

import base64
import copy
import json
import os
import pty
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import yaml

from minitron import __version__
from minitron.cli import kubeflow
from minitron.cluster import pipelines_client
from minitron.cluster.cron import first_run_time
from minitron.config.pipelines import apply_cluster_config, compiled_pipeline, get_parameters, name_stage
from minitron.config.settings import ClusterConfig
from minitron.errors import ConfigError
from tests.cluster.commands import JOB, run_ok, run_refused, schedule_ok
from tests.constants import REPOSITORY
from tests.flows.commands import BIN, read_blocks, read_shell_lines
from tests.servers.http_server import Page, State, free_port, http_server
from tests.servers.kubeflow_server import KubeflowServer, kubeflow_server

NIGHTLY = ["schedule", *JOB, "--cron", "0 0 2 * * *", "--name", "nightly"]


@pytest.fixture
def server() -> Iterator[KubeflowServer]:
    with kubeflow_server() as state:
        yield state


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("KF_PIPELINES_ENDPOINT", "MINITRON_NAMESPACE", "MINITRON_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_a_run_is_of_a_version_that_is_uploaded_once(server: KubeflowServer) -> None:
    shown = run_ok("submit", *JOB, "--host", server.url)
    run_ok("submit", *JOB, "--host", server.url)
    assert len(server.pipelines) == 1 and len(server.runs) == 2
    names = {entry["display_name"] for entry in server.versions.values()}
    (version,) = (name for name in names if name.startswith(__version__))
    run = next(iter(server.runs.values()))
    assert f"started: run {run['run_id']} of compress {version}" in shown
    assert f"{server.url}/#/runs/details/{run['run_id']}" in shown
    parameters = run["runtime_config"]["parameters"]
    assert parameters["corpus"] == "gs://bucket/text"
    settings = parameters["settings"]
    assert settings["distill"]["learning_rate"] == 1e-4
    assert settings["gpu_node_selector"] == {"cloud.google.com/gke-spot": "true"}
    assert [entry["key"] for entry in settings["gpu_tolerations"]] == ["nvidia.com/gpu", "cloud.google.com/gke-spot"]


TINY = ["compress", "--preset", "tiny", "--set", "tracking_uri=http://mlflow.minitron:5000"]


def read_table(shown: str) -> dict[str, list[str]]:
    """Return the cells of the lines of the table, by their task."""
    return {line.split()[0]: line.split()[1:] for line in shown.splitlines() if "minitron-pipelines/" in line}


@pytest.mark.parametrize("command", [["submit", *JOB], NIGHTLY])
def test_what_the_tasks_ask_for_is_shown_before_they_start(server: KubeflowServer, command: list[str]) -> None:
    nodes = ["distill.num_nodes=2", "distill.gpus=0", "distill.memory=300Gi", "tools_image=r.io/tools:1"]
    shown = run_ok(*command, *(part for setting in nodes for part in ("--set", setting)), "--host", server.url)
    table, start = read_table(shown), shown.index("started: " if command[0] == "submit" else "scheduled: ")
    trainer = f"minitron-pipelines/trainer:{__version__}"
    assert table["prepare"] == [trainer, "1", "0", "8", "16Gi"]
    assert table["distill"] == [trainer, "2", "8", "64", "300Gi"]
    assert table["evaluate"] == [trainer, "1", "1", "8", "39Gi"]
    assert (
        "r.io/tools:1" in shown and "at most 16 GPUs at a time, on nodes with cloud.google.com/gke-spot=true" in shown
    )
    assert shown.index("task ") < shown.index("at most 16") < start


def test_more_than_one_gpu_needs_a_yes(server: KubeflowServer) -> None:
    for command in (["submit", *JOB], NIGHTLY):
        message = run_refused(*(part for part in command if part != "--yes"), "--host", server.url)
        assert message == "8 GPUs at a time, so nothing was started; add --yes if you want them"
    assert not server.pipelines and not server.runs and not server.schedules
    for gpus in (0, 1):
        shown = run_ok("submit", *TINY, "--set", f"distill.gpus={gpus}", "--host", server.url)
        assert f"at most {gpus} GPU{'' if gpus else 's'} at a time\n" in shown
    assert len(server.runs) == 2


@pytest.mark.parametrize(("answer", "status", "runs"), [("n", 1, 0), ("y", 0, 1)])
def test_at_a_terminal_it_asks(server: KubeflowServer, answer: str, status: int, runs: int) -> None:
    command = [BIN / "minitron", "submit", *(part for part in JOB if part != "--yes"), "--host", server.url]
    terminal, end = pty.openpty()
    with subprocess.Popen(command, stdin=end, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        os.write(terminal, f"{answer}\n".encode())
        shown = process.communicate()[0]
    assert "Ask for 8 GPUs? [y/N]: " in shown
    assert (process.returncode, len(server.runs)) == (status, runs), shown


def test_the_pipelines_page_says_what_each_parameter_of_the_form_is(server: KubeflowServer) -> None:
    """The form has names and types alone (frontend/src/components/NewRunParametersV2.tsx of 2.17.0)."""
    run_ok("submit", *TINY, "--host", server.url)
    (described,) = filter(None, (entry.get("description") for entry in server.versions.values()))
    first, *others = described.splitlines()
    assert first.startswith("- `tracking_uri` (required): MLflow server for the metrics and the model")
    assert len(others) == len(get_parameters(compiled_pipeline("compress"))) - 1
    assert not [line for line in others if "(required)" in line] and len(described) < 4000


PAGES = ("README.md", "docs/how-to/deploy.md", "docs/how-to/retrain-and-promote.md")
LINES = [
    line for page in PAGES for line in read_shell_lines(page) if line.startswith(("minitron submit", "minitron sch"))
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join(line.split()[1:5]))
def test_the_lines_of_readme_and_guides_start_what_they_show(
    server: KubeflowServer, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.default_account = "minitron"  # as the guide sets it
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model.yaml").write_text(read_blocks("README.md", "yaml")[0])
    if "my-model.yaml" in line and "corpus=" not in line:  # of a reader's preset, whose addresses a cluster can read
        line += " --set teacher=hf://org/my-llama --set corpus=gs://bucket/my-text"
    words = shlex.split(re.sub(r"URL|\$HOST", server.url, line))
    run_ok(*(word for word in words[1:] if word != "--wait"))  # nobody ends the run
    assert len(server.runs) == (words[1] == "submit") and len(server.schedules) == (words[1] == "schedule")


def test_an_image_without_a_registry_is_warned_of(server: KubeflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    warning = f"warning: minitron-pipelines/trainer:{__version__} names no registry, so only nodes that have it loaded"
    assert warning in run_ok("submit", *TINY, "--host", server.url)
    monkeypatch.setenv("MINITRON_REGISTRY", "registry.example/llm")
    shown = run_ok("submit", *TINY, "--host", server.url)
    assert "warning" not in shown and f"registry.example/llm/tools:{__version__}" in shown
    forms = [get_parameters([entry["pipeline_spec"]["pipeline_spec"]]) for entry in server.versions.values()]
    assert {form["trainer_image"]["defaultValue"].rpartition("/")[0] for form in forms} == {
        "minitron-pipelines",
        "registry.example/llm",
    }


def test_other_settings_of_the_pipeline_are_another_version(server: KubeflowServer) -> None:
    run_ok("submit", *JOB, "--host", server.url)
    run_ok(
        "submit",
        *JOB,
        "--host",
        server.url,
        "--set",
        "cluster.retries=1",
        "--set",
        "cluster.service_account=minitron",
    )
    assert len(server.pipelines) == 1
    versions = [entry for entry in server.versions.values() if entry["display_name"].startswith(__version__)]
    first, second = server.runs.values()
    assert len(versions) == 2
    assert (first["service_account"], second["service_account"]) == ("pipeline-runner", "minitron")


@pytest.mark.parametrize("release", [None, (2, 15, 0), (2, 16, 1), (2, 17, 0)])
def test_the_settings_that_are_no_parameters_are_put_into_the_pipeline(release: tuple[int, ...] | None) -> None:
    settings = ClusterConfig(shared_memory="64Gi", retries=9, timeout_hours=2, ttl_hours=1, labels={"team": "llm"})
    before = compiled_pipeline("compress")
    specification, platform = apply_cluster_config(copy.deepcopy(before), settings, release)
    kubernetes = platform["platforms"]["kubernetes"]
    for executor in kubernetes["deploymentSpec"]["executors"].values():
        assert executor["activeDeadlineSeconds"] == "7200"
        assert all(mount["sizeLimit"] == "64Gi" for mount in executor.get("emptyDirMounts", []))
        assert executor["podMetadata"]["labels"]["team"] == "llm"
    tasks = specification["root"]["dag"]["tasks"]
    assert {task["retryPolicy"]["maxRetryCount"] for name, task in tasks.items() if name != "plan"} == {9}
    assert apply_cluster_config(copy.deepcopy(before), ClusterConfig(), None) == before, "the defaults are compiled"


@pytest.mark.parametrize("pipeline", ["compress", "retrain", "search"])
def test_what_holds_gpus_waits_in_the_queue_and_nothing_else(pipeline: str) -> None:
    """A task that waits for its TrainJob holds no GPU, and would hold quota that the TrainJob needs."""
    several = ["engine=nemo", "distill.num_nodes=2", "distill.gpus=0", "prune.gpus=1", "finetune.gpus=8"]
    settings = [*several, "evaluate.gpus=0", "teacher=gs://b/t", "corpus=gs://b/c", "tracking_uri=http://m"]
    settings += ["search.parameters=1000000"]
    documents = kubeflow._read_run(pipeline, [], [*settings, "cluster.queue=team.gpus"]).documents
    before = kubeflow._read_run(pipeline, [], settings).documents
    executors, old = (
        found[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"] for found in (documents, before)
    )
    added = {
        name.removeprefix("exec-"): entry["podMetadata"]["labels"].items() - old[name]["podMetadata"]["labels"].items()
        for name, entry in executors.items()
    }
    assert {name_stage(task): dict(labels) for task, labels in added.items() if labels} == {
        "finetune": {"kueue.x-k8s.io/queue-name": "team.gpus"},
        "prune": {"kueue.x-k8s.io/queue-name": "team.gpus"},
        "distill": {"minitron.io/train-job-queue": "team.gpus"},
    } | ({"trial": {"kueue.x-k8s.io/queue-name": "team.gpus"}} if pipeline == "search" else {})


def test_a_pipeline_that_computes_nothing_has_no_queue() -> None:
    settings = ["model_name=m", "tracking_uri=http://m"]
    run = kubeflow._read_run("promote", [], [*settings, "cluster.queue=gpus"])
    assert run.documents == kubeflow._read_run("promote", [], settings).documents


@pytest.mark.parametrize("queue", ["GPUs", "gpus_1", "-gpus", "a..b", "", "a" * 64])
def test_a_queue_that_cannot_exist_is_refused(queue: str) -> None:
    message = f"cluster.queue: '{queue}' cannot be the name of a LocalQueue; give at most 63 lowercase letters"
    with pytest.raises(ConfigError, match=f"^{message}"):
        kubeflow._read_run("promote", [], ["model_name=m", "tracking_uri=http://m", f"cluster.queue='{queue}'"])


@pytest.mark.parametrize("command", [["submit", *JOB], NIGHTLY])
@pytest.mark.parametrize(
    ("version", "ttls"), [("2.15.0", 0), ("2.16.1", 0), ("master", 0), ("2.17.0", 3), ("2.18.0-rc.1", 3)]
)
def test_a_server_gets_the_life_times_that_it_knows_and_keeps_the_platform_document(
    command: list[str], version: str, ttls: int
) -> None:
    """A server before 2.17 would drop the document, and with it volumes, secrets and tolerations."""
    with kubeflow_server(version=version) as server:
        run_ok(*command, "--set", "cluster.ttl_hours=2", "--host", server.url)
    (uploaded,) = (entry for entry in server.versions.values() if entry["name"].startswith(__version__))
    kubernetes = uploaded["pipeline_spec"]["platform_spec"]["platforms"]["kubernetes"]
    assert list(kubernetes.get("pipelineConfig", {}).values()) == [7200] * ttls


@pytest.mark.parametrize("command", [["submit", *JOB], NIGHTLY])
@pytest.mark.parametrize("version", ["2.14.3", "2.5.0", "1.8.22", "v2.14.4-rc.1"])
def test_a_server_that_is_too_old_is_refused_before_anything_is_uploaded(command: list[str], version: str) -> None:
    with kubeflow_server(version=version) as server:
        message = run_refused(*command, "--host", server.url)
    assert message == (f"{server.url}: Kubeflow Pipelines {version}, but minitron needs 2.15.0 or newer; upgrade it")
    assert not server.pipelines


def test_scheduling_twice_changes_nothing(server: KubeflowServer) -> None:
    assert schedule_ok(*NIGHTLY, "--host", server.url).startswith("scheduled: nightly runs compress")
    before = copy.deepcopy((server.pipelines, server.versions, server.experiments, server.schedules))
    assert schedule_ok(*NIGHTLY, "--host", server.url).startswith("unchanged: nightly")
    assert (server.pipelines, server.versions, server.experiments, server.schedules) == before
    (schedule,) = server.schedules.values()
    assert schedule["trigger"]["cron_schedule"]["cron"] == "0 0 2 * * *" and schedule["mode"] == "ENABLE"
    assert schedule["no_catchup"] is True and str(schedule["max_concurrency"]) == "1"


@pytest.mark.parametrize(
    "change",
    [["--cron", "0 30 2 * * *"], ["--set", "distill.max_steps=31"], ["--set", "cluster.retries=1"]],
)
def test_a_changed_schedule_replaces_the_old_one(server: KubeflowServer, change: list[str]) -> None:
    run_ok(*NIGHTLY, "--host", server.url)
    (old,) = server.schedules
    assert schedule_ok(*NIGHTLY, *change, "--host", server.url).startswith("scheduled: nightly")
    (new,) = server.schedules
    assert new != old
    changes = [
        request for request in server.requests if request.startswith(("POST", "DELETE")) and "recurring" in request
    ]
    assert [request.split()[0] for request in changes] == ["POST", "POST", "DELETE"], "never without one"


def test_an_account_that_is_given_or_no_longer_given_changes_a_schedule() -> None:
    with kubeflow_server(version="2.17.0") as server:
        for account in ("minitron", "minitron", None, None, "pipeline-runner"):
            given = ["--set", f"cluster.service_account={account}"] if account else []
            run_ok(*NIGHTLY, *given, "--host", server.url)
            (schedule,) = server.schedules.values()
            assert schedule["service_account"] == account or not account
    assert sum(request.startswith("DELETE") for request in server.requests) == 2


def test_a_schedule_that_would_run_as_another_account_is_refused(server: KubeflowServer) -> None:
    run_ok(*NIGHTLY, "--host", server.url)
    before = copy.deepcopy(server.schedules)
    message = run_refused(*NIGHTLY, "--set", "cluster.service_account=minitron", "--host", server.url)
    assert message.startswith(
        "schedule nightly: Kubeflow Pipelines 2.15.0 gives it the service account pipeline-runner, not minitron;"
    )
    assert "DEFAULTPIPELINERUNNERSERVICEACCOUNT=minitron in its deployment" in message and server.schedules == before
    server.default_account = "minitron"
    run_ok(*NIGHTLY, "--set", "cluster.service_account=minitron", "--host", server.url)


@pytest.mark.parametrize("version", ["2.15.0", "2.16.1", "2.17.0"])
@pytest.mark.parametrize("name", ["a+b", "100%", "100%25", "team/nightly", "nächtlich", "a b", '"quoted"\\', "a&b=c"])
def test_a_name_with_any_character_is_found_again(version: str, name: str) -> None:
    command = [*NIGHTLY[:-1], name, "--set", f"experiment={json.dumps(name)}"]
    with kubeflow_server(version=version) as server:
        assert schedule_ok(*command, "--host", server.url).startswith(f"scheduled: {name} runs compress")
        assert schedule_ok(*command, "--host", server.url).startswith(f"unchanged: {name} runs compress")
        assert len(server.experiments) == len(server.pipelines) == len(server.schedules) == 1
        run_ok("unschedule", name, "--host", server.url)
        assert not server.schedules


def test_a_schedule_whose_name_is_alike_for_the_database_is_another_one(server: KubeflowServer) -> None:
    for name in ("nightly", "Nightly", "nightlý"):
        assert schedule_ok(*NIGHTLY[:-1], name, "--host", server.url).startswith("scheduled")
    assert len(server.schedules) == 3
    run_ok("unschedule", "Nightly", "--host", server.url)
    assert [entry["display_name"] for entry in server.schedules.values()] == ["nightly", "nightlý"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "x" * 256], "--name: 256 characters, but a schedule's name has 1 to 255"),
        (["--name", "Ä-nightly"], "--name Ä-nightly: Kubernetes refuses names that begin with '-'; begin it with a"),
        (["--set", f"experiment={'x' * 129}"], r"experiment: should match pattern '\S(.{0,126}\S)?' (found 'xxx"),
    ],
)
def test_a_name_that_the_server_would_not_take_is_refused(
    server: KubeflowServer, arguments: list[str], message: str
) -> None:
    assert run_refused(*NIGHTLY, *arguments, "--host", server.url).startswith(message)
    assert not server.requests


def test_a_schedule_that_was_switched_off_by_hand_is_made_again(server: KubeflowServer) -> None:
    run_ok(*NIGHTLY, "--host", server.url)
    next(iter(server.schedules.values()))["mode"] = "DISABLE"
    assert schedule_ok(*NIGHTLY, "--host", server.url).startswith("scheduled: nightly")
    assert [entry["mode"] for entry in server.schedules.values()] == ["ENABLE"]


def test_runs_and_schedules_are_listed_and_a_schedule_is_deleted(server: KubeflowServer) -> None:
    run_ok("submit", *JOB, "--host", server.url)
    run_ok(*NIGHTLY, "--host", server.url)
    run = next(iter(server.runs.values()))
    run |= {"state": "SUCCEEDED", "created_at": "2026-11-24T02:00:00Z", "finished_at": "2026-11-24T05:30:00Z"}
    shown = run_ok("runs", "--host", server.url)
    for text in (run["run_id"], "succeeded", "2026-11-24 02:00", "3.5", "nightly", "0 0 2 * * *"):
        assert text in shown
    assert run_refused("unschedule", "nightlee", "--host", server.url) == "nightlee: no such schedule; known: nightly"
    assert run_ok("unschedule", "nightly", "--host", server.url) == "deleted: schedule nightly\n"
    assert not server.schedules and "nightly" not in run_ok("runs", "--host", server.url)


def test_schedules_of_other_kinds_are_listed_and_no_page_is_left_out(server: KubeflowServer) -> None:
    server.add_schedule("hourly", trigger={"periodic_schedule": {"interval_second": "3600"}})
    server.add_schedule("without", mode="DISABLE", status="DISABLED")
    broken = server.add_schedule("broken")
    for key in broken.keys() - {"recurring_run_id"}:
        del broken[key]
    broken["error"] = {"code": 13, "message": "Runtime config was not parsed correctly"}
    for number in range(230):
        server.add_schedule(f"other-{number}", trigger={"cron_schedule": {"cron": "0 0 3 * * *"}})
    lines = [" ".join(line.split()) for line in run_ok("runs", "--host", server.url).splitlines()]
    assert {"hourly every 3600 s enable", "without never disable", f"{broken['recurring_run_id']} never"} <= set(lines)
    assert sum(line.startswith("other-") for line in lines) == 230
    assert "known: hourly, other-0," in run_refused("unschedule", "nightly", "--host", server.url)


def test_where_there_are_several_users_everything_is_in_the_namespace() -> None:
    with kubeflow_server(multi_user=True, token="secret") as server:
        access = ["--host", server.url, "--token", "secret"]
        assert run_refused("runs", *access).startswith("--namespace: missing; http://")
        run_ok("submit", *JOB, *access, "--namespace", "team")
        run_ok(*NIGHTLY, *access, "--namespace", "team")
        assert schedule_ok(*NIGHTLY, *access, "--namespace", "team").startswith("unchanged")
        assert {entry["namespace"] for entry in (*server.pipelines.values(), *server.experiments.values())} == {"team"}
        message = run_refused("runs", *access, "--namespace", "foreign")
        assert "not allowed (403): " in message and "User 'ann' is not authorized" in message
        assert "in the namespace foreign" in message


@pytest.mark.parametrize("token", [[], ["--token", "expired"]])
def test_a_token_that_is_refused_is_named(token: list[str]) -> None:
    with kubeflow_server(token="secret") as server:
        message = run_refused("submit", *JOB, "--host", server.url, *token)
    assert message.endswith("get a new one and give it with --token or MINITRON_TOKEN") and "refused (401)" in message


def test_a_host_that_does_not_answer_is_named() -> None:
    host = f"http://127.0.0.1:{free_port()}"
    assert (
        run_refused("runs", "--host", host) == f"{host}: no answer (Connection refused); check --host and the network"
    )


def test_a_page_that_is_not_kubeflows_is_told_apart() -> None:
    with http_server(Page(200, "<html>Sign in</html>")) as page:
        assert "answers, but is not the API of Kubeflow Pipelines" in run_refused("runs", "--host", page.url)


def test_outside_a_cluster_the_host_is_needed() -> None:
    assert run_refused("runs") == "--host: missing; give the URL of Kubeflow Pipelines, or set KF_PIPELINES_ENDPOINT"


def test_in_a_pod_neither_host_nor_token_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kfp.client import Client
    from kubernetes.config import incluster_config

    (tmp_path / "token").write_text("of-the-pod")
    monkeypatch.setattr(pipelines_client, "_IN_CLUSTER", tmp_path / "token")
    for name in ("SERVICE_TOKEN_FILENAME", "SERVICE_CERT_FILENAME"):
        monkeypatch.setattr(incluster_config, name, str(tmp_path / "token"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    with kubeflow_server(multi_user=True, token="of-the-pod") as server:
        monkeypatch.setattr(Client, "_IN_CLUSTER_DNS_NAME", server.url)
        run_ok("submit", *JOB, "--namespace", "team")
        assert len(server.runs) == 1


class _Google(State):
    """Google's token service: an access token, or one for the proxy's client."""

    def answer(self, method: str, path: str, query: dict[str, str], data: bytes, headers: Any) -> Any:
        claims = parse_qs(data.decode())["assertion"][0].split(".")[1]
        wanted = json.loads(base64.urlsafe_b64decode(claims + "=="))
        if wanted.get("target_audience") == "the-proxy":
            return {"id_token": "for-the-proxy"}
        return {"access_token": "x", "expires_in": 3600}


def test_behind_googles_proxy_the_service_accounts_token_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    monkeypatch.setenv("KF_PIPELINES_IAP_OAUTH2_CLIENT_ID", "the-proxy")
    with http_server(_Google()) as google, kubeflow_server(token="for-the-proxy") as server:
        account = {"type": "service_account", "client_email": "ci@example.com", "token_uri": f"{google.url}/token"}
        account |= {"private_key": key.decode(), "private_key_id": "1", "project_id": "p", "client_id": "1"}
        (tmp_path / "key.json").write_text(json.dumps(account))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
        monkeypatch.setattr("kfp.client.auth.OAUTH_TOKEN_URI", f"{google.url}/token")
        run_ok("submit", *JOB, "--host", server.url)
        (tmp_path / "key.json").unlink()
        message = run_refused("runs", "--host", server.url)
    assert "no token for its Identity-Aware Proxy (" in message and "GOOGLE_APPLICATION_CREDENTIALS" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "distill.max_step=3"], "distill.max_step: unknown key; did you mean 'distill.max_steps'?"),
        (["--set", "cluster.ttl_hour=3"], "cluster.ttl_hour: unknown key; did you mean 'ttl_hours'?"),
        (["--set", "cluster.shared_memory=16"], "cluster.shared_memory: Input should be a valid string"),
        (["--set", "corpus=text/a.jsonl"], "corpus: text/a.jsonl is a path on this machine"),
        (["--set", "corpus=./text"], "corpus: ./text is a path on this machine, which the cluster's tasks cannot see"),
        (
            ["--set", "evaluate.task_directory=tasks"],
            "evaluate.task_directory: tasks is a path on this machine, which ",
        ),
        (["--set", "champion=models"], "evaluate.champion: models is a path on this machine, which the cluster's"),
        (
            ["--set", "workspace=/data"],
            "workspace: /data is lost with each task's pod; give /workspace (the claim's volume)",
        ),
        (["--set", "workspace=/workspaces/x"], "workspace: /workspaces/x is lost with each task's pod; give"),
        (["--set", "evaluate.tasks=[mmluu]"], "evaluate.tasks: mmluu is not a task of lm-eval 0.4.13; give mmlu or "),
        (["--set", "corpus=s3://bucket/text"], "corpus: s3://bucket/text: unknown scheme 's3:'; give a path, hf://"),
        (
            ["--set", f"teacher={REPOSITORY / 'tests'}", "--set", "distill.temperature=yes"],
            "distill.temperature: found true (YAML also reads yes and on like this); ",
        ),
        (["--set", "distill.num_nodes=2"], "distill.gpus: 8, but with num_nodes 2 the task itself only waits"),
        (
            ["--set", "workspace_claim=''"],
            "workspace_claim: should match pattern '[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?' (found ''); its",
        ),
        (
            ["--set", "workspace_claim=team.workspace"],
            "workspace_claim: should match pattern '[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?' (found 'team.w",
        ),
        (["--set", "credentials_secret=''"], "credentials_secret: should match pattern "),
        (["--set", "image_pull_secret=My_Secret"], "image_pull_secret: should match pattern "),
        (["--set", "tools_image=''"], "tools_image: should match pattern "),
        (["--set", "trainer_image=''"], "trainer_image: should match pattern "),
        (["--set", "cluster.service_account=''"], "cluster.service_account: String should match pattern"),
        (["--set", "cluster.labels={team: large models}"], "cluster.labels.team: String should match pattern"),
        (["--set", "cluster.labels={-team: llm}"], "cluster.labels: '-team' cannot be a label; give at most 63"),
        (["--set", "experiment=''"], "experiment: should match pattern "),
        (["--set", "tracking_uri=''"], "tracking_uri: '' is not an MLflow server, which this pipeline needs; "),
        (
            ["--set", "tracking_uri=sqlite:////data/mlflow.db"],
            "tracking_uri: 'sqlite:////data/mlflow.db' is not an MLflow",
        ),
        (["--set", "tracking_uri=mlruns"], "tracking_uri: 'mlruns' is not an MLflow server, which this pipeline needs"),
        (["--set", "tracking_uri=http://:5000"], "tracking_uri: 'http://:5000' is not an MLflow server, which this"),
        (["--set", "tracking_uri=http://localhost:5000"], "tracking_uri: localhost is the task's own pod, not "),
        (["--set", "tracking_uri=https://ann:x@127.0.0.1"], "tracking_uri: 127.0.0.1 is the task's own pod, not"),
        (["--set", "tracking_uri=http://[::1]:5000"], "tracking_uri: [::1] is the task's own pod, not this mach"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(
    server: KubeflowServer, arguments: list[str], message: str
) -> None:
    for command in (["submit", *JOB], NIGHTLY):
        assert run_refused(*command, *arguments, "--host", server.url).startswith(message)
    assert not server.requests


def test_the_samples_of_packages_are_for_a_laptop(server: KubeflowServer) -> None:
    message = run_refused("submit", "compress", "--preset", "demo", "--host", server.url)
    assert message == (
        "samples: only minitron run can make the inputs of demo; for a cluster add --set teacher=… --set corpus=…"
    )


def test_what_the_server_refuses_is_one_line(server: KubeflowServer) -> None:
    server.faults = [200, 200, 200, 200, 500]
    assert "refused (500): out of order" in run_refused(*NIGHTLY, "--host", server.url)
    assert not server.schedules


@pytest.mark.parametrize("expression", ["0 0 2 * * *", "0 */15 8-18 * * MON-FRI", "0 0 0 1,15 * ?", "30 0 0 1 JAN *"])
def test_a_schedule_as_kubeflow_takes_it(expression: str) -> None:
    assert first_run_time(expression).year >= 2026


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("0 2 * * *", "5 fields, but Kubeflow needs six (second minute hour"),
        ("60 0 2 * * *", "second cannot be '60'"),
        ("0 61 2 * * *", "minute cannot be '61'"),
        ("0 0 25 * * *", "hour cannot be '25'"),
        ("0 0 2 0 * *", "day-of-month cannot be '0'"),
        ("0 0 2 L * *", "day-of-month cannot be 'L'"),
        ("0 0 2 * 13 *", "month cannot be '13'"),
        ("0 0 2 * * 7", "day-of-week cannot be '7'"),
        ("0 0 2 * * MON#1", "day-of-week cannot be 'MON#1'"),
        ("0 0 2 30 2 *", "no such day exists"),
        ("", "0 fields"),
    ],
)
def test_a_bad_schedule_names_its_field(expression: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        first_run_time(expression)
    assert message in str(caught.value)


def test_the_presets_for_gke_are_pods_own_terms() -> None:
    presets = REPOSITORY / "pipelines" / "presets"
    for path in presets.glob("gke-*.yaml"):
        values = yaml.safe_load(path.read_text())
        assert {"key", "operator", "effect"} <= values["gpu_tolerations"][0].keys()
        assert all(isinstance(value, str) for value in values["gpu_node_selector"].values())
