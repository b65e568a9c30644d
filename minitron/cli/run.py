"""The commands `minitron plan`, which says what a run needs, and `minitron run`: a pipeline on this machine."""

import json
import os
import shlex
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from minitron.cli import demo_inputs, local, summary, tables
from minitron.cli.options import Debug, Pipeline, Presets, Settings, app, example, one_line_errors
from minitron.config.addresses import find_missing_paths
from minitron.config.document import Plan
from minitron.config.parse import SectionError
from minitron.config.pipelines import (
    SETTINGS_PARAMETER,
    STOP_PARAMETER,
    check_arguments,
    compiled_pipeline,
    get_parameters,
    read_request,
    read_run_plan,
)
from minitron.config.reference import help_text
from minitron.config.resources.estimate import describe_estimate, estimate_run, find_memory_faults, recommend
from minitron.config.resources.gpus import CPU, DEFAULT_GPU, find_gpu, find_labeled_gpu
from minitron.config.settings import RESOURCES, GpuResources
from minitron.errors import ConfigError, without_password
from minitron.storage.files import disk_errors


@app.command(
    epilog=example("minitron run compress --preset tiny --set distill.max_steps=80 --work-dir runs/tiny")
    + f"\n\n{help_text()}"
)
def run(
    pipeline: Pipeline,
    presets: Presets = None,
    settings: Settings = None,
    work_dir: Annotated[Path, typer.Option(help="Directory of the run: inputs, results, tracking, summary.")] = Path(
        "runs"
    ),
    debug: Debug = False,
) -> None:
    """Run a pipeline on this machine; the same command again resumes it and reuses finished stages."""
    try:
        with one_line_errors(debug):
            _run_locally(pipeline, presets or [], settings or [], work_dir.absolute())
    except typer.Exit as end:
        if end.exit_code != ConfigError.exit_status:
            _print_command()
        raise


@app.command(epilog=example("minitron plan --preset llama-3.1-minitron-4b-width --gpu h100-80gb"))
def plan(
    presets: Presets = None,
    settings: Settings = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Kind of GPU, such as a100-80gb, or cpu; none: the node selector's, or h100-80gb."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    debug: Debug = False,
) -> None:
    """Say what a run needs (memory, disk, hours) and which settings fit best; nothing starts.

    It fails if a stage does not fit, and says what would.
    """
    with one_line_errors(debug):
        _plan(presets or [], settings or [], gpu, as_json)


def _plan(presets: list[str], settings: list[str], kind: str | None, as_json: bool) -> None:
    from minitron.runtime.preflight import check_plan, count_plan_models

    gpu = find_gpu(kind) if kind else None
    if kind == CPU:
        stages = [stage for stage, entry in RESOURCES.items() if isinstance(entry, GpuResources)]
        settings = [*settings, *(f"{stage}.gpus=0" for stage in stages), "finetune.num_nodes=1", "distill.num_nodes=1"]
    parameters = get_parameters(compiled_pipeline("compress"))
    defaults = {"tracking_uri": "sqlite:///mlflow.db", "corpus": "corpus"}  # nothing is read or written
    request = read_request(presets, settings, parameters, defaults)
    if request.samples:
        request = request.with_defaults({"teacher": request.samples}, parameters)
    run_plan = read_run_plan(check_arguments(request, parameters))
    assert run_plan
    if not gpu and kind != CPU:
        gpu = find_labeled_gpu(run_plan.pipeline.gpu_node_selector) or DEFAULT_GPU
    architecture, unknown = demo_inputs.TEACHERS.get(run_plan.pipeline.teacher), ""
    if not architecture:
        architecture, unknown = check_plan(run_plan, ask_once=True)
    models = count_plan_models(run_plan, architecture)
    estimates, advice = estimate_run(run_plan, models, gpu), recommend(run_plan, models, gpu) if gpu else None
    faults = list(find_memory_faults(run_plan, models, gpu)) if gpu else []
    if as_json:
        print(json.dumps(describe_estimate(models, gpu, estimates, advice, faults), indent=2))
    else:
        tables.print_plan(models, gpu, estimates, advice)
    if unknown:
        print(f"warning: sizes are those of Llama-3.1-8B, until the teacher can be read: {unknown}", file=sys.stderr)
    if faults:
        raise SectionError(faults)


