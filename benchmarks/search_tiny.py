"""Time a whole search on the preset tiny, race and compression of the winner: one JSON line.

Run it: `python benchmarks/search_tiny.py --runs 3`. Each run has its own work directory, so that nothing is reused.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median


def main() -> None:
    """Run the search and print the claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    seconds = [time_search() for _ in range(parser.parse_args().runs)]
    claim = {
        "claim": "search_tiny_seconds", "value": round(median(seconds), 1), "unit": "s", "target": 120,
        "better": "lower", "against": None, "runs": len(seconds), "machine": platform.machine(),
    }  # fmt: skip
    print(json.dumps(claim))


def time_search() -> float:
    """Return the seconds of `minitron run search --preset tiny` in a new directory."""
    program = str(Path(sys.executable).with_name("minitron"))
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        command = [program, "run", "search", "--preset", "tiny", "--work-dir", directory]
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
