"""The command `minitron`, as a user starts it, and what README and docs show."""

import os
import re
import sys
from pathlib import Path

from tests.constants import REPOSITORY

BIN = Path(sys.executable).parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}

RETRAIN = "minitron run retrain --preset tiny --work-dir runs/nightly"
"""tests/flows/test_retrain.py runs it, in a directory of its own."""


def read_blocks(page: str, language: str) -> list[str]:
    """Return the content of a page's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (REPOSITORY / page).read_text(), re.DOTALL | re.MULTILINE)


def read_shell_lines(page: str) -> list[str]:
    """Return the command lines of a page, each on one line."""
    return "".join(read_blocks(page, "sh")).replace("\\\n", " ").splitlines()
