"""Compare compensated cuts with Minitron's: loss after the cut and after a short distillation, JSON lines.

Run it: `python benchmarks/pruning_quality.py MODEL TOKENS --device cuda`, MODEL a Hugging Face directory, TOKENS a .npy
file of token ids or a dataset that prepare wrote. SmolLM2-135M on an H100 takes minutes; on a CPU choose with
`--students`, `--seeds 1` and `--steps 24`.

All students of a kind have the same size and see the same tokens: 32 calibration sequences of 512, then 2 sequences per
step of distillation. A compensated cut is calibrated on both, so on no token that its peer does not see. The peak of
the learning rate is tuned for every student and length by the loss of the first seed. Another seed is another order of
the sequences. The loss is the mean of the next token's cross-entropy on 16 sequences that no side sees, in nats.

Students: with fewer MLP channels `width_minitron` (channels and weights by Minitron), `width_refit` (its channels,
refitted), `width_obs` (channels by Optimal Brain Surgeon, refitted); with fewer hidden channels `hidden_minitron`,
`hidden_refit` (its channels, refitted), `hidden_components` (principal components, refitted); in depth
`depth_minitron` (layers by block influence), `depth_loss` (layers by loss), `depth_seams` (layers by block influence,
the seams refitted) and `depth_loss_seams` (layers by loss with refitted seams, then all seams refitted).
"""

import argparse
import copy
import json
import math
import platform
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from minitron.data.packed import PackedDataset
from minitron.models.checkpoint import load_model
from minitron.models.losses import LossWeights, linear_loss
from minitron.models.pruning.calibration import split_calibration
from minitron.models.pruning.compensation import CHOSEN, cut_with_compensation
from minitron.models.pruning.depth import drop_layers_by_loss
from minitron.models.pruning.importance import measure_importance
from minitron.models.pruning.layers import LayerReader
from minitron.models.pruning.surgery import Shape, choose_plan, cut_model

SEQUENCE, EVALUATION, CALIBRATION, BATCH = 512, 16, 32, 2
"""Tokens per sequence; sequences of the evaluation, of the calibration, of an optimizer step."""

STUDENTS = (
    "width_minitron",
    "width_refit",
    "width_obs",
    "hidden_minitron",
    "hidden_refit",
    "hidden_components",
    "depth_minitron",
    "depth_loss",
    "depth_seams",
    "depth_loss_seams",
)
RATES = (3e-5, 6e-5, 1.2e-4, 2.5e-4, 5e-4, 1e-3, 2e-3)
"""Peaks of the learning rate; the search begins in the middle."""

TARGETS = {
    ("width_obs", 0): 3.60,
    ("width_obs", 24): 3.43,
    ("depth_loss_seams", 0): 3.80,
    ("depth_loss_seams", 24): 3.58,
}
"""Losses to come to on SmolLM2-135M, by student and steps of distillation."""


def main() -> None:
    """Measure every student and print a claim for each, before and after every length of distillation."""
    arguments = _parse_arguments()
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        runs: dict[tuple[str, int], Future[dict[str, Any]]] = {
            (student, steps): pool.submit(measure_student, arguments, student, steps)
            for steps in sorted(arguments.steps, reverse=True)
            for student in sorted(arguments.students, key=STUDENTS.index)
        }
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for key, run in runs.items():  # a peer comes before those that are compared with it
            found[key] = run.result()
            for claim in list_claims(key, found, _name_machine(arguments.device)):
                print(json.dumps(claim), flush=True)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face directory")
    parser.add_argument("tokens", type=Path, help=".npy file of token ids, or a directory that prepare wrote")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--students", nargs="+", default=STUDENTS, choices=STUDENTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=[24, 98], help="optimizer steps of 1024 tokens")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="peaks of the learning rate, ascending")
    parser.add_argument("--intermediate-size", type=int, default=1024, help="of the students with fewer MLP channels")
    parser.add_argument("--hidden-size", type=int, default=432, help="of the students with fewer hidden channels")
    parser.add_argument("--layers", type=int, default=20, help="of the students in depth")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the device")
    return parser.parse_args()


