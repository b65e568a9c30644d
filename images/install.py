"""Install this package and its dependencies into a base image without changing the image's packages.

    python3 images/install.py    # in the repository's root, or in a copy of it

pip alone cannot: kfp pins requests, urllib3, protobuf and kubernetes to other versions than NVIDIA's image has.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
WITHOUT_DEPENDENCIES = ["kfp", "kfp-pipeline-spec"]
"""kfp's executor runs with the base's protobuf and requests; the other pins are for kfp's client."""

EXECUTOR = ["docstring-parser"]
"""Imports of kfp's executor that neither this package nor every base image has."""

COMPILER = {"kfp-kubernetes"}
"""Needed to compile a pipeline, which no task does."""

PIP = [sys.executable, "-m", "pip"]


def main() -> None:
    """Install, and fail if a package of the base image changed its version."""
    before = list_installed()
    # Only these of constraints.txt: its google-api-core, for one, excludes the base's protobuf; other versions do not.
    versions = {name: read_pins()[name] for name in map(canonical_name, [*list_requirements(), *EXECUTOR])} | before
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.writelines(f"{name}=={version}\n" for name, version in versions.items())
        constraints.flush()
        pip_install("--constraint", constraints.name, *list_requirements(), *EXECUTOR)
    pip_install("--no-deps", *(f"{name}=={read_pins()[name]}" for name in WITHOUT_DEPENDENCIES), str(ROOT))
    after = list_installed()
    if changed := [f"{name} {before[name]} → {after.get(name)}" for name in before if before[name] != after.get(name)]:
        sys.exit(f"install.py: the base image's packages were changed: {', '.join(changed)}")


def list_requirements() -> list[str]:
    """Return the package's dependencies that pip can resolve beside the base image's packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [line for line in project["dependencies"] if canonical_name(line) not in COMPILER | {*WITHOUT_DEPENDENCIES}]


def read_pins() -> dict[str, str]:
    """Return the versions in constraints.txt by canonical name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonical_name(line): line.partition("==")[2] for line in lines if "==" in line}


def list_installed() -> dict[str, str]:
    """Return the versions of the installed packages by canonical name."""
    listed = subprocess.run([*PIP, "list", "--format", "json"], check=True, stdout=subprocess.PIPE).stdout
    return {canonical_name(entry["name"]): entry["version"] for entry in json.loads(listed)}


def pip_install(*arguments: str) -> None:
    """Run pip install; a failure ends with pip's message and exit status."""
    if status := subprocess.run([*PIP, "install", "--no-cache-dir", *arguments]).returncode:
        sys.exit(status)


def canonical_name(requirement: str) -> str:
    """Return the name of a requirement in the canonical spelling of package indexes."""
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
