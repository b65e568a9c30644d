"""What `minitron run` does before and after the stages: arguments, the adapted pipeline, output, failures, summary.

The run itself is in test_flow.py.
"""

import io
import json
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from minitron.cli import demo_inputs, local, summary, tables
from minitron.cli.app import app
from minitron.config import metrics
from minitron.config.document import make_plan, merge
from minitron.config.pipelines import check_arguments, compiled_pipeline, get_parameters, read_request
from minitron.config.stages import STAGES
from minitron.errors import ConfigError
from tests.servers import forks

GROUP: Any = typer.main.get_command(app)
PLACES = {"teacher": "teacher", "corpus": "corpus"}


@pytest.fixture
def specification() -> dict[str, Any]:
    return compiled_pipeline("compress")[0]


@pytest.fixture
def parameters(specification: dict[str, Any]) -> dict[str, Any]:
    return get_parameters([specification])


def preset(directory: Path, **values: Any) -> str:
    path = directory / "mine.yaml"
    path.write_text(yaml.safe_dump(PLACES | values))
    return str(path)


def test_a_preset_file_has_shared_keys_and_a_section_per_stage(tmp_path: Path, parameters: dict[str, Any]) -> None:
    path = preset(tmp_path, seed=7, distill={"max_steps": 5}, cluster={"retries": 9})
    request = read_request([path], [], parameters)
    assert request.arguments == PLACES
    assert request.document == {"seed": 7, "distill.max_steps": 5}
    assert request.cluster.retries == 9


def test_a_setting_wins_over_the_preset_and_null_gives_the_default_back(
    tmp_path: Path, parameters: dict[str, Any]
) -> None:
    path = preset(tmp_path, seed=7, prune={"num_hidden_layers": 3, "hidden_size": 32})
    settings = ["prune.num_hidden_layers=null", "prune.drop_layers=[2, 3]", "prune.hidden_size=48", "corpus=a=b"]
    request = read_request([path], settings, parameters)
    assert request.arguments == {"teacher": "teacher", "corpus": "a=b"}
    assert request.document == {"seed": 7, "prune.drop_layers": [2, 3], "prune.hidden_size": 48}


