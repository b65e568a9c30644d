"""Several nodes: a stage starts a TrainJob, whose nodes are processes of this machine, and waits for it."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import pytest

from minitron.engines.checkpoints import MARKER
from minitron.errors import ConfigError
from tests.nemo.nemo_support import (
    CUT,
    DISTILLATION,
    curves,
    distillation_curves_of_hf,
    run_distill,
    run_finetune,
    run_prune,
)
from tests.servers.kubernetes_server import KubernetesServer, cluster_of_a_task
from tests.servers.trainer_server import trainer_server


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    with cluster_of_a_task(tmp_path, monkeypatch) as state:
        state.run_jobs = True
        yield state


NODES = {"engine": "nemo", "num_nodes": 2, "gpus_per_node": 1, "tensor_parallel_size": 2}


def admit_and_preempt_once(server: KubernetesServer, workspace: Path, ended: Event) -> None:
    """Be Kueue: admit every job, and preempt the one that trains after its checkpoint."""
    preempted = False
    while not ended.wait(0.05):
        if any(job["spec"].get("suspend") for job in list(server.objects["trainjobs"].values())):
            time.sleep(0.5)  # the task sees that its job waits
            server.admit()
        elif not preempted and any(workspace.rglob(f"checkpoint-3/{MARKER}")):
            server.preempt()
            preempted = True


def test_two_nodes_give_the_curve_of_engine_hf(
    server: KubernetesServer,
    wide: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workspace = tmp_path / "workspace"
    data, teacher = (Path(shutil.copytree(path, workspace / path.name)) for path in (dataset, wide))
    run_prune(workspace / "student", data, teacher, **CUT)
    inputs = (data, teacher, workspace / "student")
    expected = run_distill(tmp_path / "hf", *inputs, **DISTILLATION)
    server.objects["pods"]["distill-task"]["metadata"]["labels"]["minitron.io/train-job-queue"] = "gpus"
    with trainer_server(tmp_path, monkeypatch) as trainer, monkeypatch.context() as task:
        server.variables = trainer.variables
        for name in trainer.variables:  # Trainer sets them in the nodes alone
            task.delenv(name)
        ended = Event()
        Thread(target=admit_and_preempt_once, args=(server, workspace, ended), daemon=True).start()
        record = run_distill(tmp_path / "nodes", *inputs, workspace=workspace, **DISTILLATION, **NODES)
        ended.set()
    for name, values in distillation_curves_of_hf(expected).items():
        assert curves(record)[name] == pytest.approx(values, rel=1e-3), name
    assert record["gpus"] == 2
    scored = record["metrics"]["teacher_validation_loss"]
    assert scored == pytest.approx(expected["metrics"]["teacher_validation_loss"], rel=1e-6)
    out = capsys.readouterr().out
    assert out.count("waiting in queue gpus") == out.count(": starting\n") == 3
    assert [row["step"] for row in record["history"] if "loss" in row] == list(range(1, 9)), "no step is there twice"
    assert trainer.statuses[-1]["progressPercentage"] == 100
    assert {"kl", "validation_loss"} <= {metric["name"] for metric in trainer.statuses[-1]["metrics"]}
    created = [request for request in server.requests if request.startswith("POST")]
    assert len(created) == 2 and not server.objects["trainjobs"], "one scores the teacher on one GPU, one trains"


def test_the_nodes_must_see_the_inputs(server: KubernetesServer, wide: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"outside the workspace .*, which is all that the nodes share; move it there"
    ):
        run_finetune(tmp_path / "out", dataset, wide, workspace=tmp_path / "workspace", **NODES)
    assert not any(request.startswith("POST") for request in server.requests)
