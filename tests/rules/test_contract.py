"""Components, pipeline, presets and README say the same as the configuration models."""

import inspect
import re
from typing import Any

import pytest

from minitron import components
from minitron.config.document import make_plan
from minitron.config.pipelines import STOP_PARAMETER
from minitron.config.resources import Models
from minitron.config.stages import SETTINGS, STAGES, TASKS
from minitron.stages import plan
from tests.constants import REPOSITORY
from tests.pipelines import compress, promote, retrain, search

ARTIFACTS = {"dataset", "teacher", "pruned", "student", "evaluation"}
REQUIRED = {"teacher": "/teacher", "corpus": "/corpus"}


def test_the_components_are_the_stages_in_the_order_of_the_flow() -> None:
    assert components.__all__ == [*STAGES, *TASKS]


@pytest.mark.parametrize("stage", STAGES)
def test_a_component_takes_inputs_settings_and_where_it_reports(stage: str) -> None:
    inputs = getattr(components, stage).component_spec.inputs
    fields = STAGES[stage].model_fields
    assert inputs.keys() == fields.keys() - SETTINGS[stage].model_fields.keys() - {"output"} | {"settings"}
    assert inputs["settings"].default == {}
    for name, entry in inputs.items():
        if entry.type.startswith("system."):
            assert name in ARTIFACTS and fields[name].is_required()
        elif name != "settings":
            assert entry.optional != fields[name].is_required() or name == "tracking_uri", name
            assert entry.default == (fields[name].default if entry.optional else None), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_component_passes_every_value_on_under_its_own_name(stage: str) -> None:
    component = getattr(components, stage)
    (call,) = re.findall(r"launch\((.*?)\n    \)", inspect.getsource(component.python_func), re.DOTALL)
    name, metrics, settings, *passed = [" ".join(part.split()) for part in call.strip().rstrip(",").split(",")]
    assert (name, metrics, settings) == (f'"{stage}"', "metrics", "settings")
    inputs = component.component_spec.inputs
    wanted = {f"{name}={name}.path" if entry.type.startswith("system.") else f"{name}={name}"
              for name, entry in inputs.items() if name != "settings"}  # fmt: skip
    assert {part for part in passed if not part.startswith("output=")} == wanted


@pytest.mark.parametrize("pipeline", [compress, retrain, promote, search], ids=lambda pipeline: pipeline.name)
def test_the_run_form_is_short_and_every_parameter_is_described(pipeline: Any) -> None:
    parameters = pipeline.pipeline_spec.root.input_definitions.parameters
    assert len(parameters) <= 25
    assert all(entry.description for entry in parameters.values())


def test_retrain_has_the_form_of_compress_without_the_champion_that_it_looks_up() -> None:
    offered, inputs = compress.component_spec.inputs, retrain.component_spec.inputs
    assert inputs.keys() == offered.keys() - {"champion"}
    for name, entry in inputs.items():  # a condition hands on no parameter that has no value
        assert entry.default is not None or name == "tracking_uri"
        assert entry.default == offered[name].default


def test_search_has_the_form_of_compress_and_its_manual_gate() -> None:
    offered, inputs = compress.component_spec.inputs, search.component_spec.inputs
    assert inputs.keys() == offered.keys() | {STOP_PARAMETER}
    assert all(entry.default == offered[name].default for name, entry in inputs.items() if name in offered)


def test_the_plan_hands_on_what_the_component_declares() -> None:
    outputs = plan._build_outputs(make_plan(REQUIRED), Models())
    declared = components.plan.component_spec.outputs
    assert outputs.keys() == declared.keys() - {"planned", "report"}
    kinds = {"String": str, "Dict": dict, "List": list}
    assert all(isinstance(outputs[name], kinds[declared[name].type]) for name in outputs)


COMPILED = [compress, retrain, promote, search, *(getattr(components, name) for name in components.__all__)]


@pytest.mark.parametrize("component", COMPILED, ids=lambda component: component.name)
def test_a_parameter_that_may_be_left_out_is_text_or_has_a_default(component: Any) -> None:
    """kfp.local makes int(None) of a number without a value (kfp/local/executor_input_utils.py)."""
    for name, entry in component.component_spec.inputs.items():
        text = ("String", "PipelineTaskFinalStatus")  # the second is what Kubeflow fills in
        assert not entry.optional or entry.default is not None or entry.type in text, name


def test_a_component_is_a_short_declaration() -> None:
    for stage in STAGES:
        assert len((REPOSITORY / "components" / f"{stage}.py").read_text().splitlines()) <= 60, stage
