"""The commands for a cluster: submit, schedule, unschedule, runs, doctor."""

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from minitron.cli.options import (
    Debug,
    Host,
    Namespace,
    Pipeline,
    Presets,
    Settings,
    Token,
    Yes,
    app,
    example,
    one_line_errors,
)
from minitron.cli.tables import print_table
from minitron.config.parse import SectionError
from minitron.config.pipelines import (
    REGISTRY_VARIABLE,
    apply_cluster_config,
    check_arguments,
    compiled_pipeline,
    find_cluster_faults,
    get_parameters,
    list_pod_requests,
    names_registry,
    queue_pods,
    read_request,
    read_run_plan,
)
from minitron.config.reference import help_text
from minitron.config.resources import UNKNOWN, Models, PodRequest
from minitron.config.resources.estimate import find_labeled_faults
from minitron.config.settings import ClusterConfig
from minitron.config.stages import StageConfig
from minitron.errors import ConfigError, RunError

GPUS_UNASKED = 1
"""Most GPUs at a time that a run gets without confirmation: a first try needs one."""


@app.command(
    epilog=example(
        "minitron submit compress --preset llama-3.1-minitron-4b-width --set corpus=gs://bucket/text \\\n"
        "    --set tracking_uri=http://mlflow:5000 --host URL --yes --wait"
    )
    + f"\n\n{help_text()}"
)
def submit(
    pipeline: Pipeline,
    presets: Presets = None,
    settings: Settings = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end, and fail if the run fails.")] = False,
    yes: Yes = False,
    host: Host = None,
    namespace: Namespace = None,
    token: Token = None,
    debug: Debug = False,
) -> None:
    """Run a pipeline once on a cluster; it first shows what its tasks will ask for."""
    with one_line_errors(debug):
        run = _read_run(pipeline, presets or [], settings or [])
        kubeflow = _connect_kubeflow(host, namespace, token)
        kubeflow.check_version()
        _confirm_requests(run, yes)
        version = kubeflow.upload_pipeline(pipeline, apply_cluster_config(run.documents, run.cluster, kubeflow.release))
        run_id = kubeflow.submit(version, run.arguments, _experiment_name(run.arguments), run.cluster.service_account)
        print(f"started: run {run_id} of {pipeline} {version.name}\n{kubeflow.run_url(run_id)}", flush=True)
        if wait:
            _wait_for_end(kubeflow, run_id, run.documents[0], run.arguments)


@app.command(
    epilog=example(
        "minitron schedule retrain --preset llama-3.1-minitron-4b-width --set corpus=gs://bucket/text \\\n"
        "    --set tracking_uri=http://mlflow:5000 --cron '0 0 2 * * *' --name nightly --yes --host URL"
    )
)
def schedule(
    pipeline: Pipeline,
    expression: Annotated[
        str, typer.Option("--cron", help="Six fields, in UTC: second minute hour day month weekday.")
    ],
    presets: Presets = None,
    settings: Settings = None,
    name: Annotated[str | None, typer.Option(help="Name of the schedule; none: pipeline and first preset.")] = None,
    yes: Yes = False,
    host: Host = None,
    namespace: Namespace = None,
    token: Token = None,
    debug: Debug = False,
) -> None:
    """Run a pipeline on a cluster on a schedule. Idempotent; other settings replace the schedule of that name."""
    with one_line_errors(debug):
        from minitron.cluster import cron, pipelines_api

        first = cron.first_run_time(expression)
        run = _read_run(pipeline, presets or [], settings or [])
        name = name or "-".join([pipeline, *(Path(preset).stem for preset in (presets or [])[:1])])
        pipelines_api.check_schedule_name(name)
        kubeflow = _connect_kubeflow(host, namespace, token)
        kubeflow.check_version()
        _confirm_requests(run, yes)
        version = kubeflow.upload_pipeline(pipeline, apply_cluster_config(run.documents, run.cluster, kubeflow.release))
        account, experiment = run.cluster.service_account, _experiment_name(run.arguments)
        changed = kubeflow.schedule(name, expression, version, run.arguments, experiment, account)
        print(f"{'scheduled' if changed else 'unchanged'}: {name} runs {pipeline} {version.name} at {expression}")
        print(f"first: {first:%Y-%m-%d %H:%M:%S} UTC")


