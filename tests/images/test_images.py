"""What is in the images, and what is not."""

import json

import pytest

from minitron import __version__
from minitron.config.pipelines import TOOLS, TRAINER
from tests.images.podman_support import NEMO, found_in_image, in_image, inspect, packages, pip_settings, run

BOTH = pytest.mark.parametrize("image", [TRAINER, TOOLS])
BASE = ("torch", "transformers", "numpy", "nemo-toolkit", "megatron-core", "protobuf")


@BOTH
def test_the_image_holds_the_package_and_says_so(image: str) -> None:
    assert in_image(image, "minitron", "--version").strip() == __version__
    labels = inspect(image)["Labels"]
    assert labels["org.opencontainers.image.title"] == image.partition(":")[0]
    assert labels["org.opencontainers.image.version"] == image.partition(":")[2] == __version__
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


@BOTH
def test_the_user_is_not_root_and_has_a_home(image: str) -> None:
    script = "touch ~/.probe && id -u && id -g && pwd && ! touch /opt/probe 2> /dev/null"
    assert in_image(image, "sh", "-ec", script).split() == ["1000", "1000", "/home/minitron"]


def test_the_trainer_has_every_package_of_its_base_in_the_same_version() -> None:
    before, after = packages(NEMO), packages(TRAINER)
    assert {name: after.get(name) for name in before} == before
    assert set(BASE) <= {name.replace("_", "-") for name in before}
    assert before["numpy"] < "2" and before["transformers"] < "5" and before["protobuf"] < "6"


def test_the_tools_hold_neither_torch_nor_transformers() -> None:
    assert not {"torch", "transformers", "kubernetes"} & set(packages(TOOLS))
    assert not found_in_image(TOOLS, "(", "-iname", "libtorch*", "-o", "-iname", "libcuda*", ")")


@BOTH
def test_nothing_of_the_machine_that_built_it_is_in_the_image(image: str) -> None:
    history = json.loads(run("podman", "history", "--no-trunc", "--format", "json", image))
    written = json.dumps([history, inspect(image)])
    settings = {word for value in pip_settings().values() for word in value.split() if len(word) > 4}
    assert not {word for word in settings if word in written}
    assert not [line for line in inspect(image)["Config"]["Env"] if line.startswith(("PIP_", "SSL_", "HTTP"))]
    assert not found_in_image(image, "(", "-name", "pip.conf", "-o", "-name", ".netrc", ")", "-size", "+0")
    assert not [
        path for path in found_in_image(image, "-type", "f") if path.startswith(("/build/", "/tmp/", "/root/.cache/"))
    ]


@BOTH
def test_the_executor_needs_nothing_more(image: str) -> None:
    script = "_KFP_RUNTIME=true python3 -m kfp.dsl.executor_main --help"
    assert "--component_module_path" in in_image(image, "sh", "-ec", script)
