"""Check the settings of a run, and give each stage its section: the first task of a pipeline, without a GPU.

It writes plan.html, which Kubeflow shows: what every stage needs (GPU memory, host memory, disk, hours), recommended
settings, and the settings of every stage, with changed settings marked.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

from minitron.config import resources
from minitron.config.addresses import find_missing_paths
from minitron.config.document import SEARCH, SHARED, Plan, read_plan
from minitron.config.fields import Fault
from minitron.config.parse import SectionError
from minitron.config.resources import Models, Term, request_cpu, request_trial
from minitron.config.resources.estimate import estimate_run, find_labeled_faults, find_memory_faults, recommend
from minitron.config.resources.gpus import DEFAULT_GPU, Gpu, find_labeled_gpu
from minitron.config.settings import RESOURCES, Settings
from minitron.config.stages import PlanConfig
from minitron.errors import MinitronError
from minitron.report import render_page
from minitron.report.plan import PLAN_COLUMNS, list_plan_notes, list_plan_rows
from minitron.runtime.preflight import check_plan, count_plan_models
from minitron.storage.bucket import is_bucket
from minitron.storage.files import write_atomically
from minitron.storage.layout import PLAN, PLAN_PAGE
from minitron.storage.staging import replace_directory
from minitron.tracking.client import connect, fail_fast, one_line_errors
from minitron.tracking.pipeline_run import join_pipeline_run


class Memory(NamedTuple):
    """The host memory of a stage's task: the request, the sum, and a warning if the sum is larger."""

    request: str
    needed: str
    terms: list[Term]
    warning: str | None


def run(config: PlanConfig) -> dict[str, Any]:
    """Write `plan.json` and `plan.html` to `config.output`; return the outputs of the task as `outputs`.

    Raises:
        ConfigError: a setting is unknown, missing or wrong, or does not fit the teacher or the GPUs.
    """
    plan = read_plan(config)
    models, unknown = _count_parameters(plan, config)
    memory = {stage: _request_memory(plan, stage, models) for stage in plan.stages}
    for warning in filter(None, (unknown, *(entry.warning for entry in memory.values()))):
        print(f"warning: plan: {warning}", flush=True)
    _check_gpu_memory(plan, models, is_known=not unknown)
    requested = {
        stage: entry.model_copy(
            update={"memory": memory[stage].request, "cpu": entry.cpu or request_cpu(stage, plan.stages[stage])}
        )
        for stage, entry in plan.resources.items()
    }
    outputs = _build_outputs(replace(plan, resources=requested), models)
    with replace_directory(config.output) as directory:
        write_atomically(directory / PLAN, outputs)
        (directory / PLAN_PAGE).write_text(_render_page(plan, models, unknown, memory), encoding="utf-8")
    _open_pipeline_run(config, plan.model_name)
    return {"metrics": {}, "outputs": outputs}


def _open_pipeline_run(config: PlanConfig, model_name: str) -> None:
    """Open the run in MLflow under its model's name; an error is only a warning, since the next task is retried."""
    if config.tracking_uri is None or config.pipeline_run_id is None:
        return
    try:
        with one_line_errors(config.tracking_uri), fail_fast():
            join_pipeline_run(connect(config.tracking_uri, create=True), config, model_name)
    except MinitronError as error:
        print(f"warning: plan: {error}", flush=True)


def _count_parameters(plan: Plan, config: PlanConfig) -> tuple[Models, str | None]:
    """Check the plan, and count its models' parameters; if the teacher cannot be read yet, assume them and warn."""
    volume = None if is_bucket(config.workspace) else config.workspace  # every task mounts it
    faults = list(find_missing_paths(plan, volume))
    if config.tracking_uri == "":
        faults.append(Fault("tracking_uri", "empty, but this pipeline registers its model; give an MLflow server"))
    architecture, reason = check_plan(plan, faults)
    models = count_plan_models(plan, architecture)
    if architecture:
        return models, None
    return models, (
        f"the teacher's size is not known yet ({reason}), so the memory is for {resources.UNKNOWN:,} parameters; "
        "set STAGE.memory if the teacher has more"
    )