def measure_student(arguments: argparse.Namespace, student: str, steps: int) -> dict[str, Any]:
    """Cut, tune and distill a student; return its losses by seed, the peak of the learning rate and the parameters."""
    evaluation, pool = read_sequences(arguments.tokens, CALIBRATION + BATCH * max(arguments.steps))
    teacher = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval().requires_grad_(False)
    found: dict[str, Any] = {"before": [], "after": [], "seconds_cut": [], "rates": {}}
    for seed in range(arguments.seeds):
        order = (
            torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
            if seed
            else torch.arange(len(pool))
        )
        sequences = pool[order[: CALIBRATION + BATCH * steps]]
        started = time.perf_counter()
        pruned = cut(LayerReader(arguments.model), student, sequences, arguments)
        found["seconds_cut"].append(round(time.perf_counter() - started, 1))
        found["before"].append(measure_loss(pruned, evaluation, arguments.device))
        found["parameters"] = sum(parameter.numel() for parameter in pruned.parameters())
        _log(student, steps, seed, found)
        data = Distillation(teacher, sequences[CALIBRATION:], evaluation, arguments.device)
        if not seed:
            found["rates"] = tune(partial(data.run, pruned), arguments.rates)
            found["after"].append(min(found["rates"].values()))
        else:
            found["after"].append(data.run(pruned, min(found["rates"], key=found["rates"].__getitem__)))
        _log(student, steps, seed, found)
    return found


def read_sequences(path: Path, count: int) -> tuple[Tensor, Tensor]:
    """Return the sequences of the evaluation, and `count` others to calibrate and to train on."""
    if path.is_dir():
        splits = [PackedDataset(path / split, SEQUENCE, seed=1234) for split in ("validation", "train")]
        parts = [
            [split[index]["input_ids"] for index in range(size)]
            for split, size in zip(splits, (EVALUATION, count), strict=True)
        ]
        return torch.stack(parts[0]), torch.stack(parts[1])
    tokens = torch.from_numpy(np.load(path).astype(np.int64))
    needed = (EVALUATION + count) * SEQUENCE
    assert len(tokens) >= needed, f"{path}: {len(tokens)} tokens, but {needed} are needed"
    sequences = tokens[:needed].view(-1, SEQUENCE)
    return sequences[:EVALUATION], sequences[EVALUATION:]


def cut(teacher: LayerReader, student: str, sequences: Tensor, arguments: argparse.Namespace) -> Any:
    """Return a student; what is fitted is fitted on all sequences, what is chosen by importance on the calibration."""
    device = torch.device(arguments.device)
    calibration = _Sequences(sequences[:CALIBRATION])
    importance = measure_importance(teacher, calibration, CALIBRATION, 4, torch.float32, device)
    size = {
        "width": {"intermediate_size": arguments.intermediate_size},
        "hidden": {"hidden_size": arguments.hidden_size},
        "depth": {"num_hidden_layers": arguments.layers},
    }
    shape = replace(Shape.from_config(teacher.config), **size[student.partition("_")[0]])
    is_refitted, given = "minitron" not in student and student != "depth_loss", {}
    if "loss" in student:
        parts, count = split_calibration(sequences), teacher.config.num_hidden_layers - shape.num_hidden_layers
        *_, order = drop_layers_by_loss(teacher, count, *parts, 4, torch.float32, device, is_refitted)
        print(student, order.drops, file=sys.stderr, flush=True)
        gone = {drop.layer for drop in order.drops}
        given["layers"] = [layer for layer in range(teacher.config.num_hidden_layers) if layer not in gone]
    plan = choose_plan(importance, shape, given)
    with TemporaryDirectory() as name:
        directory = Path(name)
        if not is_refitted:
            cut_model(teacher, plan, directory)
        else:
            choose = () if student.endswith("_refit") else CHOSEN
            cut_with_compensation(teacher, plan, shape, sequences, 4, device, directory, choose)
        return load_model(directory, torch.float32)


class _Sequences(PackedDataset):
    """Sequences as `measure_importance` reads them."""

    def __init__(self, sequences: Tensor) -> None:
        self._sequences = sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._sequences[index]}


