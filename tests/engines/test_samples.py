"""The inputs of the preset `tiny`: the same wherever a task makes them, known before, and mostly without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minitron.config.addresses import SAMPLES
from minitron.config.stages import FinetuneConfig
from minitron.engines.samples import TEACHER, make_sample
from minitron.errors import ConfigError
from minitron.runtime.model_sources import pinned_local_model
from minitron.storage.hashing import content_hash

HASHES = {
    "corpus": "56554ca218245322e575e3204d688c97f455e9c149824eef225e8fd5b69a9d52",
    "tasks": "5129a02794a9b369b4909e1987e4ffb84be8bd2915e433a6a1f7d023a0f0e12e",
}
"""Of what is made without torch: the same on every machine."""

WITHOUT_TORCH = """
import sys
from pathlib import Path
from minitron.config.stages import PlanConfig
from minitron.engines.samples import make_sample
from minitron.stages import plan, resolve
for name in ("corpus", "tasks"):
    make_sample(f"sample://tiny/{name}", Path(sys.argv[1]) / name)
plan.run(PlanConfig(output=Path(sys.argv[1]) / "plan", preset="tiny", tracking_uri="http://mlflow"))
print(*(name for name in ("torch", "transformers", "tokenizers", "lm_eval") if name in sys.modules))
"""


def test_the_tools_image_plans_with_them_and_makes_all_but_the_teacher(tmp_path: Path) -> None:
    """In a process of its own: this one has imported torch."""
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [], "neither torch, nor a warning that the teacher's size is not known"
    assert {name: content_hash(tmp_path / name) for name in HASHES} == HASHES
    planned = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert planned["teacher"] == SAMPLES[0] and planned["distill_memory"] == "9Gi"
    assert {planned[f"{stage}_gpus"] for stage in ("finetune", "prune", "distill", "evaluate")} == {"0"}


def test_a_task_uses_what_the_first_one_made(tmp_path: Path) -> None:
    values = {"dataset": tmp_path, "teacher": SAMPLES[0], "workspace": tmp_path / "workspace"}
    first, second = (
        pinned_local_model(SAMPLES[0], FinetuneConfig(output=tmp_path / run, pipeline_run_id=run, **values))
        for run in ("one", "two")
    )
    assert first == second and first[1] == SAMPLES[0]
    written = json.loads((first[0] / "config.json").read_text())
    assert {name: written[name] for name in TEACHER} == TEACHER
    make_sample(SAMPLES[0], tmp_path / "again")
    assert content_hash(tmp_path / "again") == content_hash(first[0])


def test_a_misspelt_sample_is_named(tmp_path: Path) -> None:
    config = FinetuneConfig(output=tmp_path / "out", dataset=tmp_path, teacher="sample://huge/teacher")
    with pytest.raises(ConfigError, match="sample://huge/teacher: no such sample; give one of sample://tiny/teacher, "):
        pinned_local_model(config.teacher, config)
