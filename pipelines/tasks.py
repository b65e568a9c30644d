"""Set up the tasks of a pipeline for a cluster: resources, retries, image, volume, credentials, labels."""

import tempfile
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler, dsl, kubernetes

from minitron.config.settings import ClusterConfig

CLUSTER = ClusterConfig()

VOLUME = "/workspace"
"""Mount point of the shared volume: results by key, fetched models, checkpoints of work in progress. The volume
outlives the run, so that the next run finds them."""

CACHE = f"{VOLUME}/cache"
"""Directory of files fetched from a workspace in a bucket, and of work in progress."""

RETRY_PAUSE = "120s"
"""Time between two attempts. It does not grow, because Kubeflow cannot set a cap and doubling would reach days."""

RETRY_PERIOD = "2592000s"
"""30 days. Kubeflow's maximum back-off is Argo's maxDuration, counted from the start of the first attempt: with the
default of an hour, a stage lost in its second hour would not be tried again."""

CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "NGC_API_KEY")
"""Keys of the optional secret; the tasks get them as environment variables."""

TOOLS_CPU, TOOLS_MEMORY = "2", "8Gi"
"""Limits of the tasks that only move files and call servers."""

PULL_SECRET = "minitron-pull"
"""Default name of the secret for pulling private images; Kubernetes ignores a missing secret."""


def set_resources(task: dsl.PipelineTask, cpu: Any, memory: Any) -> None:
    """Limit a task's CPU and memory; without a request Kubernetes requests the limit."""
    task.set_cpu_limit(cpu).set_memory_limit(memory)


def set_gpus(task: dsl.PipelineTask, count: Any, tolerations: Any, node_selector: Any) -> None:
    """Set a task's GPUs and nodes; the count is text, because the backend drops a number."""
    task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(count)
    # /dev/shm, through which data loaders and NCCL pass tensors: the default of 64 MB ends in a bus error.
    kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=CLUSTER.shared_memory)
    kubernetes.add_toleration_json(task, tolerations)
    kubernetes.add_node_selector_json(task, node_selector)


def set_retries(task: dsl.PipelineTask) -> None:
    """Retry a task that fails or whose node is lost; it resumes from its checkpoint in the workspace.

    A pipeline cannot say which of the two is retried: manifests/kubeflow makes it both.
    """
    task.set_retry(CLUSTER.retries, backoff_duration=RETRY_PAUSE, backoff_factor=1, backoff_max_duration=RETRY_PERIOD)


def set_pod(task: dsl.PipelineTask, stage: str, image: Any, pull_secret: Any, secret: Any, claim: Any) -> None:
    """Set a task's pod: image, shared volume, credentials, labels, deadline."""
    task.set_container_image(image)
    kubernetes.set_image_pull_secrets(task, [pull_secret])
    kubernetes.mount_pvc(task, claim, VOLUME)
    task.set_env_variable("MINITRON_CACHE", CACHE)
    task.set_env_variable("HF_HOME", f"{CACHE}/huggingface")  # fetched by the first task, before a GPU waits for it
    kubernetes.use_secret_as_env(task, secret, {name: name for name in CREDENTIALS}, optional=True)
    kubernetes.add_pod_label(task, "app.kubernetes.io/part-of", "minitron")
    kubernetes.add_pod_label(task, "app.kubernetes.io/component", stage)
    kubernetes.set_timeout(task, CLUSTER.timeout_hours * 3600)
    # Kubeflow's own cache compares addresses, not what lies there; the stages compare content (`caching`).
    task.set_caching_options(False)


def write_compiled(pipeline: Any, path: Path) -> None:
    """Compile a pipeline, and write it like KFP, but with leaf lists and mappings on one line: half as long."""
    with tempfile.TemporaryDirectory() as directory:
        compiled = Path(directory) / path.name
        compiler.Compiler().compile(pipeline, str(compiled))
        text = compiled.read_text()
    comments = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    documents = yaml.load_all(text, yaml.CSafeLoader)
    body = yaml.dump_all(documents, Dumper=yaml.CSafeDumper, default_flow_style=None, width=120)
    path.write_text(comments + body)
