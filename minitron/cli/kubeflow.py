"""The commands that talk to a cluster: submit, schedule, unschedule, runs, doctor."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from minitron.cli.options import Debug, Host, Namespace, Pipeline, Presets, Settings, Token, app, one_line_errors
from minitron.cli.tables import print_table
from minitron.config.pipelines import (
    apply_cluster_config,
    check_arguments,
    compiled_pipeline,
    get_parameters,
    read_request,
)
from minitron.config.reference import help_text
from minitron.config.stages import StageConfig
from minitron.errors import ConfigError


@app.command(epilog=help_text())
def submit(
    pipeline: Pipeline,
    presets: Presets = None,
    settings: Settings = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end; fail when it fails.")] = False,
    host: Host = None,
    namespace: Namespace = None,
    token: Token = None,
    debug: Debug = False,
) -> None:
    """Run a pipeline on a cluster."""
    with one_line_errors(debug):
        documents, arguments, account = _for_cluster(pipeline, presets or [], settings or [])
        kubeflow = _connect(host, namespace, token)
        version = kubeflow.upload(pipeline, documents)
        run_id = kubeflow.submit(version, arguments, _experiment(arguments), account)
        print(f"started: run {run_id} of {pipeline} {version.name}\n{kubeflow.link(run_id)}", flush=True)
        if wait:
            kubeflow.wait(run_id)
            print(f"run {run_id}: succeeded")


@app.command()
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
    """Run a pipeline on a cluster again and again; the same command twice changes nothing, another one replaces it."""
    with one_line_errors(debug):
        from minitron.cluster import cron

        first = cron.first_time(expression)
        documents, arguments, account = _for_cluster(pipeline, presets or [], settings or [])
        name = name or "-".join([pipeline, *(Path(preset).stem for preset in (presets or [])[:1])])
        kubeflow = _connect(host, namespace, token)
        version = kubeflow.upload(pipeline, documents)
        changed = kubeflow.schedule(name, expression, version, arguments, _experiment(arguments), account)
        print(f"{'scheduled' if changed else 'unchanged'}: {name} runs {pipeline} {version.name} at {expression}")
        print(f"first: {first:%Y-%m-%d %H:%M:%S} UTC")


@app.command()
def runs(
    count: Annotated[int, typer.Option(min=1, max=200, help="How many.")] = 20,
    host: Host = None,
    namespace: Namespace = None,
    token: Token = None,
    debug: Debug = False,
) -> None:
    """List the newest runs and the schedules of a cluster."""
    with one_line_errors(debug):
        kubeflow = _connect(host, namespace, token)
        found, schedules = kubeflow.runs(count), kubeflow.schedules()
        rows = [
            [
                entry.display_name,
                (entry.state or "pending").lower(),
                _when(entry.created_at),
                _hours(entry),
                entry.run_id,
            ]
            for entry in found
        ]
        print_table(["run", "state", "started (UTC)", "hours", "id"], rows)
        if schedules:
            cells = [[entry.display_name, entry.trigger.cron_schedule.cron, entry.mode.lower()] for entry in schedules]
            print_table(["schedule", "cron (UTC)", "mode"], cells)


@app.command()
def unschedule(
    name: Annotated[str, typer.Argument(help="Name of the schedule.")],
    host: Host = None,
    namespace: Namespace = None,
    token: Token = None,
    debug: Debug = False,
) -> None:
    """Delete a schedule; runs that it started go on."""
    with one_line_errors(debug):
        _connect(host, namespace, token).unschedule(name)
        print(f"deleted: schedule {name}")


@app.command("doctor")
def check_cluster(
    host: Host = None,
    namespace: Namespace = None,
    token: Token = None,
    tracking_uri: Annotated[str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow server.")] = None,
    bucket: Annotated[str | None, typer.Option(help="gs://bucket[/prefix] that the tasks write to.")] = None,
    debug: Debug = False,
) -> None:
    """Check that a cluster has what the pipelines need, and say what to do where it has not."""
    with one_line_errors(debug):
        from minitron.cli import doctor

        checks = doctor.examine(lambda: _connect(host, namespace, token), namespace or "kubeflow", tracking_uri, bucket)
        print_table(["", "check", "found", "remedy"], [[check.mark, *check[1:]] for check in checks])
        if any(check.ok is False for check in checks):
            raise typer.Exit(1)


def _connect(host: str | None, namespace: str | None, token: str | None) -> Any:
    """Connect to Kubeflow Pipelines, with clients that the image of the tools does not have."""
    from minitron.cluster.pipelines_api import Kubeflow

    return Kubeflow(host, namespace, token)


def _for_cluster(
    pipeline: str, presets: list[str], settings: list[str]
) -> tuple[list[dict[str, Any]], dict[str, Any], str | None]:
    """Return the documents to upload, the arguments of the run and the account of its tasks, all checked."""
    documents = compiled_pipeline(pipeline)
    parameters = get_parameters(documents)
    request = read_request(presets, settings, parameters)
    arguments = request.arguments
    if request.samples:
        _refuse_samples(request.samples, arguments)
    for name in ("teacher", "corpus"):
        if not re.match(r"/|\w+:/", str(arguments.get(name, "/"))):
            raise ConfigError(
                f"{name}: {arguments[name]} is a path of this machine, which the cluster's tasks do not see; give "
                "gs://bucket/path, hf://org/name or a path in the workspace, /workspace/…"
            )
    account = request.cluster.service_account
    return apply_cluster_config(documents, request.cluster), check_arguments(request, parameters), account


def _refuse_samples(sample: str, arguments: dict[str, Any]) -> None:
    if missing := [name for name in ("teacher", "corpus") if name not in arguments]:
        wanted = " ".join(f"--set {name}=…" for name in missing)
        raise ConfigError(f"samples: {sample} are made on this machine, by minitron run; for a cluster add {wanted}")


def _experiment(arguments: dict[str, Any]) -> str:
    return arguments.get("experiment", StageConfig.model_fields["experiment"].default)


def _when(moment: Any) -> str:
    return f"{moment:%Y-%m-%d %H:%M}" if moment else ""


def _hours(entry: Any) -> str:
    finished = entry.finished_at
    return f"{(finished - entry.created_at).total_seconds() / 3600:.1f}" if finished and finished.year > 1970 else ""
