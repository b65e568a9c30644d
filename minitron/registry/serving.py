"""The KServe InferenceService of a registered version, as YAML; nothing is deployed.

    minitron serve-manifest models:/minitron@champion | kubectl apply --namespace minitron --filename -

KServe's runtime for `huggingface` loads a Hugging Face directory with vLLM. Another version gives another manifest.
"""

import re
from typing import TYPE_CHECKING, Any

import yaml

from minitron.config.pipelines import default_argument
from minitron.config.resources import BASE, BF16, Term, format_request
from minitron.errors import ConfigError
from minitron.registry import lineage
from minitron.registry.versions import get_tag, pin_version
from minitron.storage.bucket import is_bucket
from minitron.storage.layout import result_address, result_path
from minitron.tracking.client import connect, fail_fast, one_line_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

_READABLE = ("gs://", "s3://", "hdfs://", "webhdfs://")
"""Schemes of MLflow's storage that KServe 0.20 can read (python/storage/kserve_storage/kserve_storage.py)."""

_GPU, _GPU_GB, _WEIGHTS_SHARE = "nvidia.com/gpu", 80, 0.6
"""Memory of an H100, and the share of it for the weights; the rest is for vLLM's key-value cache."""


def render_service(uri: str, address: str, claim: str) -> str:
    """Return the manifest of the InferenceService of a version.

    Args:
        uri: the tracking server.
        address: models:/NAME/VERSION or models:/NAME@alias.
        claim: volume claim of the workspace, if the model is on a volume.

    Raises:
        ConfigError: stage register did not make the version, or KServe cannot read its files.
        RunError: MLflow cannot be reached, or has no such version or alias.
    """
    with one_line_errors(uri), fail_fast():
        pinned = pin_version(uri, address)
        name, _, number = pinned.removeprefix("models:/").rpartition("/")
        client = connect(uri)
        tags = client.get_model_version(name, number).tags
        if "parameters" not in tags or (student := get_tag(tags, lineage.STUDENT_TAG)) is None:
            raise ConfigError(
                f"{pinned}: no tags parameters and {lineage.STUDENT_TAG}; give a version that register made"
            )
        storage = _find_storage(client, pinned, claim)
    service = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": _make_name(name),
            "labels": {"app.kubernetes.io/part-of": "minitron", "app.kubernetes.io/version": number},
            "annotations": {"minitron.io/model": pinned, "minitron.io/student-sha256": student},
        },
        "spec": {"predictor": _make_predictor(storage, int(tags["parameters"]))},
    }
    return yaml.safe_dump(service, sort_keys=False, width=120)


def _make_predictor(storage: str, parameters: int) -> dict[str, Any]:
    """Return the predictor: its GPUs hold the weights and a key-value cache, its host memory the weights once."""
    weights = parameters * BF16
    gpus = 1
    while weights > gpus * _GPU_GB * 1e9 * _WEIGHTS_SHARE:
        gpus *= 2
    memory = format_request([Term("weights", weights), Term("the server", BASE)])
    resources = {"cpu": str(4 * gpus), "memory": memory, _GPU: str(gpus)}
    model: dict[str, Any] = {"modelFormat": {"name": "huggingface"}, "storageUri": storage}
    if gpus > 1:
        model["args"] = [f"--tensor-parallel-size={gpus}"]
    return {
        "tolerations": [{"key": _GPU, "operator": "Exists", "effect": "NoSchedule"}],
        "model": model | {"resources": {"requests": dict(resources), "limits": dict(resources)}},
    }


def _make_name(model: str) -> str:
    """Return a name that KServe accepts: [a-z]([-a-z0-9]*[a-z0-9])?, short enough for the host names made from it."""
    name = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    return (name if name[:1].isalpha() else f"model-{name}")[:50].strip("-")


def _find_storage(client: "MlflowClient", version: str, claim: str) -> str:
    """Return the address of a version's files for KServe: MLflow's, or that of the registered result."""
    name, _, number = version.removeprefix("models:/").rpartition("/")
    location = client.get_model_version_download_uri(name, number)
    if location.startswith(_READABLE):
        return location
    result = _find_result(lineage.read_lineage(client.tracking_uri, version))
    mount = default_argument("workspace")
    if result and is_bucket(result):
        return _find_directory(result)
    if result and result.startswith(f"{mount}/"):
        return f"pvc://{claim}{result.removeprefix(mount)}"
    raise ConfigError(
        f"{version}: KServe can read neither MLflow's files at {location} nor its result ({result or 'no workspace'}); "
        f"run the pipeline with a workspace in {mount} or a bucket, or start MLflow with "
        "--default-artifact-root gs://…, and register it again"
    )


def _find_result(origin: dict[str, Any]) -> str | None:
    """Return the address of the student's result, in the workspace of the stage that made it."""
    student = origin["stages"]["register"]["inputs"]["student"]["sha256"]
    for record in origin["stages"].values():
        if record.get("output_sha256") == student and (workspace := record["config"].get("workspace")):
            return f"{workspace.rstrip('/')}/{result_path(record['stage'], record['key'])}"
    return None


def _find_directory(result: str) -> str:
    """Return the address of a result's files in a bucket.

    Raises:
        ConfigError: the result is gone.
    """
    from minitron.storage import bucket_results

    record = bucket_results.read_record_at(result)
    if record is None:
        raise ConfigError(f"{result}: the result is gone; run the pipeline again, and register its student")
    return result_address(result, record)
