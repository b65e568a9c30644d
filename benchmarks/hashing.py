"""Count the bytes of weights that a run hashes whose results are all there: one JSON line.

Run it: `python benchmarks/hashing.py` (`make bench`).

The tiny pipeline runs twice as a user starts it, in all its processes. `value` is what the second run hashes, over the
size of the teacher and of the three models that were made; `of_the_first` is the same of the first run. The samples of
4 kB per file that say whether a file is the one that was noted are not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

WEIGHTS = ".safetensors"


def main() -> None:
    """Run the pipeline twice and print the claim."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="tiny")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        print(json.dumps(measure(lambda: _run(arguments.preset, directory), directory / "run" / "workspace")))


def measure(run: Callable[[], Path], workspace: Path) -> dict[str, Any]:
    """Run the pipeline twice; return the claim.

    Args:
        run: runs it, and returns the list of what its processes hashed.
        workspace: where the results lie.
    """
    first, again = (_count_weights(run()) for _ in range(2))
    models = [*workspace.glob(f"*/*/*{WEIGHTS}"), *_find_teacher(workspace)]
    size = sum(path.stat().st_size for path in models)
    figures = {"of_the_first": round(first / size, 3), "bytes": again, "models": len(models), "bytes_of_models": size}
    return {"claim": "bytes_hashed_over_models", "value": round(again / size, 3)} | figures


def _run(preset: str, directory: Path) -> Path:
    command = [str(Path(sys.executable).with_name("minitron")), "run", "compress", "--preset", preset]
    log = directory / "hashed"
    log.unlink(missing_ok=True)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).with_name("counter")), "HASHED": str(log)}
    environment |= {"MINITRON_CACHE": str(directory / "cache")}
    subprocess.run([*command, "--work-dir", str(directory / "run")], check=True, stdout=sys.stderr, env=environment)
    return log


def _count_weights(log: Path) -> int:
    lines = [line.split(" ", 1) for line in (log.read_text() if log.exists() else "").splitlines()]
    return sum(int(size) for size, path in lines if path.endswith(WEIGHTS))


def _find_teacher(workspace: Path) -> list[Path]:
    """Return the weights of the teacher that the run made for itself."""
    (stage,) = workspace.glob("prepare/*/stage.json")
    return [*Path(json.loads(stage.read_text())["inputs"]["teacher"]["address"]).glob(f"*{WEIGHTS}")]


if __name__ == "__main__":
    main()
