"""The whole flow on a GPU, in bf16, with every engine that is installed: `pytest -m gpu`."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no GPU: bf16, NCCL and Transformer Engine are not tested"
    ),
]
NEMO = pytest.param(
    "nemo", marks=pytest.mark.skipif(not importlib.util.find_spec("nemo"), reason="engine nemo: NeMo is not installed")
)


@pytest.mark.parametrize("engine", ["hf", NEMO])
def test_the_flow_on_a_gpu(engine: str, tmp_path: Path) -> None:
    """Engine nemo computes in Transformer Engine's layers where that is installed, as NeMo does by itself."""
    command = [str(Path(sys.executable).with_name("minitron")), "run", "compress", "--preset", "tiny"]
    command += ["--set", f"engine={engine}", "--work-dir", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    records = [json.loads(path.read_text()) for path in tmp_path.glob("results/*/*/*/stage.json")]
    found = {record["stage"]: record for record in records}
    for stage in ("finetune", "distill"):
        assert found[stage]["peak_gpu_mb"] > 0
        assert all(math.isfinite(row["loss"]) for row in found[stage]["history"] if "loss" in row)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["teacher"]["validation_loss"] < summary["teacher_before"]["validation_loss"]
    assert summary["student"]["validation_loss"] < summary["pruned"]["validation_loss"]
