"""Follow docs/how-to/deploy.md: run its commands in one shell, with stand-ins that record their arguments.

The shell, its variables and its files are real; the commands that reach a cluster or a cloud are stand-ins.
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

GUIDE = REPOSITORY / "docs/how-to/deploy.md"
STAND_INS = ("gcloud", "kubectl", "kind", "docker", "git", "minitron")
STAND_IN = """#!/bin/bash
# In one write, since some run in the background.
printf '%s\\037' "${0##*/}" "$@" $'\\036' >> "$CALLS"
echo registry.example/minitron
"""


class Followed(NamedTuple):
    """The outcome of following the guide."""

    calls: list[list[str]]
    root: Path
    status: int
    errors: str


def read_blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)


@functools.cache
def follow_guide() -> Followed:
    """Run all blocks in a copy of the directories that they change, under `set -eu`."""
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
    script = "set -eu\n" + "\n".join(read_blocks()) + "\nwait\n"
    done = subprocess.run(["bash", "-c", script], cwd=root, env=environment, capture_output=True, text=True, timeout=60)
    recorded = [entry.split("\037")[:-1] for entry in calls.read_text().split("\036\037")[:-1]]
    return Followed(recorded, root, done.returncode, done.stderr)


def created_secrets() -> set[tuple[str, str]]:
    """Return the secrets that the guide creates, with their keys, as kubectl makes them."""
    secrets = set()
    for call in follow_guide().calls:
        if call[:3] == ["kubectl", "create", "secret"]:
            command = [*call, "--dry-run=client", "--output=yaml"]
            secret = yaml.safe_load(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            assert secret["metadata"]["namespace"] == "minitron"
            secrets |= {("Secret", f"{secret['metadata']['name']}/{key}") for key in secret["data"]}
    return secrets
