"""Several nodes: a stage starts a TrainJob, whose nodes are processes of this machine, and waits for it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from minitron.errors import ConfigError
from tests.nemo.nemo_support import CUT, curves, run_distill, run_finetune, run_prune
from tests.servers.kubernetes_server import KubernetesServer, cluster_of_a_task


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    with cluster_of_a_task(tmp_path, monkeypatch) as state:
        state.run_jobs = True
        yield state


NODES = {"engine": "nemo", "num_nodes": 2, "gpus_per_node": 1, "tensor_parallel_size": 2}


def test_two_nodes_give_the_curve_of_engine_hf(
    server: KubernetesServer, wide: Path, dataset: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "workspace"
    data, teacher = (Path(shutil.copytree(path, workspace / path.name)) for path in (dataset, wide))
    run_prune(workspace / "student", data, teacher, **CUT)
    inputs, weights = (data, teacher, workspace / "student"), {"cross_entropy_weight": 0.5, "temperature": 2.0}
    expected = run_distill(tmp_path / "hf", *inputs, **weights)
    record = run_distill(tmp_path / "nodes", *inputs, workspace=workspace, **weights, **NODES)
    for name, values in curves(expected).items():
        assert curves(record)[name] == pytest.approx(values, rel=1e-3), name
    assert record["gpus"] == 2
    scored = record["metrics"]["teacher_validation_loss"]
    assert scored == pytest.approx(expected["metrics"]["teacher_validation_loss"], rel=1e-6)
    created = [request for request in server.requests if request.startswith("POST")]
    assert len(created) == 2 and not server.objects["trainjobs"], "one scores the teacher on one GPU, one trains"


def test_the_nodes_must_see_the_inputs(server: KubernetesServer, wide: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lies outside the workspace .*, which is all that the nodes share"):
        run_finetune(tmp_path / "out", dataset, wide, workspace=tmp_path / "workspace", **NODES)
    assert not any(request.startswith("POST") for request in server.requests)