@app.command("runs", epilog=example("minitron runs --count 5 --host URL"))
def list_runs(
    count: Annotated[int, typer.Option(min=1, max=200, help="Number of runs.")] = 20,
    host: Host = None,
    namespace: Namespace = None,
    token: Token = None,
    debug: Debug = False,
) -> None:
    """List the newest runs and the schedules of a cluster."""
    with one_line_errors(debug):
        kubeflow = _connect_kubeflow(host, namespace, token)
        newest, schedules = kubeflow.list_runs(count), kubeflow.list_schedules()
        rows = [
            [
                entry.display_name,
                (entry.state or "pending").lower(),
                _format_time(entry.created_at),
                _format_hours(entry),
                entry.run_id,
            ]
            for entry in newest
        ]
        print_table(["run", "state", "started (UTC)", "hours", "id"], rows)
        if schedules:
            cells = [
                [
                    entry.display_name or entry.recurring_run_id,
                    _format_trigger(entry.trigger),
                    (entry.mode or "").lower(),
                ]
                for entry in schedules
            ]
            print_table(["schedule", "cron (UTC)", "mode"], cells)


@app.command(epilog=example("minitron unschedule nightly --host URL"))
def unschedule(
    name: Annotated[str, typer.Argument(help="Name of the schedule.")],
    host: Host = None,
    namespace: Namespace = None,
    token: Token = None,
    debug: Debug = False,
) -> None:
    """Delete a schedule; runs that it has started continue."""
    with one_line_errors(debug):
        _connect_kubeflow(host, namespace, token).unschedule(name)
        print(f"deleted: schedule {name}")


