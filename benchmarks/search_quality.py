"""Compare the winner of a search with the shape that people pick, at the same number of parameters: one JSON line.

Run it: `python benchmarks/search_quality.py WORK_DIR --seeds 3`. It needs the packages of the demo's inputs, which
`make demo` installs, and about an hour per seed on two cores.

The hand-picked shape is SmolLM2-135M with its MLP cut from 1536 to 1024 channels, 107,972,928 parameters. Each seed is
a race of its own under that budget (`minitron run search --preset demo --preset recommended`); the picked shape may be
among its candidates. Then winner and picked shape are cut on the same calibration and distilled for the same steps. The
better student has the lower loss on test sequences, by which nothing was chosen.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PICKED = {"intermediate_size": 1024}
PARAMETERS = 107_972_928
TEST_SEQUENCES = 32


def main() -> None:
    """Race and compare once per seed; print the number of seeds on which the search wins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path, help="directory of the runs; a second start continues there")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30, help="steps of the last round and of the comparison")
    arguments = parser.parse_args()
    found = [compare(arguments, seed) for seed in range(arguments.seeds)]
    wins = sum(row["searched"]["test_loss"] < row["picked"]["test_loss"] for row in found)
    claim = {
        "claim": "search_beats_picked_shape", "value": wins, "unit": f"seeds of {len(found)}", "target": 2,
        "better": "higher", "against": "SmolLM2-135M, intermediate_size 1024", "runs": len(found), "by_seed": found,
        "machine": platform.machine(),
    }  # fmt: skip
    print(json.dumps(claim), flush=True)


def compare(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Race with a seed; return the winner and the losses of both students."""
    work_dir = (arguments.work_dir / f"seed-{seed}").absolute()
    settings = {
        "seed": seed, "prune.drop_layers": "null",
        "search.parameters": PARAMETERS, "search.candidates": arguments.candidates, "search.calibration_sequences": 16,
        "search.long_steps": arguments.steps, "search.short_steps": max(1, arguments.steps // 3),
        "finetune.enabled": "false", "stop_after_race": "true",
    }  # fmt: skip
    program = str(Path(sys.executable).with_name("minitron"))
    command = [program, "run", "search", "--preset", "demo", "--preset", "recommended", "--work-dir", str(work_dir)]
    command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    subprocess.run(command, check=True, stdout=sys.stderr)
    race = json.loads((work_dir / "search.json").read_text())
    results = max(work_dir.glob("results/*/plan/planned")).parents[1]
    students = {"searched": race["settings"]["prune"], "picked": PICKED}
    losses = {name: distill(work_dir, results, sizes, arguments.steps) for name, sizes in students.items()}
    print(seed, race["winner"], json.dumps(losses), file=sys.stderr, flush=True)
    return {"seed": seed, "winner": race["winner"]} | losses


def distill(work_dir: Path, results: Path, sizes: dict[str, Any], steps: int) -> dict[str, float]:
    """Cut to sizes and distill, with the stages and the settings of the race; return parameters and the losses."""
    from minitron.config.parse import parse
    from minitron.runtime.entry import run_stage

    os.environ["MINITRON_CACHE"] = str(work_dir / "cache")
    planned = json.loads((results / "plan" / "planned" / "plan.json").read_text())
    common = {
        "dataset": results / "prepare" / "dataset", "teacher": results / "finetune" / "corrected",
        "workspace": work_dir / "workspace",
    }  # fmt: skip
    name = "-".join(map(str, sizes.values()))
    pruned, distilled = (work_dir / "compared" / f"{stage}-{name}" for stage in ("pruned", "distilled"))
    cut = run_stage("prune", parse("prune", planned["prune"] | sizes | common | {"output": pruned}))
    lengths = {"max_steps": steps, "validation_interval": steps}
    settings = planned["distill"] | lengths | common | {"student": pruned, "output": distilled}
    trained = run_stage("distill", parse("distill", settings))
    return {
        "parameters": cut["metrics"]["parameters"],
        "validation_loss_before": trained["metrics"]["validation_loss_before"],
        "validation_loss": trained["metrics"]["validation_loss"],
        "test_loss": measure_test_loss(common["dataset"], distilled, planned["distill"]),
    }


def measure_test_loss(dataset: Path, model: Path, settings: dict[str, Any]) -> float:
    """Return the mean cross-entropy of the next token on the test split, in nats."""
    import torch

    from minitron.data.packed import PackedDataset
    from minitron.models.checkpoint import load_model
    from minitron.models.scoring import score_models

    split = PackedDataset(dataset / "test", settings["sequence_length"], seed=0)
    models: dict[str, Any] = {"student": load_model(model, torch.float32)}
    return round(score_models(models, split, TEST_SEQUENCES, 2)["student"]["loss"], 4)


if __name__ == "__main__":
    main()
