"""Both images, built from nothing, and the compiled pipeline run in them up to a registered model.

They need root, podman, buildah, runc and debootstrap: `make test-images` installs them. What is built stays in podman's
storage, so that a second run takes two minutes.
"""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from minitron import __version__
from minitron.config.pipelines import TOOLS, TRAINER
from tests.images.cluster_support import Cluster
from tests.images.podman_support import DEBIAN, NEMO, PYTHON, build, configure, make_debian


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the configuration of pip and podman lies during the tests."""
    assert os.geteuid() == 0, "tests/images need root: debootstrap and podman without a registry"
    path = tmp_path_factory.mktemp("podman")
    configure(path)
    return path


@pytest.fixture(scope="session", autouse=True)
def images(directory: Path) -> None:
    """Build the images under their names in minitron/config/pipelines.py."""
    version = ("--build-arg", f"VERSION={__version__}")
    make_debian(directory)
    build(directory, "tests/images/base.Dockerfile", PYTHON, DEBIAN, "--target", "python")
    build(directory, "images/tools.Dockerfile", TOOLS, PYTHON, *version)
    build(directory, "tests/images/base.Dockerfile", NEMO, DEBIAN, "--target", "nemo")
    build(directory, "images/trainer.Dockerfile", TRAINER, NEMO, *version)


@pytest.fixture(scope="session")
def daemon(directory: Path, images: None) -> Iterator[None]:
    """Serve podman where docker-py looks for Docker."""
    socket = f"unix://{directory}/podman.sock"
    os.environ["DOCKER_HOST"] = socket
    with subprocess.Popen(["podman", "system", "service", "--time=0", socket]) as process:
        try:
            _wait_for_daemon()
            yield
        finally:
            process.terminate()


def _wait_for_daemon() -> None:
    for _ in range(100):
        try:
            docker.from_env().close()
            assert docker.from_env().ping()
            return
        except docker.errors.DockerException:
            time.sleep(0.1)
    raise TimeoutError("podman system service does not answer")


@pytest.fixture
def cluster(daemon: None, mlflow_server: str, tmp_path: Path) -> Cluster:
    """A cluster with an empty volume."""
    return Cluster(tmp_path, mlflow_server)
