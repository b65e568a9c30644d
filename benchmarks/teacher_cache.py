"""Compare distillation from a cached teacher with that from the teacher itself: JSON lines.

Run it: `python benchmarks/teacher_cache.py STUDENT`, where STUDENT is a student that distill wrote, such as
`runs/demo/results/*/distill/distilled` after `make demo`. The same distillation is run again with the teacher, with
drawn tokens and with the most probable tokens, each in a process of its own. It takes about three times as long.

The error of a gradient is that of the loss's gradient with respect to the student's last hidden states, if the student
has the teacher's head: (w - p) @ head instead of 0, relative to p @ head, over two validation sequences.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIDES = {"teacher": None, "drawn": "sampled", "top_k": "top_k"}


def main() -> None:
    """Distill on every side and print the claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path, help="directory of a student that distill wrote")
    student = parser.parse_args().student.resolve()
    with tempfile.TemporaryDirectory() as name:
        found = {side: distill(student, Path(name), side) for side in SIDES}
    common = {"against": "the teacher in every step", "runs": 1, "machine": platform.machine()}
    for claim in [*list_claims(found), measure_gradient_errors(found["drawn"]["config"])]:
        print(json.dumps(common | claim))


def distill(student: Path, directory: Path, side: str) -> dict[str, Any]:
    """Repeat a distillation on a side, and return its record."""
    settings = json.loads((student / "stage.json").read_text())["config"]
    settings |= {
        "teacher_cache": SIDES[side],
        "workspace": str(directory / "workspace"),
        "output": str(directory / side),
    }
    path = directory / f"{side}.json"
    path.write_text(json.dumps(settings))
    subprocess.run([sys.executable, "-m", "minitron.distill", "--config", str(path)], check=True, stdout=sys.stderr)
    return json.loads((directory / side / "stage.json").read_text())


def list_claims(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the claims of all sides' records."""
    losses, speeds = (
        {side: record["metrics"][name] for side, record in found.items()}
        for name in ("validation_loss", "tokens_per_second")
    )
    peaks = {side: record["peak_rss_mb"] for side, record in found.items()}
    shared = {"unit": "ratio", "better": "lower"}
    size = {"draws": found["drawn"]["config"]["teacher_cache_size"]}
    stored = found["drawn"]["metrics"]["teacher_cache_bytes_per_token"]
    return [
        shared | size | _compare("teacher_cache_loss_over_online", losses, "drawn", 1.01),
        shared | size | _compare("teacher_cache_top_k_loss_over_online", losses, "top_k", None),
        shared | size | _compare("teacher_cache_peak_rss_over_online", peaks, "drawn", None),
        shared | size | _compare("teacher_cache_speed_over_online", speeds, "drawn", None) | {"better": "higher"},
        size
        | {"claim": "teacher_cache_bytes_per_token", "value": stored, "unit": "B", "better": "lower", "target": None},
    ]


def measure_gradient_errors(config: dict[str, Any]) -> dict[str, Any]:
    """Return the claim of the systematic draws' error against that of as many independent ones."""
    import torch

    from minitron.data.packed import PackedDataset
    from minitron.engines.hf.teacher_cache import load_teacher, sample_tokens

    teacher, draws = load_teacher(Path(config["teacher"])), config["teacher_cache_size"]
    split = PackedDataset(Path(config["dataset"]) / "validation", config["sequence_length"], config["seed"])
    with torch.no_grad():
        ids = torch.stack([split[0]["input_ids"], split[1]["input_ids"]]).to(teacher.device)
        log_p, head = teacher(ids).logits.flatten(0, 1).float().log_softmax(-1), teacher.get_output_embeddings().weight
    p, generator = log_p.exp(), torch.Generator(log_p.device).manual_seed(0)
    shifts = torch.rand(len(p), generator=generator, device=p.device)
    drawn, numbers, lengths, _ = sample_tokens(log_p, shifts, draws)
    rows = torch.arange(len(p), device=p.device).repeat_interleave(lengths)
    independent = torch.multinomial(p, draws, replacement=True, generator=generator)
    probable = p.topk(draws)
    weights = {
        "systematic": torch.zeros_like(p).index_put((rows, drawn), numbers.float()),
        "independent": torch.zeros_like(p).scatter_add_(1, independent, torch.ones_like(independent, dtype=p.dtype)),
        "top_k": torch.zeros_like(p).scatter_(1, probable.indices, probable.values),
    }
    errors = {
        side: float(((w / w.sum(-1, keepdim=True) - p) @ head.float()).norm() / (p @ head.float()).norm())
        for side, w in weights.items()
    }
    return {
        "claim": "teacher_cache_gradient_error", "value": round(errors["systematic"] / errors["independent"], 3),
        "unit": "ratio", "better": "lower", "target": None, "against": "as many independent draws", "draws": draws,
        "by_side": {side: round(error, 4) for side, error in errors.items()},
    }  # fmt: skip


def _compare(claim: str, values: dict[str, float], side: str, target: float | None) -> dict[str, Any]:
    return {"claim": claim, "value": round(values[side] / values["teacher"], 4), "target": target, "by_side": values}


if __name__ == "__main__":
    main()
