"""Results are found again by their keys: those of version 0.1.0 stay what they were, or a workspace would be lost.

`golden.json` was written by version 0.1.0 from a run of the preset `tiny`. The key of prepare is a later one: the
settings document_separator and own_splits are in it, since the same corpus may give other documents now. Its dataset is
the same, byte for byte, and so are the keys of all stages after it.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from minitron.config.parse import parse
from minitron.config.stages import STAGES
from minitron.runtime import stage
from minitron.runtime.inputs import Input

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden.json").read_text())


@pytest.mark.parametrize("name", STAGES)
def test_the_key_of_a_stage_is_that_of_version_0_1_0(name: str) -> None:
    golden = GOLDEN["stages"][name]
    where = {"output": "/output", "tracking_uri": "http://mlflow:5000"}
    config = parse(name, golden["config"] | where)
    inputs = {field: Input(field, sha256, None) for field, sha256 in golden["inputs"].items()}
    assert stage._compute_key(name, config, inputs) == golden["key"]
