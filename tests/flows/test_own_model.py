"""The README's own-model preset, word for word, on a small model and corpus of the user's own."""

import json
import shutil
import subprocess
from pathlib import Path

from minitron.cli.demo_inputs import build_inputs
from tests.flows.commands import BIN, ENVIRONMENT, read_blocks, read_shell_lines

SMALLER = ("sequence_length=64", "prune.intermediate_size=64", "finetune.max_steps=2", "distill.max_steps=4")
"""The sizes of the small model; the README's are of a larger one."""


def test_the_preset_of_the_readme_compresses_a_model_of_the_users_own(tmp_path: Path) -> None:
    inputs = build_inputs("tiny", tmp_path / "inputs")
    shutil.copytree(inputs["teacher"], tmp_path / "models" / "my-llama")
    shutil.copytree(inputs["corpus"], tmp_path / "data" / "my-text")
    (preset,) = read_blocks("README.md", "yaml")
    assert len(preset.splitlines()) <= 15
    (tmp_path / "my-model.yaml").write_text(preset)
    (command,) = [line for line in read_shell_lines("README.md") if line.startswith("minitron run")]
    done = subprocess.run(
        [BIN / "minitron", *command.split()[1:], *(part for setting in SMALLER for part in ("--set", setting))],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    summary = json.loads((tmp_path / "runs" / "my-model" / "summary.json").read_text())
    assert summary["registered"] == {"name": "my-model", "version": 1, "alias": "challenger"}
    assert "gate: Parameters, ratio to the corrected teacher's: 0.770" in done.stdout
