"""Install this package and what it needs into a base image without changing any package that is there.

python3 images/install.py    (in the repository's root, or where a Dockerfile has copied it)

pip cannot do it alone: kfp pins requests, urllib3, protobuf and kubernetes in other versions than NVIDIA's image has.
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
"""Their executor runs with the base's protobuf and requests; the rest of what they pin is for kfp's client."""

EXECUTOR = ["docstring-parser"]
"""What kfp's executor imports, and neither this package nor, perhaps, the base image needs."""

COMPILER = {"kfp-kubernetes"}
"""For who compiles a pipeline: no task does."""

PIP = [sys.executable, "-m", "pip"]


def main() -> None:
    """Install, and fail if a package of the base image has another version afterwards."""
    before = installed()
    # Of constraints.txt only what is named here: its google-api-core, say, excludes the base's protobuf, but others do.
    versions = {name: pinned()[name] for name in map(canonical, [*requirements(), *EXECUTOR])} | before
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.writelines(f"{name}=={version}\n" for name, version in versions.items())
        constraints.flush()
        install("--constraint", constraints.name, *requirements(), *EXECUTOR)
    install("--no-deps", *(f"{name}=={pinned()[name]}" for name in WITHOUT_DEPENDENCIES), str(ROOT))
    after = installed()
    if changed := [f"{name} {before[name]} → {after.get(name)}" for name in before if before[name] != after.get(name)]:
        sys.exit(f"install.py: the base image's packages were changed: {', '.join(changed)}")


def requirements() -> list[str]:
    """Return the package's dependencies that pip can resolve beside the base image's packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [line for line in project["dependencies"] if canonical(line) not in COMPILER | {*WITHOUT_DEPENDENCIES}]


def pinned() -> dict[str, str]:
    """Return the versions in constraints.txt by canonical name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonical(line): line.partition("==")[2] for line in lines if "==" in line}


def installed() -> dict[str, str]:
    """Return the versions of the installed packages by canonical name."""
    listed = subprocess.run([*PIP, "list", "--format", "json"], check=True, stdout=subprocess.PIPE).stdout
    return {canonical(entry["name"]): entry["version"] for entry in json.loads(listed)}


def install(*arguments: str) -> None:
    """Run pip install; a failure is pip's own message and exit status."""
    if status := subprocess.run([*PIP, "install", "--no-cache-dir", *arguments]).returncode:
        sys.exit(status)


def canonical(requirement: str) -> str:
    """Return the name at the beginning of a requirement as indexes spell it."""
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
