"""The compiled pipeline as a cluster runs it, on one machine: kfp.local's DockerRunner and a shared directory."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from docker.types import Mount
from kfp import components, local

from minitron.cli.local import adapt_to_local
from minitron.config.pipelines import check_arguments, compiled_pipeline, get_parameters, read_request
from tests.images.podman_support import run

USER = 1000
LOCAL = "localhost/"
"""What podman puts before the name of an image that comes from no registry."""


class Finished(NamedTuple):
    """A run of the pipeline: directory of the tasks' outputs, and the image that each container started from."""

    results: Path
    images: list[str]


class Cluster:
    """The compiled pipeline as a cluster runs it: every task in its image, with one volume at /workspace."""

    def __init__(self, directory: Path, tracking_uri: str) -> None:
        """Make the volume and the directory of outputs, both of them the images' user's."""
        self.workspace, self.results = directory / "workspace", directory / "results"
        self.workspace.mkdir()
        self.results.mkdir()
        for path in (self.workspace, self.results):
            os.chown(path, USER, USER)
        self._tracking_uri = tracking_uri

    def run(self, **values: Any) -> Finished:
        """Run the preset tiny, whose inputs the tasks make, with these arguments over it."""
        documents = compiled_pipeline("compress")
        arguments = self._arguments(documents, values)
        _name_images(documents[0], arguments)
        adapt_to_local(documents[0])
        local.init(self._runner(), pipeline_root=str(self.results))
        components.load_component_from_text(yaml.safe_dump_all(documents))(**arguments)
        (results,) = self.results.iterdir()
        return Finished(results, self._started_images())

    def _arguments(self, documents: list[dict[str, Any]], values: dict[str, Any]) -> dict[str, Any]:
        parameters = get_parameters(documents)
        given = {"tracking_uri": self._tracking_uri} | values
        return check_arguments(read_request(["tiny"], [], parameters, given), parameters)

    def _runner(self) -> local.DockerRunner:
        mounts = [Mount("/workspace", str(self.workspace), type="bind")]
        environment = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        labels = {"pipeline_root": str(self.results)}
        return local.DockerRunner(network_mode="host", mounts=mounts, environment=environment, labels=labels)

    def _started_images(self) -> list[str]:
        """Read off podman's events, those of other tests and users left out, what the containers were made from."""
        filters = ("--filter", "event=start", "--filter", f"label=pipeline_root={self.results}")
        events = run("podman", "events", "--stream=false", "--since", "24h", *filters, "--format", "json")
        return [json.loads(line)["Image"].removeprefix(LOCAL) for line in events.splitlines()]


def _name_images(specification: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Put the pipeline's arguments in the place of the images' placeholders: a cluster does, kfp.local does not."""
    defaults = specification["root"]["inputDefinitions"]["parameters"]
    for task in specification["root"]["dag"]["tasks"].values():
        label = specification["components"][task["componentRef"]["name"]]["executorLabel"]
        container = specification["deploymentSpec"]["executors"][label]["container"]
        name = container["image"].removeprefix("{{$.inputs.parameters['").removesuffix("']}}")
        parameter = task["inputs"]["parameters"][name]["componentInputParameter"]
        container["image"] = LOCAL + arguments.get(parameter, defaults[parameter]["defaultValue"])
