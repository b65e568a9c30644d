"""A settings document: presets, `--set` values, the arguments of a run, and the presets that ship."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron.config.document import make_plan, merge, pipelines_directory, read_preset
from minitron.config.parse import parse
from minitron.config.pipelines import check_arguments, compiled_pipeline, get_parameters, read_request
from minitron.config.stages import STAGES, TASKS
from minitron.errors import ConfigError

INPUTS = {"teacher": "/teacher", "corpus": "/corpus"}
PRESETS = sorted(path.stem for path in (pipelines_directory() / "presets").glob("*.yaml"))


@pytest.fixture(scope="module")
def parameters() -> dict[str, Any]:
    return get_parameters(compiled_pipeline("compress"))


def write_preset(directory: Path, **values: Any) -> str:
    path = directory / "mine.yaml"
    path.write_text(yaml.safe_dump(INPUTS | values))
    return str(path)


def test_a_preset_file_has_shared_keys_and_a_section_per_stage(tmp_path: Path, parameters: dict[str, Any]) -> None:
    path = write_preset(tmp_path, seed=7, distill={"max_steps": 5}, cluster={"retries": 9})
    request = read_request([path], [], parameters)
    assert request.arguments == INPUTS
    assert request.document == {"seed": 7, "distill.max_steps": 5}
    assert request.cluster.retries == 9


def test_a_setting_wins_over_the_preset_and_null_gives_the_default_back(
    tmp_path: Path, parameters: dict[str, Any]
) -> None:
    path = write_preset(tmp_path, seed=7, prune={"num_hidden_layers": 3, "hidden_size": 32})
    settings = ["prune.num_hidden_layers=null", "prune.drop_layers=[2, 3]", "prune.hidden_size=48", "corpus=a=b"]
    request = read_request([path], settings, parameters)
    assert request.arguments == {"teacher": "/teacher", "corpus": "a=b"}
    assert request.document == {"seed": 7, "prune.drop_layers": [2, 3], "prune.hidden_size": 48}


def test_the_arguments_are_the_form_and_the_settings_document(tmp_path: Path, parameters: dict[str, Any]) -> None:
    """YAML reads 1e-3, without a point, as text; Kubeflow insists on its parameters' types."""
    settings = ["distill.learning_rate=1e-3", "settings={distill: {cpu: 2}}", "experiment=7", "tracking_uri=http://m"]
    request = read_request([write_preset(tmp_path)], settings, parameters)
    arguments = check_arguments(request, parameters)
    document = arguments.pop("settings")
    assert arguments == INPUTS | {"experiment": "7", "tracking_uri": "http://m"}
    plan = make_plan(merge(document, INPUTS))
    assert document == {"distill": {"learning_rate": "1e-3", "cpu": 2}}
    assert plan.resources["distill"].cpu == "2" and plan.stages["distill"].model_dump()["learning_rate"] == 0.001


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, "sed: unknown key; did you mean 'seed'?"),
        ({"model_name": "a/b"}, "register.name: String should match pattern"),
        (
            {"settings": {"distill": {"max_step": 1}}},
            "distill.max_step: unknown key; did you mean 'distill.max_steps'?",
        ),
        ({"preset": "tinny"}, "preset tinny: no such file or preset; did you mean 'tiny'?"),
        ({"distill": {"learning_rat": 1}}, "distill.learning_rat: unknown key; did you mean 'distill.learning_rate'?"),
        ({"prepare": {"corpus": "/c"}}, "prepare.corpus: unknown key; corpus stands at the top level: set corpus"),
        ({"prune": {"teacher": "/t"}}, "prune.teacher: unknown key; teacher stands at the top level: set teacher"),
        ({"max_steps": 1}, "max_steps: unknown key; set finetune.max_steps or distill.max_steps"),
        (
            {"evaluate": {"max_steps": 1}},
            "evaluate.max_steps: unknown key; set finetune.max_steps or distill.max_steps",
        ),
        ({"distil": {"max_steps": 1}}, "distil: unknown key; did you mean 'distill"),
        ({"evaluate": {"gates": [{"metric": "mmlu_acc", "at_least": 0}]}}, "evaluate.gates.0.metric: mmlu_acc is not"),
        ({"teacher": None}, "teacher: missing; give it a value"),
        ({"tracking_uri": None}, "tracking_uri: missing; give it in the preset or by --set tracking_uri=…"),
        ({"distill": {"seed": 1}}, "distill.seed: all stages share this setting; set seed"),
        ({"distill": 5}, "distill: found 5, not a section; write distill: {setting: value}"),
        ({"distill": {"memory": "much"}}, "distill.memory: String should match pattern"),
        ({"distill": {"gpus": -1}}, "distill.gpus: Input should be greater than or equal to 0 (found -1)"),
        ({"distill": {"gpus": "two"}}, "distill.gpus: Input should be a valid integer"),
        ({"evaluate": {"tasks": "mmlu"}}, "evaluate.tasks: Input should be a valid list (found 'mmlu')"),
        ({"prune": {"num_hidden_layers": 2, "drop_layers": [1]}}, "prune.drop_layers: num_hidden_layers is given, too"),
        ({"finetune": {"micro_batch_size": 3}}, "finetune.global_batch_size: 128 is not a multiple of"),
        ({"finetune": {"max_steps": 5, "warmup_steps": 9}}, "finetune.warmup_steps: 9 is above max_steps 5, so"),
        ({"prune": {"num_hidden_layers": 0}}, "prune.num_hidden_layers: Input should be greater than 0 (found 0)"),
        ({"prune": {"num_hidden_layers": "1.5e0"}}, "prune.num_hidden_layers: Input should be a valid integer, got a"),
        ({"distill": {"temperature": True}}, "distill.temperature: found true (YAML also reads yes and on like this"),
        ({"register": {"name": False}}, "register.name: found false (YAML also reads no and off like this); give a"),
        ({"evaluate": {"num_fewshot": {"mmlu": True}}}, "evaluate.num_fewshot: found true (YAML also reads yes"),
        ({"evaluate": {"gates": [{"metric": "kl", "at_most": True}]}}, "evaluate.gates: found true (YAML also "),
        ({"distill": {"learning_rate": float("inf")}}, "distill.learning_rate: Input should be a finite number"),
        (
            {"prepare": {"expected_sha256": {"dataset": "d1"}}},
            "prepare.expected_sha256: dataset is not an input of prepare; known: corpus, teacher",
        ),
        ({"evaluate": {"tasks": ["mmlu", "mmlu"]}}, "evaluate.tasks: mmlu is listed twice; remove one"),
        (
            {
                "prepare": {"own_splits": False, "test_fraction": 0},
                "evaluate": {"gates": [{"metric": "test_loss", "at_most": 3}]},
            },
            "evaluate.gates.0.metric: test_loss is not measured, because prepare.test_fraction is 0; raise it, or",
        ),
    ],
)
def test_a_bad_preset_is_refused(
    tmp_path: Path, parameters: dict[str, Any], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        values = {"tracking_uri": "http://m"} | values
        check_arguments(read_request([write_preset(tmp_path, **values)], [], parameters), parameters)
    assert str(refused.value).startswith(message)


def test_all_faults_of_all_sections_are_told_at_once() -> None:
    document = {"distil.max_steps": 3, "sequence_length": 0, "prune.gpus": "two", "engine": "hf"}
    document |= {"finetune.warmup_steps": 9, "finetune.max_steps": 5, "finetune.global_batch_size": 3}
    with pytest.raises(ConfigError) as refused:
        make_plan(INPUTS | document)
    faults = [key for key, _ in refused.value.faults]  # type: ignore[attr-defined]
    assert faults == ["distil.max_steps", "sequence_length", "prune.gpus"]
    both = {"prune.drop_layers": [1], "prune.num_hidden_layers": 3}
    with pytest.raises(ConfigError) as refused:
        make_plan(INPUTS | document | {"sequence_length": 8, "prune.gpus": 0, **both})
    assert [text.partition(": ")[0] for text in str(refused.value).split("; ") if ": " in text] == [
        "distil.max_steps", "finetune.global_batch_size", "finetune.warmup_steps", "prune.drop_layers",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["1e3", "1E3", "1.0e+3", "1000", "1_000"])
def test_a_whole_number_may_have_an_exponent(text: str, parameters: dict[str, Any]) -> None:
    """YAML 1.1 reads 1e3, without a point, as text."""
    request = read_request([], [f"distill.max_steps={text}"], parameters)
    assert make_plan(INPUTS | request.document).stages["distill"].model_dump()["max_steps"] == 1000


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("mine.yaml", "preset mine.yaml: no such file in HERE; give an existing YAML file"),
        ("presets/mine", "preset presets/mine: no such file in HERE; give an existing YAML file"),
        ("/presets/mine.yml", "preset /presets/mine.yml: no such file; give an existing YAML file"),
        ("mine", "preset mine: no such file or preset; known: demo, "),
    ],
)
def test_a_preset_that_is_missing_is_a_file_or_one_of_those_that_ship(
    preset: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        read_preset(preset)
    assert str(refused.value).startswith(message.replace("HERE", str(tmp_path)))


def test_a_truth_value_is_no_number_of_a_pipeline() -> None:
    parameters = get_parameters(compiled_pipeline("promote"))
    with pytest.raises(ConfigError) as refused:
        check_arguments(read_request([], ["version=yes", "why=[]", "model_name=x"], parameters), parameters)
    assert str(refused.value) == (
        "version: found true (YAML also reads yes and on like this); give a number, or quote it if it is text; "
        "why: Input should be a valid string (found []); tracking_uri: missing; give it in the preset or by "
        "--set tracking_uri=…"
    )


def test_what_the_task_promote_would_refuse_is_refused_before_it_starts() -> None:
    parameters = get_parameters(compiled_pipeline("promote"))
    settings = ["version=0", "model_name=a/b", "tracking_uri=http://mlflow"]
    with pytest.raises(ConfigError, match=r"model_name: .*found 'a/b'.*version: .*greater than 0 \(found '0'\)"):
        check_arguments(read_request([], settings, parameters), parameters)
    settings = ["version=3", "model_name=minitron", "tracking_uri=http://mlflow"]
    assert check_arguments(read_request([], settings, parameters), parameters)["version"] == "3"


def test_presets_are_those_promised() -> None:
    assert PRESETS == [
        "demo",
        "gke-gpu",
        "gke-spot",
        "llama-3.1-minitron-4b-depth",
        "llama-3.1-minitron-4b-width",
        "nemo-tutorial-depth",
        "nemo-tutorial-width",
        "recommended",
        "tiny",
    ]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_valid(preset: str) -> None:
    document = merge(INPUTS, read_preset(preset))
    make_plan({key: value for key, value in document.items() if key != "samples" and not key.startswith("cluster.")})


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
    training = make_plan(merge(values)).stages["distill"]
    expected = {
        "max_steps": 30, "global_batch_size": 128, "micro_batch_size": 4, "learning_rate": 1e-4,
        "min_learning_rate": 1e-5, "warmup_steps": 2, "validation_interval": 10, "validation_sequences": 5 * 128,
        "tensor_parallel_size": 8, "temperature": 1.0, "kl_weight": 1.0, "cross_entropy_weight": 0.0,
    }  # fmt: skip
    assert {name: getattr(training, name) for name in expected} == expected


@pytest.mark.parametrize("task", ["promote", "register"])
@pytest.mark.parametrize("name", ["a/b", "a@b", "it's"])
def test_a_name_that_the_registry_cannot_address_is_refused(task: str, name: str) -> None:
    required = {field: "x" for field, info in (STAGES | TASKS)[task].model_fields.items() if info.is_required()}
    key = "name" if task == "register" else "model_name"
    with pytest.raises(ConfigError, match=f"{task}.{key}: .*found"):
        parse(task, required | {key: name})
