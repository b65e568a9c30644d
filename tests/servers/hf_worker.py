"""A worker for tests/engines, started by torchrun: runs several jobs of engine hf in one start of the processes."""

import json
import sys
from pathlib import Path


def main() -> None:
    from minitron.engines.hf import worker
    from minitron.engines.launcher import end_with_parent, leave_group, report_failure

    end_with_parent()
    path = Path(sys.argv[1]).absolute()
    try:
        worker.join_group()
        for job in json.loads(path.read_text())["jobs"]:
            worker.prune(job) if job["job"] == "prune" else worker.train(job)
        leave_group()
    except Exception as error:
        report_failure(path, error)
        raise


if __name__ == "__main__":
    main()
