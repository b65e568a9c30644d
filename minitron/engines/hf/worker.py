"""The worker of engine hf on several GPUs, one per GPU: `torchrun -m minitron.engines.hf.worker JOB.json`."""

import json
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

PATIENCE = timedelta(hours=2)
"""How long the other processes wait for process 0, which solves the fits of a layer, or writes texts."""


def main() -> None:
    """Run the job in the file that the argument names."""
    if os.environ["RANK"] != "0":
        os.environ |= {"TQDM_DISABLE": "1"}  # tqdm reads it when it is imported
    from minitron.engines.launcher import end_with_parent, find_launcher, leave_group, report_failure
    from minitron.storage.files import disk_errors

    end_with_parent()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    launcher = find_launcher()
    path = Path(sys.argv[1]).absolute()
    try:
        job = json.loads(path.read_text())
        join_group(None if job["job"] == "train" else PATIENCE)
        with disk_errors(Path(job["work"])):
            match job["job"]:
                case "evaluate":
                    measure(job)
                case "prune":
                    prune(job)
                case _:
                    train(job, lambda: find_launcher() == launcher)
        leave_group()
    except Exception as error:
        report_failure(path, error)
        raise


def join_group(patience: timedelta | None = None) -> None:
    """Take this process's GPU, and meet the other processes; what is on the CPU is exchanged over gloo.

    Args:
        patience: how long a process waits for the others; None: PyTorch's default, 10 minutes on GPUs.
    """
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=patience)
    if on_gpu:
        torch.cuda.set_device(dist.get_node_local_rank())


def train(job: dict[str, Any], may_save: Callable[[], bool] = lambda: True) -> None:
    """Train from the last checkpoint, if there is one; process 0 finds it.

    Args:
        job: see `training.make_job`.
        may_save: says at SIGTERM whether the state may be saved. If the stage is dead, the next attempt may be at work.
    """
    from minitron.config.parse import parse
    from minitron.fast_imports import many_imports

    with many_imports():
        import torch.distributed as dist

        from minitron.engines.hf import loop
        from minitron.engines.progress import find_start

    work = Path(job["work"])
    teacher = job["teacher"] and loop.Teacher(*(place and Path(place) for place in job["teacher"]))
    start: list[Any] = [find_start(work) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(start)
    config: Any = parse(job["stage"], job["config"])
    loop.train(config, Path(job["initial"]), teacher, work, start[0], may_save=may_save)


def measure(job: dict[str, Any]) -> None:
    """Measure the models of an evaluation; `job` is that of `measuring.make_job`."""
    from minitron.fast_imports import many_imports

    with many_imports():
        from minitron.engines.hf.measuring import measure_in_worker

    measure_in_worker(job)


def prune(job: dict[str, Any]) -> None:
    """Cut a student out of its teacher; `job` is that of `pruning.make_job`."""
    from minitron.fast_imports import many_imports

    with many_imports():
        from minitron.engines.hf.pruning import prune_in_worker

    prune_in_worker(job)


if __name__ == "__main__":
    main()
