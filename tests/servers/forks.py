"""Start Python processes fast: fork them from one that has imported the modules of the stages, which takes seconds.

Use this if a test needs a process (its environment, directory, output, end) and not the way it starts. test_flow.py
starts the flow as a user does. Libraries have read the environment during their import: a test of that needs
`subprocess`.
"""

import concurrent.futures.thread
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

STAGES = (
    "prepare", "finetune", "prune", "distill", "evaluate", "register", "plan", "resolve", "promote", "conclude",
    "select", "trial",
)  # fmt: skip
MLFLOW = (
    "uvicorn",
    "mlflow",
    "mlflow.cli",
    "mlflow.server.fastapi_app",
    "mlflow.pyfunc",
    "mlflow.store.tracking.sqlalchemy_store",
)
OTHERS = (
    "kfp.local",
    "kfp.dsl.executor_main",
    "minitron.cli.app",
    "pytest",
    "transformers.models.llama.modeling_llama",
)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([*(f"minitron.stages.{stage}" for stage in STAGES), *MLFLOW, *OTHERS])

COMMAND = "from tests.servers import forks\nforks.fork_tasks()\nfrom minitron.cli.app import main\nmain()"


def start_python(
    arguments: Iterable[str],
    stdout: Path,
    stderr: Path,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> BaseProcess:
    """Start `python -c CODE ARGUMENT...` or `python -m MODULE ARGUMENT...` in a session of its own."""
    # A process that was forked cannot reach the server, and is as good: it is the server's copy.
    own = multiprocessing.parent_process() is None
    context = SERVER if own else multiprocessing.get_context("fork")
    values = [*arguments], dict(environment or os.environ), directory or Path.cwd(), (stdout, stderr), own
    process = context.Process(target=_become_program, args=values)
    process.start()
    return process


def run_python(
    *arguments: str, environment: Mapping[str, str] | None = None, directory: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a Python process, and return its result."""
    (done,) = run_together(arguments, environment=environment, directory=directory)
    return done


def run_minitron(
    *arguments: str, environment: Mapping[str, str] | None = None, directory: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `minitron ARGUMENT...`, whose tasks are forked, too."""
    return run_python("-c", COMMAND, *arguments, environment=environment, directory=directory)


def run_together(
    *commands: Iterable[str],
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    timeout: float = 560,
) -> list[subprocess.CompletedProcess[str]]:
    """Run Python processes at the same time; kill those left at the end."""
    deadline, processes, ended = time.monotonic() + timeout, [], []
    with tempfile.TemporaryDirectory() as name:
        try:
            for number, command in enumerate(commands):
                outputs = [Path(name) / f"{number}.{kind}" for kind in ("out", "err")]
                processes.append((start_python(command, *outputs, environment, directory), command, outputs))
            for process, command, outputs in processes:
                process.join(max(0, deadline - time.monotonic()))
                assert process.exitcode is not None, f"{command} takes more than {timeout} seconds"
                text = [path.read_text() if path.exists() else "" for path in outputs]
                ended.append(subprocess.CompletedProcess([*command], process.exitcode, *text))
        finally:
            for process, *_ in processes:
                process.kill()
                process.join()
    return ended


def fork_tasks() -> None:
    """Let kfp.local fork the tasks of a pipeline."""
    from kfp.local import subprocess_task_handler

    subprocess_task_handler.run_local_subprocess = _run_task


def _run_task(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
    """Do what kfp's `sh -ec SCRIPT COMPONENT OPTION...` does."""
    component, options = full_command[3], full_command[4:]
    with tempfile.TemporaryDirectory() as name:
        module, log = Path(name) / "component.py", Path(name) / "log"
        module.write_text(component)
        arguments = ["-m", "kfp.dsl.executor_main", "--component_module_path", str(module), *options]
        task = start_python(arguments, log, log, os.environ | (env_vars or {}) | {"_KFP_RUNTIME": "true"})
        task.join()
        for line in log.read_text().splitlines():
            print(line)  # indented, by which `minitron run` knows a stage's lines
    assert task.exitcode is not None
    return task.exitcode


def _become_program(
    arguments: list[str], environment: dict[str, str], directory: Path, outputs: tuple[Path, Path], session: bool
) -> None:
    concurrent.futures.thread._threads_queues.clear()  # in a loop of kfp.local a pool's thread forks, and is awaited
    if session:
        os.setsid()
    else:
        os.closerange(3, 1024)  # as exec does: what its parent holds, its locks too, is not its own
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    kind, program, *sys.argv[1:] = arguments
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(compile(program, "-c", "exec"), {"__name__": "__main__"})
