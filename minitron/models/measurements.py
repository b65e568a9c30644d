"""Measurements that take hours, kept in the workspace part by part.

A part is a file, written in one rename. An evaluation that was killed, or whose gates were changed, measures only the
missing parts.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from minitron.config.metrics import find_not_finite
from minitron.storage.files import write_atomically


class Measurements:
    """The parts of one set of measurements, in a directory that is created with the first part."""

    def __init__(self, directory: Path, stage: str = "evaluate") -> None:
        """Set the directory, whose name identifies everything that affects the measurements, and the stage's name."""
        self.directory, self._stage = directory, stage

    def read(self, part: str) -> dict[str, Any] | None:
        """Return a part; None if it is missing."""
        with suppress(FileNotFoundError, ValueError):
            return json.loads(self._path(part).read_text())
        return None

    def write(self, part: str, content: dict[str, Any]) -> None:
        """Write a part."""
        write_atomically(self._path(part), content)

    def get(self, part: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a part; measure it if it is missing. A part with a number that is not finite is not kept."""
        content = self.read(part)
        if content is None:
            content = measure()
            if find_not_finite(content) is None:
                self.write(part, content)
        else:
            print(f"{self._stage}: {part} was measured before: {self._path(part)}", flush=True)
        return content

    def delete(self) -> None:
        """Delete all parts, and the parent directory if it is empty."""
        shutil.rmtree(self.directory, ignore_errors=True)
        with suppress(OSError):
            self.directory.parent.rmdir()

    def _path(self, part: str) -> Path:
        return self.directory / f"{part}.json"
