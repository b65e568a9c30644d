"""What the tests of this folder run, in this process."""

from typing import Any

from typer.testing import CliRunner

from minitron.cli.app import app

JOB = ["compress", "--preset", "nemo-tutorial-width", "--preset", "gke-spot", "--set", "corpus=gs://bucket/text"]
JOB += ["--set", "teacher=hf://meta-llama/Llama-3.1-8B", "--set", "tracking_uri=http://mlflow.minitron:5000", "--yes"]


def run_minitron(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def run_ok(*arguments: str) -> str:
    done = run_minitron(*arguments)
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.stdout


def schedule_ok(*arguments: str) -> str:
    """Return the line that says what became of a schedule: it is after the table of what its tasks ask for."""
    return run_ok(*arguments).splitlines()[-2]


def run_refused(*arguments: str) -> str:
    """Return the one line of a failure; the exit status is 1 or 2."""
    done = run_minitron(*arguments)
    assert done.exit_code in (1, 2) and isinstance(done.exception, SystemExit), done.output + repr(done.exception)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")
