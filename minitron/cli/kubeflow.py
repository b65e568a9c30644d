"""The commands that talk to a cluster: submit, schedule, unschedule, runs, doctor."""

import os
from contextlib import suppress
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
    app,
    example,
    one_line_errors,
)
from minitron.cli.tables import print_table
from minitron.config.parse import SectionError
from minitron.config.pipelines import (
    apply_cluster_config,
    check_arguments,
    compiled_pipeline,
    find_cluster_faults,
    get_parameters,
    list_stages,
    queue_pods,
    read_request,
    read_run_plan,
)
from minitron.config.reference import help_text
from minitron.config.settings import ClusterConfig
from minitron.config.stages import StageConfig
from minitron.errors import ConfigError, RunError


@app.command(
    epilog=example(
        "minitron submit compress --preset llama-3.1-minitron-4b-width --set corpus=gs://bucket/text \\\n"
        "    --set tracking_uri=http://mlflow:5000 --host URL --wait"
    )
    + f"\n\n{help_text()}"
)
def submit(
    pipeline: Pipeline,
    presets: Presets = None,
    settings: Settings = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end; fail if the run fails.")] = False,
    host: Host = None,
    namespace: Namespace = None,
    token: Token = None,
    debug: Debug = False,
) -> None:
    """Run a pipeline once on a cluster."""
    with one_line_errors(debug):
        documents, arguments, cluster = _read_run(pipeline, presets or [], settings or [])
        kubeflow = _connect_kubeflow(host, namespace, token)
        kubeflow.check_version()
        version = kubeflow.upload_pipeline(pipeline, apply_cluster_config(documents, cluster, kubeflow.release))
        run_id = kubeflow.submit(version, arguments, _experiment_name(arguments), cluster.service_account)
        print(f"started: run {run_id} of {pipeline} {version.name}\n{kubeflow.run_url(run_id)}", flush=True)
        if wait:
            _wait_for_end(kubeflow, run_id, list_stages(documents[0]), arguments)


@app.command(
    epilog=example(
        "minitron schedule retrain --preset llama-3.1-minitron-4b-width --set corpus=gs://bucket/text \\\n"
        "    --set tracking_uri=http://mlflow:5000 --cron '0 0 2 * * *' --name nightly --host URL"
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
    host: Host = None,
    namespace: Namespace = None,
    token: Token = None,
    debug: Debug = False,
) -> None:
    """Run a pipeline on a cluster by a schedule. Idempotent; other settings replace the schedule of that name."""
    with one_line_errors(debug):
        from minitron.cluster import cron, pipelines_api

        first = cron.first_run_time(expression)
        documents, arguments, cluster = _read_run(pipeline, presets or [], settings or [])
        name = name or "-".join([pipeline, *(Path(preset).stem for preset in (presets or [])[:1])])
        pipelines_api.check_schedule_name(name)
        kubeflow = _connect_kubeflow(host, namespace, token)
        kubeflow.check_version()
        version = kubeflow.upload_pipeline(pipeline, apply_cluster_config(documents, cluster, kubeflow.release))
        account = cluster.service_account
        changed = kubeflow.schedule(name, expression, version, arguments, _experiment_name(arguments), account)
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
    """Delete a schedule; runs that it started continue."""
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
    """Check that a cluster has what the pipelines need, and print a remedy for everything that is missing."""
    with one_line_errors(debug):
        from minitron.cli import doctor

        def connect() -> Any:
            return _connect_kubeflow(host, namespace, token)

        checks = doctor.run_checks(connect, namespace or "kubeflow", tracking_uri, bucket)
        print_table(["", "check", "found", "remedy"], [[check.mark, *check[1:]] for check in checks])
        if any(check.ok is False for check in checks):
            raise typer.Exit(1)


def _connect_kubeflow(host: str | None, namespace: str | None, token: str | None) -> Any:
    """Connect to Kubeflow Pipelines; the image of the tools lacks its clients, hence the late import."""
    from minitron.cluster.pipelines_api import Kubeflow

    return Kubeflow(host, namespace, token)


def _read_run(
    pipeline: str, presets: list[str], settings: list[str]
) -> tuple[list[dict[str, Any]], dict[str, Any], ClusterConfig]:
    """Return the compiled documents, the checked arguments of the run, and what is written into the documents."""
    documents = compiled_pipeline(pipeline)
    parameters = get_parameters(documents)
    request = read_request(presets, settings, parameters)
    if request.samples:
        _refuse_samples(request.samples, request.arguments)
    arguments = check_arguments(request, parameters)
    plan = read_run_plan(arguments)
    faults = list(find_cluster_faults(plan, arguments, parameters))
    if plan:
        from minitron.runtime.preflight import check_plan

        check_plan(plan, faults, ask_once=True)
    elif faults:
        raise SectionError(faults)
    if request.cluster.queue:
        documents = queue_pods(documents, request.cluster.queue, arguments)
    return documents, arguments, request.cluster


def _wait_for_end(kubeflow: Any, run_id: str, stages: list[str], arguments: dict[str, Any]) -> None:
    """Follow a run to its end.

    Raises:
        RunError: the run did not succeed; the message has the reason.
    """
    from minitron.cluster import runs

    run = runs.follow_run(kubeflow, run_id, stages)
    if run.state == "SUCCEEDED":
        print(f"run {run_id}: succeeded")
        return
    reason = _find_reason(kubeflow, run_id, arguments) or (run.error and run.error.message)
    raise RunError(
        f"run {run_id}: {run.state.lower()}; {reason or 'Kubeflow gives no reason'}; see {kubeflow.run_url(run_id)}"
    )


def _find_reason(kubeflow: Any, run_id: str, arguments: dict[str, Any]) -> str | None:
    """Return what a failed run's stages told MLflow, else what its pods say; None if neither can be asked or knows."""
    from minitron.cluster import runs

    uris = filter(None, (os.environ.get("MLFLOW_TRACKING_URI"), arguments["tracking_uri"]))
    sources = [partial(_ask_mlflow, uri, _experiment_name(arguments), run_id) for uri in uris]
    for ask in (*sources, partial(runs.find_pod_failure, kubeflow.tasks_namespace, run_id)):
        with suppress(Exception):  # the run's failure is what is reported, whatever is wrong with MLflow or Kubernetes
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
    """Return when a schedule runs; others than minitron's can be periodic, or have no trigger at all."""
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
