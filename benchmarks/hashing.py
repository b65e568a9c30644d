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
from pathlib import Path

WEIGHTS = ".safetensors"


def main() -> None:
    """Run the pipeline twice and print the claim."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="tiny")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        hashed = [_run(arguments.preset, directory / "run", directory / turn) for turn in ("first", "again")]
        models = [*(directory / "run").glob(f"workspace/*/*/*{WEIGHTS}"), *_find_teacher(directory / "run")]
        size = sum(path.stat().st_size for path in models)
    first, again = hashed
    figures = {"of_the_first": round(first / size, 3), "bytes": again, "models": len(models), "bytes_of_models": size}
    print(json.dumps({"claim": "bytes_hashed_over_models", "value": round(again / size, 3)} | figures))


def _run(preset: str, directory: Path, log: Path) -> int:
    """Run the pipeline; return the bytes of weights that its processes hashed."""
    command = [str(Path(sys.executable).with_name("minitron")), "run", "compress", "--preset", preset]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).with_name("counter")), "HASHED": str(log)}
    environment |= {"MINITRON_CACHE": str(log.with_name("cache"))}
    subprocess.run([*command, "--work-dir", str(directory)], check=True, stdout=sys.stderr, env=environment)
    return count_weights(log)


def count_weights(log: Path) -> int:
    """Return the bytes of weights in a list of what was hashed."""
    lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
    return sum(int(size) for size, path in lines if path.endswith(WEIGHTS))


def _find_teacher(directory: Path) -> list[Path]:
    """Return the weights of the teacher that the run made for itself."""
    (stage,) = directory.glob("workspace/prepare/*/stage.json")
    return [*Path(json.loads(stage.read_text())["inputs"]["teacher"]["address"]).glob(f"*{WEIGHTS}")]


if __name__ == "__main__":
    main()
