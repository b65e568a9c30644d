"""Images built and run by podman as root, without a registry and without systemd."""

import ast
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.constants import REPOSITORY

DEBIAN = "minitron-pipelines/debian:12"
PYTHON = "minitron-pipelines/python:3.11"
NEMO = "minitron-pipelines/nemo:cpu"

CONFIGURATION = """
[containers]
netns = "host"
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
compat_api_enforce_docker_hub = false
"""
"""What also works inside a virtual machine or a container: no network of its own, no systemd, modest limits."""


def configure(directory: Path) -> None:
    """Let podman, buildah and docker-py read the configuration of this test, not the machine's."""
    (directory / "containers.conf").write_text(CONFIGURATION)
    (directory / "registries.conf").write_text("unqualified-search-registries = []\n")
    os.environ["CONTAINERS_CONF"] = str(directory / "containers.conf")
    os.environ["CONTAINERS_REGISTRIES_CONF"] = str(directory / "registries.conf")


def run(*command: str | Path) -> str:
    """Run a command and return what it prints; its errors go to pytest's output."""
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout


def in_image(image: str, *command: str) -> str:
    """Run a command in a container of an image, as the image's user."""
    return run("podman", "run", "--rm", image, *command)


def found_in_image(image: str, *conditions: str) -> list[str]:
    """Return the paths for which find's conditions hold, in all of the image."""
    command = ("find", "/", "-xdev", "(", "-path", "/proc", "-o", "-path", "/sys", ")", "-prune", "-o")
    return run("podman", "run", "--rm", "--user", "root", image, *command, *conditions, "-print").splitlines()


def packages(image: str) -> dict[str, str]:
    """Return the versions of the Python packages in an image by name."""
    listed = in_image(image, "python3", "-m", "pip", "list", "--format", "json", "--disable-pip-version-check")
    return {entry["name"]: entry["version"] for entry in json.loads(listed)}


def inspect(image: str) -> dict[str, Any]:
    """Return an image's configuration."""
    return json.loads(run("podman", "image", "inspect", image))[0]


def make_debian(directory: Path) -> None:
    """Make an image of this machine's release of Debian, with Python, from this machine's mirror."""
    if subprocess.run(["podman", "image", "exists", DEBIAN]).returncode == 0:
        return
    root, codename = directory / "debian", platform.freedesktop_os_release()["VERSION_CODENAME"]
    included = "--include=ca-certificates,python3,python3-venv"
    run("debootstrap", "--variant=minbase", included, codename, root, _mirror(codename))
    with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as tar:
        subprocess.run(["podman", "import", "--quiet", "-", DEBIAN], check=True, stdin=tar.stdout)
    assert tar.returncode == 0


def _mirror(codename: str) -> str:
    """Return the address that this machine has Debian's packages from."""
    wanted = ["Origin: Debian", "Label: Debian", "Component: main", f"Codename: {codename}"]
    found = run("apt-get", "indextargets", "--format", "$(REPO_URI)", "Identifier: Packages", *wanted).split()
    assert found, f"no source of {codename} in /etc/apt; run apt-get update"
    return found[0]


def build(directory: Path, dockerfile: str, tag: str, base: str, *options: str) -> None:
    """Build an image in the repository; pip has this machine's configuration while it builds, not in the image."""
    command: list[str | Path] = ["buildah", "bud", "--isolation", "chroot", "--network", "host", "--layers"]
    for source, target in pip_mounts(directory):
        command += ["--volume", f"{source}:{target}:ro"]
    command += ["--build-arg", f"BASE_IMAGE=localhost/{base}", *options, "--tag", tag]
    run(*command, "--file", REPOSITORY / dockerfile, REPOSITORY)


def pip_mounts(directory: Path) -> list[tuple[Path, Path]]:
    """Return what pip needs in the build as it is configured here: one pip.conf, and every path that it names."""
    values = pip_settings()
    configuration = directory / "pip.conf"
    configuration.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in values.items()))
    words = {word.removeprefix("file://") for value in values.values() for word in value.split()}
    paths = {_mounted(Path(word)) for word in words if word.startswith("/") and Path(word).exists()}
    return [(configuration, Path("/etc/pip.conf")), *((path, path) for path in sorted(paths))]


def _mounted(path: Path) -> Path:
    """Mount a file's directory: certificates are links to their neighbors; and an index beside the files it links."""
    return path.parent if path.is_file() or path.name == "simple" else path


def pip_settings() -> dict[str, str]:
    """Return pip's options from its files and the environment, which win."""
    lines = run(sys.executable, "-m", "pip", "config", "list").splitlines()
    pairs = [line.partition("=")[::2] for line in lines if "=" in line]
    pairs.sort(key=lambda pair: pair[0].startswith(":env:"))
    return {name.rpartition(".")[2]: " ".join(ast.literal_eval(value).split()) for name, value in pairs}
