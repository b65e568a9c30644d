"""docs/deploy.md, followed: its commands run in one shell, with stand-ins that note how they were called.

The shell, its variables and the files it writes are real; what would reach a cluster or a cloud is not.
"""

import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.constants import REPOSITORY

GUIDE = REPOSITORY / "docs/deploy.md"
STAND_INS = ("gcloud", "kubectl", "kind", "docker", "git", "minitron")
STAND_IN = """#!/bin/bash
# In one write, since some run in the background.
printf '%s\\037' "${0##*/}" "$@" $'\\036' >> "$CALLS"
echo registry.example/minitron
"""


class Followed(NamedTuple):
    """What following the guide came to."""

    calls: list[list[str]]
    root: Path
    status: int
    errors: str


def blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)


@functools.cache
def follow() -> Followed:
    """Run all blocks, in a copy of what they change. An unset variable or a failing command ends it (`set -eu`)."""
    root = Path(tempfile.mkdtemp(prefix="deploy-guide-"))
    for name in ("manifests", "images"):
        shutil.copytree(REPOSITORY / name, root / name)
    commands = root / "stand-ins"
    commands.mkdir()
    for name in STAND_INS:
        (commands / name).write_text(STAND_IN)
        (commands / name).chmod(0o755)
    calls = root / "calls"
    environment = {"PATH": f"{commands}:{os.environ['PATH']}", "CALLS": str(calls), "HOME": str(root)}
    script = "set -eu\n" + "\n".join(blocks()) + "\nwait\n"
    done = subprocess.run(["bash", "-c", script], cwd=root, env=environment, capture_output=True, text=True, timeout=60)
    noted = [entry.split("\037")[:-1] for entry in calls.read_text().split("\036\037")[:-1]]
    return Followed(noted, root, done.returncode, done.stderr)


def created_secrets() -> set[tuple[str, str]]:
    """Return the secrets that the guide creates, with their keys, as kubectl itself makes them."""
    found = set()
    for call in follow().calls:
        if call[:3] == ["kubectl", "create", "secret"]:
            command = [*call, "--dry-run=client", "--output=yaml"]
            secret = yaml.safe_load(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            assert secret["metadata"]["namespace"] == "minitron"
            found |= {("Secret", f"{secret['metadata']['name']}/{key}") for key in secret["data"]}
    return found
