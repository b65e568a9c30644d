"""The command `minitron`, as a user starts it."""

import os
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}

RETRAIN = "minitron run retrain --preset tiny --work-dir runs/nightly"
"""tests/flows/test_retrain.py runs it, in a directory of its own."""