def _find_gpu(plan: Plan) -> tuple[Gpu, bool]:
    """Return the GPUs that the plan is made for, and whether the node selector names them."""
    gpu = find_labeled_gpu(plan.pipeline.gpu_node_selector)
    return gpu or DEFAULT_GPU, gpu is not None


def _check_gpu_memory(plan: Plan, models: Models, is_known: bool) -> None:
    """Refuse stages that the GPUs cannot hold; only warn if the GPUs, or the sizes of the models, are assumed.

    Raises:
        SectionError: a stage needs more memory than a GPU of the node selector has.
    """
    if is_known and (faults := find_labeled_faults(plan, models)):
        raise SectionError(faults)
    for fault in find_memory_faults(plan, models, _find_gpu(plan)[0]):
        print(f"warning: plan: {fault.key}: {fault.text}", flush=True)


def _request_memory(plan: Plan, stage: str, models: Models) -> Memory:
    """Return a stage's memory: its setting, or the sum. A smaller setting only gives a warning: sums are bounds."""
    terms = resources.sum_memory(plan.stages[stage], models)
    needed, given = resources.format_request(terms), plan.resources[stage].memory
    warning = None
    if given and resources.parse_quantity(given) < resources.total(terms):
        warning = f"{stage}.memory: {given} is below the sum, {needed}; the task may be killed if it needs more"
    return Memory(given or needed, needed, terms, warning)


def _build_outputs(plan: Plan, models: Models) -> dict[str, Any]:
    """Return the outputs of the component: each stage's settings as a dict, its resources as text."""
    outputs: dict[str, Any] = {"teacher": plan.pipeline.teacher, "corpus": plan.pipeline.corpus}
    outputs |= {stage: settings.as_settings() for stage, settings in plan.stages.items()}
    for stage, entry in plan.resources.items():
        outputs |= {f"{stage}_{name}": str(value) for name, value in entry.model_dump().items()}
    trial = request_trial("", plan, models)
    outputs |= {"trial_cpu": trial.cpu, "trial_memory": trial.memory, "trial_gpus": str(trial.gpus)}
    outputs["search"] = plan.search.as_settings()
    outputs["select_gpus"] = str(min(1, trial.gpus) if plan.search.latency_ms else 0)
    where = plan.pipeline.model_dump(mode="json", include={"gpu_tolerations", "gpu_node_selector"})
    return outputs | where


def _render_page(plan: Plan, models: Models, unknown: str | None, memory: dict[str, Memory]) -> str:
    gpu, is_labeled = _find_gpu(plan)
    estimates = estimate_run(plan, models, gpu)
    sections = {"all stages": _list_settings(plan.pipeline)}
    if plan.search.budget:
        sections[SEARCH] = _list_settings(plan.search)
    for stage, settings in plan.stages.items():
        sections[stage] = _list_settings(settings, {*SHARED, "gpus"}) + _list_settings(
            plan.resources[stage], default=RESOURCES[stage]
        )
    content = {
        "model_name": plan.model_name,
        "sections": sections,
        "models": models,
        "unknown": unknown,
        "memory": memory,
        "gpu": gpu,
        "is_labeled": is_labeled,
        "estimates": estimates,
        "columns": PLAN_COLUMNS,
        "rows": list_plan_rows(estimates),
        "notes": list_plan_notes(estimates),
        "faults": dict(find_memory_faults(plan, models, gpu)),
        "advice": recommend(plan, models, gpu),
        "writing": {
            stage: written
            for stage, settings in plan.stages.items()
            if (written := resources.list_writing(settings, models))
        },
        "gib": resources.GIB,
    }
    return render_page("plan.html.j2", content)


def _list_settings(
    settings: Settings, left_out: Collection[str] = (), default: Settings | None = None
) -> list[dict[str, Any]]:
    """Return the settings of one section: name, value, whether it differs from the default, and its description."""
    rows = []
    for name, field in type(settings).model_fields.items():
        if name not in left_out:
            value = getattr(settings, name)
            default_value = getattr(default, name) if default else field.get_default()
            rows.append(
                {"name": name, "value": value, "changed": value != default_value, "meaning": field.description or ""}
            )
    return rows
