"""The checked-in pipeline in the images: six containers, one volume, a real MLflow server, a registered model."""

from pathlib import Path

import pytest
import torch
from docker.errors import DockerException
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron.config.pipelines import TOOLS, TRAINER
from minitron.config.stages import STAGES
from minitron.tracking.client import connect
from tests.images.cluster_support import USER, Cluster
from tests.images.podman_support import PYTHON


def test_the_pipeline_ends_in_a_registered_model(
    cluster: Cluster, mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    finished = cluster.run()
    assert finished.images == [TRAINER] * 5 + [TOOLS]
    assert {path.name for path in finished.results.iterdir()} == set(STAGES)
    written = [*finished.results.rglob("*"), *cluster.workspace.rglob("*")]
    assert {path.stat().st_uid for path in written} == {USER}
    _check_registered(mlflow_server, tmp_path)


def _check_registered(uri: str, directory: Path) -> None:
    """The version has its alias and its tags, and its directory is a student that loads and generates."""
    version = connect(uri).get_model_version_by_alias("tiny", "challenger")
    from mlflow.artifacts import download_artifacts

    student = download_artifacts("models:/tiny@challenger", dst_path=str(directory))
    model = AutoModelForCausalLM.from_pretrained(student)
    assert str(sum(parameter.numel() for parameter in model.parameters())) == version.tags["parameters"]
    tokens = AutoTokenizer.from_pretrained(student)("a b", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(tokens).logits).all()
    needs = Path(student, "requirements.txt").read_text()
    assert "transformers==4.57" in needs, "the versions of the image that trained it"


@pytest.mark.parametrize(
    ("image", "message"),
    [(PYTHON, "task 'prepare'|Task .*prepare"), ("minitron-pipelines/absent:0", "minitron-pipelines/absent:0")],
    ids=["without minitron", "not there"],
)
def test_an_image_that_cannot_run_the_task_leaves_no_result(cluster: Cluster, image: str, message: str) -> None:
    with pytest.raises((RuntimeError, ValueError, DockerException), match=message):
        cluster.run(trainer_image=image)
    assert not list(cluster.workspace.iterdir())
    assert not [path for path in cluster.results.rglob("*") if path.is_file()]
