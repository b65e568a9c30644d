"""Components, pipeline, presets and README say the same as the configuration models."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron import components, origin
from minitron.config import STAGES, TASKS, parse
from minitron.errors import ConfigError
from minitron.parameters import parameter_table
from minitron.pipelines.compress import compress
from minitron.pipelines.retrain import retrain
from minitron.presets import compiled_pipeline, pipelines_directory, read_arguments, stage_values

ARTIFACTS = {"dataset", "teacher", "pruned", "student", "evaluation"}
PRESETS = sorted(path.stem for path in (pipelines_directory() / "presets").glob("*.yaml"))
REPOSITORY = Path(__file__).parent.parent
SHARED = {"teacher", "corpus", "sequence_length", "seed", "engine", "tracking_uri", "experiment", "caching"}


def test_the_components_are_the_stages_in_the_order_of_the_flow() -> None:
    assert components.__all__ == [*STAGES, *TASKS]


@pytest.mark.parametrize("stage", STAGES)
def test_a_component_has_the_parameters_and_defaults_of_its_config(stage: str) -> None:
    inputs = getattr(components, stage).component_spec.inputs
    fields = STAGES[stage].model_fields
    assert inputs.keys() == fields.keys() - {"output"}
    for name, entry in inputs.items():
        if entry.type.startswith("system."):
            assert name in ARTIFACTS and fields[name].is_required()
        else:
            expected = None if fields[name].is_required() else fields[name].default
            assert entry.default == expected, name
            assert entry.optional != fields[name].is_required(), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_component_passes_every_value_on_under_its_own_name(stage: str) -> None:
    """What the component's body hands to the stage are its parameters, each under its own name."""
    component = getattr(components, stage)
    received: dict[str, Any] = {}
    source = inspect.getsource(component.python_func)
    names = component.component_spec.inputs
    for name, entry in names.items():
        wanted = f"{name}={name}.path" if entry.type.startswith("system.") else f"{name}={name}"
        assert f"{wanted}," in source or f"{wanted}\n" in source, name
        received[name] = wanted
    assert received and f'"{stage}"' in source


def test_resolve_gets_every_setting_that_decides_the_weights_as_compress_does() -> None:
    inputs, offered = components.resolve.component_spec.inputs, compress.component_spec.inputs
    others = {*TASKS["resolve"].model_fields} - {"settings", "output", "caching", "gpus", "seed"}
    assert inputs.keys() - others == set(origin.parameters())
    for name in origin.parameters():
        assert (inputs[name].type, inputs[name].default) == (offered[name].type, offered[name].default), name


def test_retrain_offers_what_compress_does_and_leaves_nothing_out() -> None:
    """Inside a condition Kubeflow cannot leave a parameter out: each has a value, one that stands for the default."""
    inputs, offered = retrain.component_spec.inputs, compress.component_spec.inputs
    assert inputs.keys() == offered.keys() - {"evaluate_champion"}
    assert {name for name, entry in inputs.items() if entry.default is None} == {"teacher", "corpus", "tracking_uri"}
    values = {name: entry.default for name, entry in inputs.items()}
    for stage, model in STAGES.items():
        for name, field in model.model_fields.items():
            if f"{stage}_{name}" in values and field.default is None:
                assert name not in stage_values(stage, values), f"{stage}_{name}"


def test_a_component_is_a_short_declaration() -> None:
    for stage in STAGES:
        assert len((REPOSITORY / "components" / f"{stage}.py").read_text().splitlines()) <= 60, stage


def test_the_pipeline_offers_every_setting_with_its_default() -> None:
    inputs = compress.component_spec.inputs
    for stage, model in STAGES.items():
        for name, field in model.model_fields.items():
            if name in {"output", "workspace", "pipeline_run_id", "teacher_before"} | (ARTIFACTS - {"teacher"}):
                continue
            parameter = name if name in SHARED else f"{stage}_{name}"
            if name == "gpus":  # a task has one by default where it computes; a stage run by hand checks nothing
                assert inputs[parameter].default == (0 if stage in ("prepare", "register") else 1)
                continue
            expected = "nemo" if name == "engine" else None if field.is_required() else field.default
            assert inputs[parameter].default == expected, parameter


def test_every_pipeline_parameter_is_documented() -> None:
    documented = inspect.getdoc(compress.pipeline_func) or ""
    assert [name for name in compress.component_spec.inputs if f"\n    {name}: " not in documented] == []


def test_presets_are_those_promised() -> None:
    assert PRESETS == [
        "demo",
        "gke-gpu",
        "gke-spot",
        "llama-3.1-minitron-4b-depth",
        "llama-3.1-minitron-4b-width",
        "nemo-tutorial-depth",
        "nemo-tutorial-width",
        "tiny",
    ]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_valid_for_every_stage(preset: str) -> None:
    known = list(compiled_pipeline("compress")[0]["root"]["inputDefinitions"]["parameters"])
    arguments = read_arguments([preset], [], known)
    for stage in STAGES:
        parse(stage, stage_values(stage, arguments))


@pytest.mark.parametrize(
    ("preset", "cut"),
    [
        ("nemo-tutorial-width", {"hidden_size": 3072, "intermediate_size": 9216}),
        ("nemo-tutorial-depth", {"drop_layers": list(range(16, 32))}),
    ],
)
def test_the_tutorial_presets_are_the_tutorial(preset: str, cut: dict[str, Any]) -> None:
    values = yaml.safe_load((pipelines_directory() / "presets" / f"{preset}.yaml").read_text())
    assert values["sequence_length"] == 8192
    assert values["prune"] == cut | {"calibration_sequences": 1024}
    flat = {"engine": "nemo"} | {f"distill_{name}": value for name, value in values["distill"].items()}
    training = parse("distill", stage_values("distill", flat))
    expected = {
        "max_steps": 30, "global_batch_size": 128, "micro_batch_size": 4, "learning_rate": 1e-4,
        "min_learning_rate": 1e-5, "warmup_steps": 2, "validation_interval": 10, "validation_sequences": 5 * 128,
        "tensor_parallel_size": 8, "temperature": 1.0, "kl_weight": 1.0, "cross_entropy_weight": 0.0,
    }  # fmt: skip
    assert {name: getattr(training, name) for name in expected} == expected


def test_the_readme_has_the_parameter_table() -> None:
    assert parameter_table() in (REPOSITORY / "README.md").read_text(), "run 'python -m minitron.parameters'"


@pytest.mark.parametrize("task", ["resolve", "promote", "register"])
@pytest.mark.parametrize("name", ["a/b", "a@b", "it's"])
def test_a_name_that_the_registry_cannot_address_is_refused(task: str, name: str) -> None:
    required = {field: "x" for field, info in (STAGES | TASKS)[task].model_fields.items() if info.is_required()}
    with pytest.raises(ConfigError, match=f"{task}.name: .*found"):
        parse(task, required | {"name": name} | ({"settings": {}} if task == "resolve" else {}))
