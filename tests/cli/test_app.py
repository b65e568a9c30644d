"""What `minitron run` does before and after the stages: arguments, the adapted pipeline, output, failures, summary.

The run itself is in test_flow.py.
"""

import io
import json
import os
import shlex
import signal
import sqlite3
import subprocess
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
from minitron.config.pipelines import compiled_pipeline
from minitron.config.stages import STAGES
from minitron.errors import ConfigError
from tests.servers import forks
from tests.servers.processes import wait_until

GROUP: Any = typer.main.get_command(app)
PLACES = {"teacher": "teacher", "corpus": "corpus"}


@pytest.fixture
def specification() -> dict[str, Any]:
    return compiled_pipeline("compress")[0]


def write_preset(directory: Path, **values: Any) -> str:
    path = directory / "mine.yaml"
    path.write_text(yaml.safe_dump(PLACES | values))
    return str(path)


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
    error = local._read_failure(str(tmp_path), [])
    assert error.exit_status == 1 and str(error).startswith("a stage ended without a message")


def test_a_stage_that_left_one_gives_its_status(tmp_path: Path) -> None:
    (tmp_path / "failure.json").write_text('{"stage": "prune", "exit_status": 2, "message": "hidden_size: too large"}')
    error = local._read_failure(str(tmp_path), [])
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
    arguments = ["run", "compress", "--preset", write_preset(tmp_path, sed=1), "--work-dir", str(tmp_path / "run")]
    plain, debug = CliRunner().invoke(app, arguments), CliRunner().invoke(app, [*arguments, "--debug"])
    assert plain.exit_code == debug.exit_code == 2
    assert plain.stderr == "error: sed: unknown key; did you mean 'seed'?\n"
    assert debug.stderr.startswith("Traceback") and debug.stderr.endswith(plain.stderr)


def test_an_unreachable_tracking_server_is_one_line_and_status_1(tmp_path: Path) -> None:
    command = ["run", "compress", "--preset", "tiny", "--work-dir", str(tmp_path)]
    done = forks.run_minitron(*command, "--set", "tracking_uri=http://127.0.0.1:9")
    assert done.returncode == 1 and "error: " not in done.stdout
    error, command_again = done.stderr.strip().splitlines()
    assert error.startswith("error: prepare: ") and "http://127.0.0.1:9" in error
    assert command_again.startswith("continue: minitron run compress --preset tiny ")
    assert not (tmp_path / "summary.json").exists() and not list((tmp_path / "workspace").glob("prepare/*"))


def read_statuses(work_dir: Path) -> dict[str, str]:
    """Return the status of each run in MLflow, by its name; the pipeline run's name is `run`."""
    with sqlite3.connect(work_dir / "mlflow.db") as database:
        rows = database.execute("select name, status from runs").fetchall()
    stages = {name.partition(" · ")[0]: status for name, status in rows}
    return {name if name in STAGES else "run": status for name, status in stages.items()}


def list_session(leader: int) -> str:
    return subprocess.run(["ps", "-o", "pid=,args=", "-s", str(leader)], capture_output=True, text=True).stdout


def test_a_run_ends_with_its_stage_however_it_ends_and_resumes_where_it_was(tmp_path: Path) -> None:
    """A signal to `minitron run` alone, SIGKILL to it alone, SIGKILL to all; and a stage that refuses in the end."""
    arguments = ["run", "compress", "--preset", "tiny", "--work-dir", str(tmp_path)]
    arguments += ["--set", "finetune.max_steps=200", "--set", "distill.max_steps=1", "--set", "evaluate.num_fewshot=2"]
    arguments += ["--set", "finetune.checkpoint_interval=20", "--set", "finetune.validation_interval=100"]
    command = ["-c", forks.COMMAND, *arguments]
    complete = "workspace/finetune/*.partial/checkpoints/checkpoint-*/complete.json"
    for kill, number in ((os.kill, signal.SIGTERM), (os.kill, signal.SIGKILL), (os.killpg, signal.SIGKILL)):
        before = set(tmp_path.glob(complete))
        process = forks.start_python(command, tmp_path / "log", tmp_path / "log")
        while not set(tmp_path.glob(complete)) - before:
            assert process.exitcode is None, "the run ended before it could be killed"
            time.sleep(0.05)
        kill(process.pid or 0, number)
        process.join()
        wait_until(lambda leader=process.pid or 0: not list_session(leader))
        if kill is os.kill:
            assert read_statuses(tmp_path) == {"run": "KILLED", "prepare": "FINISHED", "finetune": "KILLED"}
        if number == signal.SIGTERM:
            assert process.exitcode == 128 + number
            lines = (tmp_path / "log").read_text().splitlines()
            assert "SIGTERM: the stage ends; a second signal ends it at once" in lines
            assert lines[-2] == "error: ended by SIGTERM; finished stages and checkpoints are kept"
            assert lines[-1] == f"continue: {shlex.join(['minitron', *arguments])}"
    killed_at = time.time()
    done = forks.run_python(*command)
    assert "prepare: result" in done.stdout
    start = next(line for line in done.stdout.splitlines() if line.startswith("training:"))
    assert 10 <= int(start.removeprefix("training:").partition("%")[0]) < 100, start
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("workspace/finetune/*/stage.json"))
    assert record["started"] > killed_at and record["metrics"]["tokens"] == 200 * 8 * 64
    assert (done.returncode, done.stderr.strip().count("\n")) == (2, 0)
    assert done.stderr.startswith(
        "error: evaluate: evaluate.num_fewshot: tiny_continuation has no examples apart from "
    )
    assert "has no examples" not in done.stdout
    assert not (tmp_path / "summary.json").exists()


def test_a_work_dir_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    preset, file = write_preset(tmp_path), tmp_path / "file"
    file.touch()
    for work_dir, reason in (
        (file, "is a file"),
        (file / "run", "Not a directory"),
        (Path("/proc/run"), "No such file"),
    ):
        done = CliRunner().invoke(app, ["run", "compress", "--preset", preset, "--work-dir", str(work_dir)])
        assert done.exit_code == 2 and done.stderr.startswith(f"error: --work-dir {work_dir}: {reason}"), done.stderr


def test_the_last_line_can_be_typed_and_hides_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    assert summary._tracking_page("https://user:secret@host/mlflow") == "https://host/mlflow"
    monkeypatch.setenv("PATH", "/nowhere")
    program, *arguments = shlex.split(summary._tracking_page("sqlite:////my data/mlflow.db"))
    assert Path(program).is_file() and arguments == ["ui", "--backend-store-uri", "sqlite:////my data/mlflow.db"]
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
    found = summary.summarize_compression(outputs, dict.fromkeys(metrics.MODELS, model))
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