@app.command(
    "doctor",
    epilog=example(
        "minitron doctor --host URL --namespace minitron --tracking-uri http://mlflow:5000 \\\n"
        "    --bucket gs://bucket/results"
    ),
)
def check_cluster(
    host: Host = None,
    namespace: Namespace = None,
    token: Token = None,
    tracking_uri: Annotated[str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow server.")] = None,
    bucket: Annotated[str | None, typer.Option(help="gs://bucket[/prefix] that the tasks write to.")] = None,
    debug: Debug = False,
) -> None:
    """Check that a cluster has everything that the pipelines need, and print a remedy for each missing part."""
    with one_line_errors(debug):
        from minitron.cli import doctor

        def connect() -> Any:
            return _connect_kubeflow(host, namespace, token)

        checks = doctor.run_checks(connect, namespace or "kubeflow", tracking_uri, bucket)
        print_table(["", "check", "found", "remedy"], [[check.mark, *check[1:]] for check in checks])
        if any(check.ok is False for check in checks):
            raise typer.Exit(1)


def _connect_kubeflow(host: str | None, namespace: str | None, token: str | None) -> Any:
    """Connect to Kubeflow Pipelines. The tools image lacks its clients, hence the late import."""
    from minitron.cluster.pipelines_api import Kubeflow

    return Kubeflow(host, namespace, token)


@dataclass(frozen=True)
class _Run:
    """A run that can start.

    Attributes:
        documents: the compiled documents.
        arguments: the pipeline's checked arguments.
        cluster: what is written into the documents.
        requests: what the tasks ask for.
        nodes: labels of the nodes that tasks with GPUs run on.
        unknown: why the sizes of the models are not known; None if they are.
    """

    documents: list[dict[str, Any]]
    arguments: dict[str, Any]
    cluster: ClusterConfig
    requests: list[PodRequest]
    nodes: dict[str, str]
    unknown: str | None


def _read_run(pipeline: str, presets: list[str], settings: list[str]) -> _Run:
    """Read a run, and check it as far as possible on this machine."""
    documents = compiled_pipeline(pipeline)
    parameters = get_parameters(documents)
    request = read_request(presets, settings, parameters)
    if request.samples:
        _refuse_samples(request.samples, request.arguments)
    arguments = check_arguments(request, parameters)
    plan, models, unknown = read_run_plan(arguments), Models(), None
    faults = list(find_cluster_faults(plan, arguments, parameters))
    if plan:
        from minitron.runtime.preflight import check_plan, count_plan_models

        architecture, unknown = check_plan(plan, faults, ask_once=True)
        models = count_plan_models(plan, architecture)
        if architecture and (faults := find_labeled_faults(plan, models)):
            raise SectionError(faults)
    elif faults:
        raise SectionError(faults)
    if request.cluster.queue:
        documents = queue_pods(documents, request.cluster.queue, arguments)
    requests = list_pod_requests(documents, arguments, plan, models)
    nodes = plan.pipeline.gpu_node_selector if plan else {}
    return _Run(documents, arguments, request.cluster, requests, nodes, unknown or None)


def _confirm_requests(run: _Run, yes: bool) -> None:
    """Show what the tasks will ask for; more than GPUS_UNASKED GPUs at a time need confirmation.

    Raises:
        ConfigError: there is no terminal to ask for confirmation.
    """
    print_table(["task", "image", "nodes", "GPUs", "cpu", "memory"], [list(request) for request in run.requests])
    gpus = max(request.nodes * request.gpus for request in run.requests)
    labels = ", ".join(f"{key}={value}" for key, value in run.nodes.items())
    print(f"at most {_count_gpus(gpus)} at a time{f', on nodes with {labels}' if gpus and labels else ''}")
    if run.unknown:
        reason = run.unknown.partition("; ")[0]
        print(f"memory is for {UNKNOWN:,} parameters until plan knows the teacher's size: {reason}")
    for image in dict.fromkeys(request.image for request in run.requests if not names_registry(request.image)):
        print(
            f"warning: {image} names no registry, so only nodes that have it loaded (as on kind) can start it; else "
            f"set {REGISTRY_VARIABLE}, or trainer_image and tools_image"
        )
    sys.stdout.flush()
    if gpus <= GPUS_UNASKED or yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError(f"{_count_gpus(gpus)} at a time, so nothing was started; add --yes if you want them")
    typer.confirm(f"Ask for {_count_gpus(gpus)}?", abort=True)


def _count_gpus(gpus: int) -> str:
    return f"{gpus} GPU{'s' if gpus != 1 else ''}"


def _wait_for_end(kubeflow: Any, run_id: str, specification: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Follow a run to its end.

    Raises:
        RunError: the run did not succeed; the message has the reason.
    """
    from minitron.cluster import runs

    run = runs.follow_run(kubeflow, run_id, specification)
    if run.state == "SUCCEEDED":
        print(f"run {run_id}: succeeded")
        return
    reason = _find_reason(kubeflow, run_id, arguments) or (run.error and run.error.message)
    raise RunError(
        f"run {run_id}: {run.state.lower()}; {reason or 'Kubeflow gives no reason'}; see {kubeflow.run_url(run_id)}"
    )


def _find_reason(kubeflow: Any, run_id: str, arguments: dict[str, Any]) -> str | None:
    """Return the error that a failed run's stages logged to MLflow, else the pods' error; None if neither has one."""
    from minitron.cluster import runs

    uris = filter(None, (os.environ.get("MLFLOW_TRACKING_URI"), arguments["tracking_uri"]))
    sources = [partial(_ask_mlflow, uri, _experiment_name(arguments), run_id) for uri in uris]
    for ask in (*sources, partial(runs.find_pod_failure, kubeflow.tasks_namespace, run_id)):
        with suppress(Exception):  # a problem of MLflow or Kubernetes must not hide the run's failure
            if reason := ask():
                return reason
    return None


def _ask_mlflow(uri: str, experiment: str, run_id: str) -> str | None:
    from minitron.tracking.client import connect, fail_fast
    from minitron.tracking.pipeline_run import find_reason

    with fail_fast():
        return find_reason(connect(uri), experiment, run_id)


def _refuse_samples(sample: str, arguments: dict[str, Any]) -> None:
    if missing := [name for name in ("teacher", "corpus") if name not in arguments]:
        remedy = " ".join(f"--set {name}=…" for name in missing)
        raise ConfigError(f"samples: only minitron run can make the inputs of {sample}; for a cluster add {remedy}")


def _experiment_name(arguments: dict[str, Any]) -> str:
    return arguments.get("experiment", StageConfig.model_fields["experiment"].default)


def _format_trigger(trigger: Any) -> str:
    """Return when a schedule runs; a schedule that minitron did not make can be periodic, or have no trigger."""
    if trigger and trigger.cron_schedule:
        return trigger.cron_schedule.cron
    if trigger and trigger.periodic_schedule:
        return f"every {trigger.periodic_schedule.interval_second} s"
    return "never"


def _format_time(moment: Any) -> str:
    return f"{moment:%Y-%m-%d %H:%M}" if moment else ""


def _format_hours(entry: Any) -> str:
    finished = entry.finished_at
    return f"{(finished - entry.created_at).total_seconds() / 3600:.1f}" if finished and finished.year > 1970 else ""
