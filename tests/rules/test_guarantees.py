"""docs/guarantees.md is true: each guarantee has a test, and each file of tests has a guarantee."""

import ast
import re

import pytest

from tests.constants import REPOSITORY

PAGE = (REPOSITORY / "docs" / "guarantees.md").read_text()
ROWS = re.findall(r"^\| ([^|]+) \| `(tests/[\w/]+\.py)::(\w+)` \|$", PAGE, re.MULTILINE)
NIGHTLY = "tests/images/"


def test_every_row_of_the_page_is_read() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| ") and "| test |" not in line]
    assert len(lines) == len(ROWS) > 50


@pytest.mark.parametrize(("guarantee", "path", "name"), ROWS, ids=[row[0] for row in ROWS])
def test_every_test_that_is_named_exists(guarantee: str, path: str, name: str) -> None:
    tree = ast.parse((REPOSITORY / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_file_of_tests_holds_a_guarantee() -> None:
    files = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "tests").rglob("test_*.py")}
    assert files == {path for _, path, _ in ROWS}


def test_only_the_last_section_is_left_to_the_night() -> None:
    by_day, by_night = PAGE.split("\n## Nightly\n")
    assert NIGHTLY not in by_day
    assert {path for _, path, _ in ROWS if path in by_night} == {path for _, path, _ in ROWS if NIGHTLY in path}
