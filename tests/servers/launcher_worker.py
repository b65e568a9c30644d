"""A worker for test_launcher.py, started by torchrun: adds up ranks over gloo, fails, or waits to be ended."""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    from minitron.engines.launcher import end_with_parent, report_failure

    end_with_parent()
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    try:
        run(job, path.parent)
    except BaseException as error:
        report_failure(path, error)
        raise


def run(job: dict, directory: Path) -> None:
    import torch
    import torch.distributed as dist

    from minitron.engines.launcher import leave_group
    from minitron.errors import ConfigError

    dist.init_process_group("gloo")
    rank = torch.tensor([dist.get_rank() + 1])
    match job["job"]:
        case "add":
            dist.all_reduce(rank)
            (directory / f"rank{dist.get_rank()}").write_text(str(rank.item()))
            leave_group()
        case "fail" if dist.get_rank() == 1:
            raise ValueError("no such\nlayer")
        case "refuse":
            raise ConfigError("size 3: too odd; choose 4")
        case "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case _:
            (directory / f"waiting-{os.getpid()}").touch()
            time.sleep(300)


if __name__ == "__main__":
    main()