def test_the_arguments_are_the_form_and_the_settings_document(tmp_path: Path, parameters: dict[str, Any]) -> None:
    """YAML reads 1e-3, without a point, as text; Kubeflow insists on its parameters' types."""
    settings = ["distill.learning_rate=1e-3", "settings={distill: {cpu: 2}}", "experiment=7", "tracking_uri=http://m"]
    request = read_request([preset(tmp_path)], settings, parameters)
    arguments = check_arguments(request, parameters)
    document = arguments.pop("settings")
    assert arguments == PLACES | {"experiment": "7", "tracking_uri": "http://m"}
    plan = make_plan(merge(document, PLACES))
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
        ({"distil": {"max_steps": 1}}, "distil: unknown key; did you mean 'distill"),
        ({"evaluate": {"gates": [{"metric": "mmlu_acc", "at_least": 0}]}}, "evaluate: gates.0.metric: mmlu_acc is not"),
        ({"teacher": None}, "teacher: missing; give it a value"),
        ({"tracking_uri": None}, "tracking_uri: missing; give it in the preset or by --set tracking_uri=…"),
        ({"distill": {"seed": 1}}, "distill.seed: all stages share this setting; set seed"),
        ({"distill": 5}, "distill: found 5, not a section; write distill: {setting: value}"),
        ({"distill": {"memory": "much"}}, "distill.memory: String should match pattern"),
        ({"distill": {"gpus": -1}}, "distill.gpus: Input should be greater than or equal to 0 (found -1)"),
        ({"distill": {"gpus": "two"}}, "distill.gpus: Input should be a valid integer"),
        ({"evaluate": {"tasks": "mmlu"}}, "evaluate.tasks: Input should be a valid list (found 'mmlu')"),
        ({"prune": {"num_hidden_layers": 2, "drop_layers": [1]}}, "prune: drop_layers and num_hidden_layers are both"),
        ({"finetune": {"micro_batch_size": 3}}, "finetune: global_batch_size 128 is not a multiple of"),
    ],
)
def test_a_bad_preset_is_refused(
    tmp_path: Path, parameters: dict[str, Any], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        values = {"tracking_uri": "http://m"} | values
        check_arguments(read_request([preset(tmp_path, **values)], [], parameters), parameters)
    assert str(refused.value).startswith(message)


def test_kfp_local_gets_no_retry_and_no_environment(specification: dict[str, Any]) -> None:
    local.adapt_to_local(specification)
    assert all("retryPolicy" not in task for task in specification["root"]["dag"]["tasks"].values())
    executors = specification["deploymentSpec"]["executors"].values()
    assert executors and all("env" not in executor["container"] for executor in executors)


def test_of_the_output_only_the_stages_own_lines_remain() -> None:
    stream = io.StringIO()
    output = local._StagesOutput(stream)
    for piece in (
        "-" * 80 + "\n",
        "    [KFP Executor 1 INFO]: Got executor_input:\n",
        '    {\n        "inputs": {\n        }\n    }\n',
        "    ",
        "training:  50%\n",
        "    \n",
        "    validation: 100%\x1b[A\n",
        "    error: prune: too large\n",
        "    [KFP Executor 2 INFO]: Wrote executor output file to x.\n",
        "\n\n",
    ):
        output.write(piece)
    assert stream.getvalue() == "training:  50%\nvalidation: 100%\nerror: prune: too large\n"


def test_a_stage_that_left_no_message_is_a_run_error(tmp_path: Path) -> None:
    error = local._read_failure(str(tmp_path))
    assert error.exit_status == 1 and str(error).startswith("a stage ended without a message")


def test_a_stage_that_left_one_gives_its_status(tmp_path: Path) -> None:
    (tmp_path / "failure.json").write_text('{"stage": "prune", "exit_status": 2, "message": "hidden_size: too large"}')
    error = local._read_failure(str(tmp_path))
    assert (str(error), error.exit_status) == ("prune: hidden_size: too large", 2)


@pytest.mark.parametrize("command", [[], *([name] for name in sorted(GROUP.commands))])
def test_help_names_every_option_and_shows_an_example(command: list[str]) -> None:
    done = CliRunner().invoke(app, [*command, "--help"])
    assert done.exit_code == 0, done.output
    shown = GROUP.commands[command[0]] if command else GROUP
    assert all(name in done.output for parameter in shown.params for name in parameter.opts if name.startswith("-"))
    example, _, settings = done.output.partition("\n  Example:\n")[2].partition("\n\n")
    assert not settings or settings.startswith("  Settings, for --set and presets:")
    program, name, *arguments = shlex.split(example.replace("\\\n", " "))
    assert program == "minitron" and name in GROUP.commands and (not command or command == [name])
    GROUP.commands[name].make_context(name, arguments)


def test_brackets_of_a_help_text_are_in_the_help() -> None:
    assert "gs://bucket[/prefix]" in CliRunner().invoke(app, ["doctor", "--help"]).output


def test_brackets_and_colons_of_paths_and_messages_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["gs://bucket[/prefix]", "/runs/[red]/:smile:", "[/]"]
    tables.print_table(["found [/]"], [[text] for text in texts])
    tables.make_console().print(*texts)
    assert capsys.readouterr().out.split() == ["found", "[/]", *texts, *texts]


def test_debug_adds_the_traceback(tmp_path: Path) -> None:
    arguments = ["run", "compress", "--preset", preset(tmp_path, sed=1), "--work-dir", str(tmp_path / "run")]
    plain, debug = CliRunner().invoke(app, arguments), CliRunner().invoke(app, [*arguments, "--debug"])
    assert plain.exit_code == debug.exit_code == 2
    assert plain.stderr == "error: sed: unknown key; did you mean 'seed'?\n"
    assert debug.stderr.startswith("Traceback") and debug.stderr.endswith(plain.stderr)


def test_an_unreachable_tracking_server_is_one_line_and_status_1(inputs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(inputs["teacher"].parent, tmp_path / "inputs" / "tiny")
    command = ["run", "compress", "--preset", "tiny", "--work-dir", str(tmp_path)]
    done = forks.minitron(*command, "--set", "tracking_uri=http://127.0.0.1:9")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: prepare: ") and "http://127.0.0.1:9" in line
    assert not (tmp_path / "summary.json").exists() and not list((tmp_path / "workspace").glob("prepare/*"))


def test_a_killed_run_resumes_where_it_was_and_a_stage_that_refuses_ends_it_with_its_status(tmp_path: Path) -> None:
    command = ["-c", forks.COMMAND, "run", "compress", "--preset", "tiny", "--work-dir", str(tmp_path)]
    command += ["--set", "finetune.max_steps=200", "--set", "prune.hidden_size=128"]
    command += ["--set", "finetune.checkpoint_interval=20", "--set", "finetune.validation_interval=100"]
    first = forks.start(command, tmp_path / "log", tmp_path / "log")
    while not list(tmp_path.glob("workspace/finetune/*.partial/checkpoints/**/trainer_state.json")):
        assert first.exitcode is None, "the run ended before it could be killed"
        time.sleep(0.05)
    os.killpg(first.pid or 0, signal.SIGKILL)
    first.join()
    killed_at = time.time()
    done = forks.python(*command)
    assert "prepare: result" in done.stdout
    start = next(line for line in done.stdout.splitlines() if line.startswith("training:"))
    assert 10 <= int(start.removeprefix("training:").partition("%")[0]) < 100, start
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("workspace/finetune/*/stage.json"))
    assert record["started"] > killed_at and record["metrics"]["tokens"] == 200 * 8 * 64
    assert (done.returncode, done.stderr.strip().count("\n")) == (2, 0)
    assert done.stderr.startswith("error: prune: prune.hidden_size: 128 is larger than the teacher's 64")
    assert not (tmp_path / "summary.json").exists()


def test_the_last_line_can_be_typed_and_hides_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    assert summary._tracking_page("https://user:secret@host/mlflow") == "https://host/mlflow"
    monkeypatch.setenv("PATH", "/nowhere")
    program, *arguments = summary._tracking_page("sqlite:////data/mlflow.db").split()
    assert Path(program).is_file() and arguments == ["ui", "--backend-store-uri", "sqlite:////data/mlflow.db"]
    monkeypatch.setenv("PATH", str(Path(program).parent))
    assert summary._tracking_page("sqlite:////data/mlflow.db").startswith("mlflow ui ")


def test_the_summary_is_read_from_the_stages_directories(tmp_path: Path) -> None:
    outputs = {stage: tmp_path / stage for stage in STAGES}
    for number, directory in enumerate(outputs.values()):
        directory.mkdir()
        record = {"seconds": number + 0.5, "peak_rss_mb": 100.0 + number, "seed": 1}
        record["metrics"] = {"tokens": 640, "tokens_per_second": 32.0, "validation_loss": 2.0}
        (directory / "stage.json").write_text(json.dumps(record))
    (outputs["register"] / "registered.json").write_text(
        '{"name": "n", "version": 3, "alias": "challenger", "model_uri": "models:/n/3", "run_id": "r"}'
    )
    model = {"parameters": 10, "validation_loss": 2.0, "perplexity": 7.4, "tasks": {"t": {"acc": 0.5}}, "kl": 0.1}
    found = summary.summarise_compression(outputs, dict.fromkeys(metrics.MODELS, model))
    del model["kl"]
    assert found == {
        "stages": {
            stage: {"seconds": number + 0.5, "peak_rss_mb": 100.0 + number} for number, stage in enumerate(STAGES)
        },
        "teacher_before": model,
        "teacher": model,
        "pruned": model,
        "student": model,
        "distill": {"tokens": 640, "tokens_per_second": 32.0},
        "registered": {"name": "n", "version": 3, "alias": "challenger"},
    }


def test_sample_inputs_are_built_in_another_process_whose_errors_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)  # as in a process that has just started
    with demo_inputs.build_aside("tiny", tmp_path):
        pass
    assert "torch" not in sys.modules
    assert all(path.is_dir() for path in demo_inputs.input_paths("tiny", tmp_path).values())
    with pytest.raises(ConfigError, match="'huge' is unknown"), demo_inputs.build_aside("huge", tmp_path):
        pass
