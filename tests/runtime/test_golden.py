"""Results are found again by their keys: they stay what they were, or a workspace would be lost.

`golden.json` was written by version 0.1.0 from a run of the preset `tiny`: inputs, datasets, weights and losses are its
own. Two versions changed keys: 0.2 that of prepare (document_separator and own_splits are in it, since the same corpus
may give other documents now), 0.4 those of finetune, prune, distill and evaluate (what decides no result left them).
"""

import json
from pathlib import Path
from typing import Any

import pytest

import minitron
from minitron.config.parse import parse
from minitron.config.stages import STAGES
from minitron.runtime import record, stage
from minitron.runtime.inputs import Input

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden.json").read_text())


@pytest.mark.parametrize("name", STAGES)
def test_the_key_of_a_stage_is_what_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a later release of the package, too."""
    monkeypatch.setattr(minitron, "__version__", "0.99.1")
    monkeypatch.setattr(record, "__version__", "0.99.1")
    assert compute_key(name) == GOLDEN["stages"][name]["key"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("finetune", {"micro_batch_size": 1, "gradient_checkpointing": True, "checkpoint_interval": 7}),
        ("prune", {"micro_batch_size": 1, "importance": "/pruned"}),
        ("distill", {"micro_batch_size": 2, "gradient_checkpointing": True, "checkpoint_interval": 7}),
        ("evaluate", {"micro_batch_size": 1, "unsafe_tasks": ["tiny_continuation"]}),
        ("register", {"workspace": "/elsewhere", "experiment": "another"}),
    ],
)
def test_what_decides_no_result_is_in_no_key(name: str, change: dict[str, Any]) -> None:
    assert compute_key(name, **change) == GOLDEN["stages"][name]["key"]


def test_the_micro_batches_decide_where_a_loss_is_balanced_in_each() -> None:
    matched = {"engine": "nemo", "intermediate_layers": [[1, 1]]}
    assert compute_key("distill", **matched) != compute_key("distill", **matched, micro_batch_size=1)
    assert compute_key("distill", engine="nemo") == compute_key("distill", engine="nemo", micro_batch_size=1)
    matched["engine"] = "hf"
    assert compute_key("distill", **matched) == compute_key("distill", **matched, micro_batch_size=1)


@pytest.mark.parametrize(
    ("setting", "default", "other"),
    [
        ("divergence_beta", 0.0, 0.5),
        ("kl_weight", 1.0, [1.0, 0.5]),
        ("intermediate_weight", [1.0, 0.0], 1.0),
        ("cut_learning_rate_factor", 1.0, 2.0),
    ],
)
def test_a_newer_setting_of_distill_is_in_the_key_unless_it_is_the_default(
    setting: str, default: Any, other: Any
) -> None:
    assert compute_key("distill", **{setting: other}) != compute_key("distill")
    assert compute_key("distill", **{setting: default}) == compute_key("distill")


def test_another_method_of_pruning_has_another_key() -> None:
    assert compute_key("prune", method="compensated") != compute_key("prune") == compute_key("prune", method="minitron")


@pytest.mark.parametrize("package", record.NEMO)
@pytest.mark.parametrize("name", ["finetune", "prune", "distill"])
def test_another_release_of_what_nemo_is_made_of_gives_another_key(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A patch of it does not; nor does any release for engine hf."""
    installed = dict.fromkeys(record.NEMO, "2.6.2")
    monkeypatch.setattr(record, "version", lambda name: installed[name])
    keys = [compute_key(name, engine="nemo"), compute_key(name)]
    installed[package] = "2.6.3rc1"
    assert keys == [compute_key(name, engine="nemo"), compute_key(name)]
    installed[package] = "2.7.0"
    assert keys[0] != compute_key(name, engine="nemo") and keys[1] == compute_key(name)


def compute_key(name: str, **change: Any) -> str:
    """Return the key of a golden stage with some settings changed."""
    golden = GOLDEN["stages"][name]
    where = {"output": "/output", "tracking_uri": "http://mlflow:5000"}
    config = parse(name, golden["config"] | where | change)
    inputs = {field: Input(field, sha256, None) for field, sha256 in golden["inputs"].items()}
    return stage._compute_key(name, config, inputs)
