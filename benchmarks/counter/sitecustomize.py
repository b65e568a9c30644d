"""Let a Python process and its children count what they hash: put this folder on PYTHONPATH, and name a file in HASHED.

Every file that hashlib reads whole becomes a line of it: bytes and path.
"""

import hashlib
import os
from typing import Any

_read = hashlib.file_digest


def _count(stream: Any, *arguments: Any) -> Any:
    digest = _read(stream, *arguments)
    with open(os.environ["HASHED"], "a") as log:  # noqa: PTH123 - nothing is imported that a process might not need
        log.write(f"{stream.tell()} {getattr(stream, 'name', '')}\n")
    return digest


if "HASHED" in os.environ:
    hashlib.file_digest = _count  # type: ignore[assignment]
