"""The `minitron` command.

Run a compiled pipeline on this machine: `minitron run compress --preset demo --work-dir runs/demo`. On a cluster:
`minitron submit compress --preset llama-3.1-minitron-4b-width --set corpus=gs://bucket/text --host URL --wait`.
"""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from minitron import __version__, local, samples, summary
from minitron.config.pipelines import (
    SETTINGS_PARAMETER,
    checked_arguments,
    compiled_pipeline,
    configured,
    parameters_of,
    read_request,
)
from minitron.config.reference import help_text
from minitron.config.settings import RESOURCES, GpuResources
from minitron.config.stages import StageConfig
from minitron.errors import ConfigError, MinitronError

if TYPE_CHECKING:
    from minitron.registry.promotion import Promotion

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help texts have brackets of their own: gs://bucket[/prefix]
)

Pipeline = Annotated[str, typer.Argument(help="Pipeline: compress, retrain or promote.")]
Presets = Annotated[
    list[str] | None,
    typer.Option("--preset", help="Preset that ships with the package, or a YAML file; later ones win."),
]
Settings = Annotated[list[str] | None, typer.Option("--set", help="key=value over the presets; repeatable.")]
Host = Annotated[
    str | None, typer.Option(envvar="KF_PIPELINES_ENDPOINT", help="URL of Kubeflow Pipelines; none: in its cluster.")
]
Namespace = Annotated[str | None, typer.Option(envvar="MINITRON_NAMESPACE", help="Namespace in which the tasks run.")]
Token = Annotated[str | None, typer.Option(envvar="MINITRON_TOKEN", help="Bearer token, if the server wants one.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Version = Annotated[str, typer.Argument(help="models:/NAME/VERSION or models:/NAME@alias of MLflow's registry.")]
RegisteredModel = Annotated[str, typer.Argument(help="Registered model.")]
Why = Annotated[str | None, typer.Option(help="Reason, for whoever reads the ledger of promotions.")]
TrackingUri = Annotated[str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow server of the registry.")]


def main() -> None:
    """Run the command; the entry point `minitron`."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    """Compress a large language model: prepare → finetune → prune → distill → evaluate → register."""


@app.command(epilog=help_text())
def run(
    pipeline: Pipeline,
    presets: Presets = None,
    settings: Settings = None,
    work_dir: Annotated[Path, typer.Option(help="Inputs, results, tracking and summary of the run.")] = Path("runs"),
    debug: Debug = False,
) -> None:
    """Run a pipeline on this machine; run it again to resume it and to reuse what is finished."""
    with _one_line(debug):
        _run(pipeline, presets or [], settings or [], work_dir.absolute())


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
    with _one_line(debug):
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
    with _one_line(debug):
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
    with _one_line(debug):
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
        _print_table(["run", "state", "started (UTC)", "hours", "id"], rows)
        if schedules:
            cells = [[entry.display_name, entry.trigger.cron_schedule.cron, entry.mode.lower()] for entry in schedules]
            _print_table(["schedule", "cron (UTC)", "mode"], cells)


@app.command()
def unschedule(
    name: Annotated[str, typer.Argument(help="Name of the schedule.")],
    host: Host = None,
    namespace: Namespace = None,
    token: Token = None,
    debug: Debug = False,
) -> None:
    """Delete a schedule; runs that it started go on."""
    with _one_line(debug):
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
    with _one_line(debug):
        from minitron import doctor

        checks = doctor.examine(lambda: _connect(host, namespace, token), namespace or "kubeflow", tracking_uri, bucket)
        _print_table(["", "check", "found", "remedy"], [[check.mark, *check[1:]] for check in checks])
        if any(check.ok is False for check in checks):
            raise typer.Exit(1)


@app.command("lineage")
def show_lineage(version: Version, tracking_uri: TrackingUri, debug: Debug = False) -> None:
    """Show where a registered model comes from: data, models, settings, versions, cost, from MLflow alone."""
    with _one_line(debug):
        from minitron.registry import lineage

        _console().print(lineage.tree(lineage.of_version(tracking_uri, version)))


@app.command()
def reproduce(
    version: Version,
    tracking_uri: TrackingUri,
    output: Annotated[Path | None, typer.Option(help="Preset to write; none: print it.")] = None,
    debug: Debug = False,
) -> None:
    """Write the preset that runs a registered model's pipeline again, with all its settings."""
    with _one_line(debug):
        from minitron.registry import lineage, reproduce

        text = reproduce.preset(lineage.of_version(tracking_uri, version))
        if output is None:
            print(text, end="")
            return
        try:
            output.write_text(text)
        except OSError as error:
            raise ConfigError(f"--output {output}: {error.strerror}; give a file in an existing directory") from error
        print(f"written: {output}; run it: minitron run {reproduce.PIPELINE} --preset {output}")


@app.command("promote")
def make_champion(
    name: RegisteredModel,
    tracking_uri: TrackingUri,
    version: Annotated[int | None, typer.Option(min=1, help="Its number; none: the challenger's.")] = None,
    why: Why = None,
    debug: Debug = False,
) -> None:
    """Make a version the champion, if it meets its gates; the present champion becomes the previous one."""
    with _one_line(debug):
        from minitron.registry.promotion import promote

        _print_promotion(promote(tracking_uri, name, version, why))


@app.command("rollback")
def take_back(name: RegisteredModel, tracking_uri: TrackingUri, why: Why = None, debug: Debug = False) -> None:
    """Make the previous version the champion again; the present champion becomes the previous one."""
    with _one_line(debug):
        from minitron.registry.promotion import rollback

        _print_promotion(rollback(tracking_uri, name, why))


@contextlib.contextmanager
def _one_line(debug: bool) -> Iterator[None]:
    """End a failure with one line and its exit status."""
    try:
        yield
    except MinitronError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_status) from None


def _connect(host: str | None, namespace: str | None, token: str | None) -> Any:
    """Connect to Kubeflow Pipelines, with clients that the image of the tools does not have."""
    from minitron.cluster.pipelines_api import Kubeflow

    return Kubeflow(host, namespace, token)


def _run(pipeline: str, presets: list[str], settings: list[str], work_dir: Path) -> None:
    documents = compiled_pipeline(pipeline)
    parameters = parameters_of(documents)
    request = read_request(presets, settings, parameters, _laptop(parameters, work_dir))
    if request.samples:
        paths = samples.paths(request.samples, work_dir / "inputs")
        request = request.with_defaults({name: str(path) for name, path in paths.items()}, parameters)
    arguments = checked_arguments(request, parameters)
    if request.samples:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        samples.build(request.samples, work_dir / "inputs")
    results = local.run_pipeline(documents, arguments, work_dir)
    summary.write(pipeline, results, work_dir, arguments["tracking_uri"])


def _laptop(parameters: dict[str, Any], work_dir: Path) -> dict[str, Any]:
    """Return what this machine has instead of a cluster's: a file for MLflow, no NeMo and no GPUs."""
    here: dict[str, Any] = {"tracking_uri": os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{work_dir}/mlflow.db"}
    if SETTINGS_PARAMETER in parameters:
        here["engine"] = "hf"
        here |= {f"{stage}.gpus": 0 for stage, usual in RESOURCES.items() if isinstance(usual, GpuResources)}
    return here


def _for_cluster(
    pipeline: str, presets: list[str], settings: list[str]
) -> tuple[list[dict[str, Any]], dict[str, Any], str | None]:
    """Return the documents to upload, the arguments of the run and the account of its tasks, all checked."""
    documents = compiled_pipeline(pipeline)
    parameters = parameters_of(documents)
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
    return configured(documents, request.cluster), checked_arguments(request, parameters), account


def _refuse_samples(sample: str, arguments: dict[str, Any]) -> None:
    if missing := [name for name in ("teacher", "corpus") if name not in arguments]:
        wanted = " ".join(f"--set {name}=…" for name in missing)
        raise ConfigError(f"samples: {sample} are made on this machine, by minitron run; for a cluster add {wanted}")


def _experiment(arguments: dict[str, Any]) -> str:
    return arguments.get("experiment", StageConfig.model_fields["experiment"].default)


def _print_promotion(done: "Promotion") -> None:
    if (move := done.move) is None:
        print(f"nothing moved: version {done.version} of {done.name} is the champion already")
        return
    moved = [["champion", move.source or "none", move.to], ["previous", "", move.source or "none"]]
    _print_table([done.name, "from version", "to version"], moved)
    print(f"by {move.who} at {move.when}" + (f": {move.why}" if move.why else ""))
    if done.gates:
        _console().print(summary.gates_table(done.gates))


def _print_table(columns: list[str], rows: list[list[Any]]) -> None:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    _console().print(table)


def _console() -> Console:
    return summary.make_console(200)


def _when(moment: Any) -> str:
    return f"{moment:%Y-%m-%d %H:%M}" if moment else ""


def _hours(entry: Any) -> str:
    finished = entry.finished_at
    return f"{(finished - entry.created_at).total_seconds() / 3600:.1f}" if finished and finished.year > 1970 else ""
