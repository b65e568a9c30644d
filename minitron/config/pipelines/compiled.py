"""Compiled pipelines: their documents, the images in them, and their tasks."""

import os
import re
from typing import Any

import yaml

from minitron import __version__
from minitron.config.document import (
    pipelines_directory,
)
from minitron.config.parse import suggest_name
from minitron.errors import ConfigError

REGISTRY_VARIABLE = "MINITRON_REGISTRY"
"""Environment variable that says where the images are: registry.example/path."""


IMAGES = ("trainer_image", "tools_image")


def compiled_pipeline(name: str) -> list[dict[str, Any]]:
    """Return the documents of a pipeline's checked-in YAML: the specification and the platform's.

    The defaults of the images are where MINITRON_REGISTRY says.

    Raises:
        ConfigError: there is no such pipeline.
    """
    path = pipelines_directory() / f"{name}.yaml"
    if not path.is_file():
        known = [file.stem for file in pipelines_directory().glob("*.yaml")]
        raise ConfigError(f"pipeline {name}: unknown; {suggest_name(name, known)}")
    documents = list(yaml.load_all(path.read_text(), yaml.CSafeLoader))  # ten times as fast as the Python loader
    for name, entry in get_parameters(documents).items():
        if name in IMAGES:
            entry["defaultValue"] = locate_image(entry["defaultValue"])
    return documents


def locate_image(image: str) -> str:
    """Return the name that one of our images has where MINITRON_REGISTRY says that they are."""
    registry = os.environ.get(REGISTRY_VARIABLE, "").rstrip("/")
    return f"{registry}/{image.rpartition('/')[2]}" if registry else image


TRAINER = locate_image(f"minitron-pipelines/trainer:{__version__}")
"""Built from images/trainer.Dockerfile: the NeMo image and this package. The registry is read when this is imported."""


TOOLS = locate_image(f"minitron-pipelines/tools:{__version__}")
"""Built from images/tools.Dockerfile, without torch and CUDA, for tasks that only move files and call servers."""


def names_registry(image: str) -> bool:
    """Whether an image's name says which registry it is in; else nodes ask Docker Hub, if they have not got it."""
    first, slash, _ = image.partition("/")
    return bool(slash) and (first == "localhost" or "." in first or ":" in first)


def get_parameters(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the parameters of a compiled pipeline by name."""
    return documents[0]["root"]["inputDefinitions"]["parameters"]


def default_argument(parameter: str) -> Any:
    """Return the default of a parameter of the pipeline `compress`."""
    return get_parameters(compiled_pipeline("compress"))[parameter]["defaultValue"]


def list_dags(specification: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the components of a pipeline that consist of tasks: the pipeline, its conditions and exit handlers."""
    return [part for part in [specification["root"], *specification["components"].values()] if "dag" in part]


def list_stages(specification: dict[str, Any]) -> list[str]:
    """Return the names of a pipeline's tasks that run a container, including those of nested pipelines."""
    components = specification["components"]
    return [
        name
        for dag in list_dags(specification)
        for name, task in dag["dag"]["tasks"].items()
        if "executorLabel" in components[task["componentRef"]["name"]]
    ]


def name_stage(task: str) -> str:
    """Return the stage of a task; the second task of a stage is STAGE-2."""
    return re.sub(r"-\d+$", "", task)
