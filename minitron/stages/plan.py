"""Check the settings of a run, and hand each stage its own: the first task of a pipeline, without a GPU.

It leaves plan.html, which Kubeflow shows: the settings of every stage, with changed ones marked.
"""

from collections.abc import Collection
from typing import Any

from jinja2 import Environment, StrictUndefined

from minitron.config.document import SHARED, Plan, read_plan
from minitron.config.settings import RESOURCES, Settings
from minitron.config.tasks import PlanConfig
from minitron.report import TEMPLATES
from minitron.storage.files import replace_directory, write_atomically
from minitron.storage.layout import PLAN, PLAN_PAGE


def run(config: PlanConfig) -> dict[str, Any]:
    """Write `plan.json` and `plan.html` to `config.output`; return the outputs of the task as `outputs`.

    Raises:
        ConfigError: a setting is unknown, missing or has a value of the wrong kind.
    """
    plan = read_plan(config)
    outputs = _build_outputs(plan)
    with replace_directory(config.output) as directory:
        write_atomically(directory / PLAN, outputs)
        (directory / PLAN_PAGE).write_text(_render_page(plan), encoding="utf-8")
    return {"metrics": {}, "outputs": outputs}


def _build_outputs(plan: Plan) -> dict[str, Any]:
    """Return the outputs of the component: each stage's settings as a dict, its resources as text."""
    outputs: dict[str, Any] = {"teacher": plan.pipeline.teacher, "corpus": plan.pipeline.corpus}
    outputs |= {stage: settings.as_settings() for stage, settings in plan.stages.items()}
    for stage, resources in plan.resources.items():
        outputs |= {f"{stage}_{name}": str(value) for name, value in resources.model_dump().items()}
    where = plan.pipeline.model_dump(mode="json", include={"gpu_tolerations", "gpu_node_selector"})
    return outputs | where


def _render_page(plan: Plan) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = (TEMPLATES / "plan.html.j2").read_text(encoding="utf-8")
    sections = {"all stages": _list_settings(plan.pipeline)}
    for stage, settings in plan.stages.items():
        sections[stage] = _list_settings(settings, {*SHARED, "gpus"}) + _list_settings(
            plan.resources[stage], default=RESOURCES[stage]
        )
    return environment.from_string(template).render(model_name=plan.model_name, sections=sections)


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