def tune(run: Any, rates: tuple[float, ...]) -> dict[float, float]:
    """Return the losses by peak of the learning rate, from the middle one towards lower losses until they rise."""
    place = len(rates) // 2
    losses = {rates[place]: run(rates[place])}
    for step in (-1, 1):
        position = place
        while 0 <= position + step < len(rates):
            losses[rates[position + step]] = run(rates[position + step])
            if losses[rates[position + step]] >= losses[rates[position]]:
                break
            position += step
        if position != place:  # lower on this side: the other one has been left behind
            break
    return losses


class Distillation:
    """The distillation of facts and figures: AdamW, cosine from the peak to a tenth after 2 steps, forward KL alone."""

    def __init__(self, teacher: Any, sequences: Tensor, evaluation: Tensor, device: str) -> None:
        """Run the teacher once over the sequences."""
        self._sequences, self._evaluation, self._device = sequences, evaluation, device
        self._head = teacher.get_output_embeddings().weight.detach().to(device)
        with torch.no_grad():
            model = copy.deepcopy(teacher.model).to(device)
            self._states = [model(ids.to(device), use_cache=False).last_hidden_state for ids in sequences.split(BATCH)]

    def run(self, pruned: Any, peak: float) -> float:
        """Distill a copy of a pruned model; return its loss on the evaluation."""
        torch.set_float32_matmul_precision("high")
        model = copy.deepcopy(pruned).to(self._device).train().requires_grad_(True)
        model.get_input_embeddings().padding_idx = None  # it may be the id that ends a document
        decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
        for step, (ids, states) in enumerate(zip(self._sequences.split(BATCH), self._states, strict=True)):
            for group in optimizer.param_groups:
                group["lr"] = peak * _schedule(step, len(self._states))
            hidden = model.model(ids.to(self._device), use_cache=False).last_hidden_state.flatten(0, 1)
            labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)  # no term reads them
            head = model.get_output_embeddings().weight
            weights = LossWeights(kl=1.0, cross_entropy=0.0)
            loss = linear_loss(hidden, head, labels, weights, states.flatten(0, 1), self._head).loss / len(hidden)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        torch.set_float32_matmul_precision("highest")
        return measure_loss(model, self._evaluation, self._device)


def _schedule(step: int, steps: int, warmup: int = 2) -> float:
    if step <= warmup:
        return (step + 1) / (warmup + 1)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def measure_loss(model: Any, evaluation: Tensor, device: str) -> float:
    """Return the mean cross-entropy of the next token, in nats."""
    model = copy.deepcopy(model).to(device).eval()
    losses = []
    for ids in evaluation.to(device).split(2):
        logits = model(ids, use_cache=False).logits[:, :-1]
        losses.append(cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).item())
    return round(mean(losses), 4)


def list_claims(
    key: tuple[str, int], found: dict[tuple[str, int], dict[str, Any]], machine: str
) -> list[dict[str, Any]]:
    """Return the claims of a student and a length, of the losses before and after the distillation."""
    (student, steps), run = key, found[key]
    peer = None if student.endswith("minitron") else found.get((f"{student.partition('_')[0]}_minitron", steps))
    common = {"unit": "nats per token", "better": "lower", "runs": len(run["after"]), "machine": machine}
    common |= {
        "parameters": run["parameters"],
        "calibration_and_distillation_tokens": (CALIBRATION + BATCH * steps) * SEQUENCE,
    }
    return [
        {
            "claim": f"{student}_loss_{moment}_{BATCH * SEQUENCE * steps // 1000}k_tokens",
            "value": round(mean(run[moment]), 4),
            "target": TARGETS.get((student, count)),
            "against": round(mean(peer[moment]), 4) if peer else None,
            "by_seed": run[moment],
        }
        | common
        | ({"by_rate": run["rates"]} if count else {"seconds_cut": run["seconds_cut"]})
        for moment, count in (("before", 0), ("after", steps))
    ]


def _name_machine(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()


def _log(student: str, steps: int, seed: int, found: dict[str, Any]) -> None:
    print(student, steps, "seed", seed, json.dumps(found), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
