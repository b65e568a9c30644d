"""The wheel has what the package needs beside its code."""

import shutil
import subprocess
import sys
from zipfile import ZipFile

import pytest

from tests.constants import REPOSITORY

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "minitron", "components", "pipelines")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """A wheel, built as pip does it, of a copy: the build leaves directories beside the sources."""
    directory = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, directory / name)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=directory, check=True, capture_output=True)
    (path,) = directory.glob("dist/*.whl")
    return ZipFile(path)


def test_the_license_is_in_it_and_named_in_its_metadata(wheel: ZipFile) -> None:
    (information,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert "Apache License" in wheel.read(f"{information}/licenses/LICENSE").decode()
    metadata = wheel.read(f"{information}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata and "License-File: LICENSE" in metadata


def test_type_checkers_of_who_uses_it_read_its_types(wheel: ZipFile) -> None:
    assert "minitron/py.typed" in wheel.namelist()


def test_every_module_template_pipeline_and_preset_is_in_it(wheel: ZipFile) -> None:
    kinds = {".py", ".j2", ".yaml"}
    ours = {path for name in SOURCES for path in (REPOSITORY / name).rglob("*") if path.suffix in kinds}
    expected = {path.relative_to(REPOSITORY).as_posix() for path in ours}
    in_wheel = {name.removeprefix("minitron/") for name in wheel.namelist()}
    assert {name.removeprefix("minitron/") for name in expected} <= in_wheel
