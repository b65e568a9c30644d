"""Start an engine's workers with torchrun, one process per GPU; follow them, and end them with this process.

A job is JSON: `{"job": name, ...}`. Its worker is a module with a guarded `main()`, so that spawned processes can
import it.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minitron.engines.divergence import Diverged
from minitron.errors import ConfigError, MinitronError, RunError

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS, _GRACE_SECONDS = 0.2, 30


def launch(
    worker: str, job: dict[str, Any], directory: Path, processes: int, follow: Callable[[], None] = lambda: None
) -> None:
    """Run a job in `processes` workers and wait for its end.

    Args:
        worker: module that torchrun runs in every process; its argument is the job's file.
        job: the job; the workers' output goes to `<directory>/<job>.log`.
        directory: directory for the job, the log and, if a worker fails, its explanation.
        processes: number of workers on this machine.
        follow: function that is called while the workers run, and once after their end.

    Raises:
        MinitronError: a worker failed. The message is the worker's own, or names the log.
    """
    name = job["job"]
    path, log, failure = (directory / f"{name}.{suffix}" for suffix in ("json", "log", "failure"))
    path.write_text(json.dumps(job))
    failure.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, "-m", worker, str(path)], stdout=stream, stderr=subprocess.STDOUT, preexec_fn=end_with_parent
        )
    try:
        while process.poll() is None:
            follow()
            time.sleep(_POLL_SECONDS)
    finally:
        _stop_process(process)
    follow()
    if process.returncode:
        raise explain_failure(name, log, failure)


def report_failure(job: Path, error: BaseException) -> None:
    """Write the error that `launch` is to raise, from within a worker; the first worker that fails wins."""
    kind = type(error).__name__
    entry = {"message": str(error) if isinstance(error, MinitronError) else f"{kind}: {error}", "kind": kind}
    failure = job.with_suffix(".failure")
    if not failure.exists():
        partial = failure.with_name(f"{failure.name}.{os.environ.get('RANK')}")
        partial.write_text(json.dumps(entry))
        partial.replace(failure)  # a reader never sees a partial file


def end_with_parent() -> None:
    """Let the kernel send SIGTERM to this process when its parent ends, even if the parent was killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def find_launcher() -> int:
    """Return the process that started torchrun, whose worker this is; another one once the launcher is dead."""
    return int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1])


def leave_group() -> None:
    """Leave the process group together with the other workers: else a worker that loses the others is aborted."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _stop_process(process: subprocess.Popen) -> None:
    """Stop torchrun, which stops its workers."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def explain_failure(job: str, log: Path, failure: Path) -> MinitronError:
    """Return the error of a failed job: the first failing worker's, or another one if no worker wrote one."""
    if not failure.is_file():
        return RunError(
            f"{job}: a worker was killed from outside; see the log {log}; if the machine ran out of memory, "
            "give the task more, or lower micro_batch_size"
        )
    entry = json.loads(failure.read_text())
    if entry["kind"] == ConfigError.__name__:
        return ConfigError(entry["message"])
    if entry["kind"] == Diverged.__name__:
        return Diverged(entry["message"])
    message = " ".join(entry["message"].split())[:500]
    if "OutOfMemory" in entry["kind"]:
        message += "; lower micro_batch_size, set gradient_checkpointing, or take more GPUs (engine nemo: and raise "
        message += "tensor_parallel_size)"
    return RunError(message if entry["kind"] == RunError.__name__ else f"{job}: {message}; see the log {log}")
