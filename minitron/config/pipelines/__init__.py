"""Compiled pipelines, the arguments of a run, and what its tasks ask a cluster for."""

from minitron.config.pipelines.arguments import (
    SETTINGS_PARAMETER,
    STOP_PARAMETER,
    Request,
    check_arguments,
    find_cluster_faults,
    read_request,
    read_run_plan,
)
from minitron.config.pipelines.compiled import (
    REGISTRY_VARIABLE,
    TOOLS,
    TRAINER,
    compiled_pipeline,
    default_argument,
    get_parameters,
    list_dags,
    list_stages,
    name_stage,
    names_registry,
)
from minitron.config.pipelines.pods import apply_cluster_config, list_pod_requests, queue_pods

__all__ = [
    "REGISTRY_VARIABLE",
    "SETTINGS_PARAMETER",
    "STOP_PARAMETER",
    "TOOLS",
    "TRAINER",
    "Request",
    "apply_cluster_config",
    "check_arguments",
    "compiled_pipeline",
    "default_argument",
    "find_cluster_faults",
    "get_parameters",
    "list_dags",
    "list_pod_requests",
    "list_stages",
    "name_stage",
    "names_registry",
    "queue_pods",
    "read_request",
    "read_run_plan",
]
