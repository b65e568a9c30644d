"""The names of the files that stages leave for each other, and the record of a result."""

import json
from pathlib import Path
from typing import Any, TypeGuard

RECORD = "stage.json"
"""The file that makes a stage's directory complete: written last, never part of the directory's content hash."""

AWAITED = f"{RECORD}.partial"
"""What is in its place while a directory is uploaded to a bucket."""


def read_record(directory: Path) -> dict[str, Any] | None:
    """Return the record of a stage's result; None where there is none, or a file of that name that is no record."""
    try:
        record = json.loads((directory / RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if is_record(record) else None


def is_record(found: Any) -> TypeGuard[dict[str, Any]]:
    """Say whether the content of a JSON file is the record of a stage's result."""
    return isinstance(found, dict) and {"stage", "key", "output_sha256"} <= found.keys()


CONCLUSION, PAGE, REPORT = "conclusion.json", "conclusion.html", "report.html"
"""What conclude leaves, outcome and reason and a page that says them; what evaluate leaves, and the run's directory."""
