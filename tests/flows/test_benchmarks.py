"""The measurements of benchmarks/ run, and what they claim holds, with room for a busy machine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from minitron.config.stages import EvaluateConfig
from tests.constants import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"


def measured(name: str, *options: str) -> dict[str, Any]:
    (claim,) = measure_lines(name, *options)
    return claim


def measure_lines(name: str, *options: str) -> list[dict[str, Any]]:
    done = subprocess.run([sys.executable, str(BENCHMARKS / name), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_cuts_are_compared_at_the_same_size_and_tokens(teacher: Path, tmp_path: Path) -> None:
    """On random tokens, which no student can learn: that every kind of student is measured, before and after."""
    tokens = np.random.default_rng(0).integers(0, 512, (16 + 32 + 2 * 2) * 512)
    np.save(tmp_path / "tokens.npy", tokens.astype(np.uint16))
    options = ["--seeds", "1", "--steps", "2", "--rates", "1e-4"]
    options += ["--intermediate-size", "64", "--hidden-size", "48", "--layers", "3"]
    claims = measure_lines("pruning_quality.py", str(teacher), str(tmp_path / "tokens.npy"), *options)
    by_name = {claim["claim"]: claim for claim in claims}
    students = {"width_minitron", "width_refit", "width_obs"}
    students |= {"hidden_minitron", "hidden_refit", "hidden_components"}
    students |= {"depth_minitron", "depth_loss", "depth_seams", "depth_loss_seams"}
    assert by_name.keys() == {f"{name}_loss_{moment}_2k_tokens" for name in students for moment in ("before", "after")}
    for kind in ("width", "hidden", "depth"):
        same = [claim for name, claim in by_name.items() if name.startswith(kind)]
        assert len({claim["parameters"] for claim in same}) == 1
        assert all(5 < claim["value"] < 8 and len(claim["by_seed"]) == 1 for claim in same)
    assert (
        by_name["width_obs_loss_after_2k_tokens"]["against"] == by_name["width_minitron_loss_after_2k_tokens"]["value"]
    )


def test_pruning_is_measured_in_time_and_memory() -> None:
    """On a tiny model: that the figures are those of the right model, and that memory is what the libraries take."""
    options = ["--timed", "tiny", "--cut", "tiny", "--kinds", "width", "--sequence-length", "32", "--runs", "1"]
    importance, second, memory = measure_lines("pruning_cost.py", *options)
    assert importance["claim"] == "importance_over_forward" and importance["tokens"] == 16 * 32
    assert second["claim"] == "second_cut_over_first" and second["seconds"] > 0
    assert memory["claim"] == "prune_tiny_width_peak_rss_gb" and 0.2 < memory["value"] < 1
    assert memory["teacher_parameters"] == 213_568 and memory["parameters"] == 141_744


def test_a_cached_teacher_is_compared_with_the_teacher(compressed: EvaluateConfig) -> None:
    """On the tiny model: the loss, whose target is that of the models that people compress."""
    claims = {claim["claim"]: claim for claim in measure_lines("teacher_cache.py", str(compressed.student))}
    loss = claims["teacher_cache_loss_over_online"]
    assert abs(loss["value"] - 1) < loss["target"] - 1 and loss["by_side"].keys() == {"teacher", "drawn", "top_k"}
    assert 100 < claims["teacher_cache_bytes_per_token"]["value"] < 300, (
        "a nearly flat distribution: 50 tokens of 3 bytes"
    )
    error = claims["teacher_cache_gradient_error"]["by_side"]
    assert error["systematic"] < error["independent"] and len(claims) == 6


def test_a_training_waits_only_for_the_copy_of_its_state() -> None:
    found = measured("checkpoint.py", "--layers", "2", "--vocabulary", "4096", "--runs", "1")
    assert found["claim"] == "checkpoint_blocks_step_seconds" and found["median"] < found["against"]
    assert found["parameters"] == 9_440_064 and found["value"] < found["target"], found


def test_prepare_is_measured_against_the_bare_tokenizer() -> None:
    """On the tiny corpus, once: that it runs, and that both sides come to the same tokens."""
    found = measured("prepare.py", "--sample", "tiny", "--runs", "1")
    assert found["claim"] == "prepare_over_tokenizer" and found["value"] > 0, found


def test_transfers_are_nearly_as_fast_as_the_bare_library() -> None:
    """At full size the ratio is 0.9; here, of a small model and the medians of five turns, no less than half."""
    found = measured("storage.py", "--megabytes", "24", "--runs", "5")
    assert found["claim"] == "storage_over_transfer_manager" and found["value"] > 0.5, found


def test_ten_thousand_points_are_in_mlflow_within_seconds() -> None:
    found = measured("tracking.py")
    assert found["arrived"] == found["points"] == 10_000
    assert found["value"] < max(5, found["seconds_one_by_one"] / 10), found
    assert found["seconds_the_training_waited"] < 1, found