def _print_command() -> None:
    """Print the command that continues the run: this command, unless it has a password."""
    command = shlex.join(["minitron", *sys.argv[1:]])
    shown = command if without_password(command) == command else "the same command again"
    print(f"continue: {shown}", file=sys.stderr, flush=True)


def _run_locally(pipeline: str, presets: list[str], settings: list[str], work_dir: Path) -> None:
    documents = compiled_pipeline(pipeline)
    parameters = get_parameters(documents)
    defaults = _local_defaults(parameters, work_dir)
    request = read_request(presets, settings, parameters, defaults)
    if request.samples:
        paths = demo_inputs.input_paths(request.samples, work_dir / "inputs")
        request = request.with_defaults({name: str(path) for name, path in paths.items()}, parameters)
    arguments = check_arguments(request, parameters)
    _warn_of_ignored_address(arguments["tracking_uri"], defaults["tracking_uri"])
    _make_directory(work_dir)
    plan, architecture = read_run_plan(arguments), None
    if plan and not request.samples:
        try:
            architecture = _check_plan(plan)
        except ConfigError:
            with suppress(OSError):  # it has files: of an earlier run
                work_dir.rmdir()
            raise
    with disk_errors(work_dir):
        if request.samples:
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
            with demo_inputs.build_aside(request.samples, work_dir / "inputs"):
                local.import_kfp()
        comment = None
        if plan:
            from minitron.runtime.duration import DurationEstimate

            if request.samples:  # they exist now
                architecture = _check_plan(plan)
            if STOP_PARAMETER not in parameters:  # a race has no plan whose tokens could be counted
                comment = DurationEstimate(plan, architecture, work_dir / local.RESULTS).read_line
        results = local.run_pipeline(documents, arguments, work_dir, comment)
        summary.write_summary(pipeline, results, work_dir, arguments["tracking_uri"])


def _check_plan(plan: Plan) -> dict[str, Any] | None:
    """Check the plan of a run; return the teacher's config.json, or None if it cannot be read yet."""
    from minitron.runtime.preflight import check_plan

    return check_plan(plan, find_missing_paths(plan, Path("/")), ask_once=True)[0]


def _warn_of_ignored_address(used: str, default: str) -> None:
    """Say that this run is not tracked at MLFLOW_TRACKING_URI, which the commands of the registry read."""
    exported = os.environ.get("MLFLOW_TRACKING_URI")
    if exported and used == default != exported:
        print(
            f"MLflow: {used}, in the work directory; MLFLOW_TRACKING_URI is ignored: "
            "--set tracking_uri=$MLFLOW_TRACKING_URI uses it",
            file=sys.stderr,
            flush=True,
        )


def _make_directory(work_dir: Path) -> None:
    """Make the directory of the run.

    Raises:
        ConfigError: it is a file, or this user may not write to it.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=work_dir).close()
    except OSError as error:
        reason = "is a file" if work_dir.is_file() else error.strerror
        raise ConfigError(f"--work-dir {work_dir}: {reason}; give a directory to write to") from error


def _local_defaults(parameters: dict[str, Any], work_dir: Path) -> dict[str, Any]:
    """Return the defaults of this machine: the work directory's database for MLflow, and no GPUs."""
    defaults: dict[str, Any] = {"tracking_uri": f"sqlite:///{work_dir / local.RUN_DATABASE}"}
    if SETTINGS_PARAMETER in parameters:
        defaults |= {f"{stage}.gpus": 0 for stage, entry in RESOURCES.items() if isinstance(entry, GpuResources)}
    return defaults
