"""A worker for test_sharding.py, started by torchrun: runs several trainings in one start of the processes."""

import json
import sys
from pathlib import Path


def main() -> None:
    from minitron.engines.hf import worker
    from minitron.engines.launcher import end_with_parent, leave_group

    end_with_parent()
    worker.join_group()
    for job in json.loads(Path(sys.argv[1]).read_text())["jobs"]:
        worker.train(job)
    leave_group()


if __name__ == "__main__":
    main()
