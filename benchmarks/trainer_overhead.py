"""Compare a step of engine hf's training with the bare step in PyTorch: one JSON line.

Run it: `python benchmarks/trainer_overhead.py` (`make bench`).

A bare step is what a script would do: both models forward, the fused loss, backward, clipping, AdamW, on sequences that
are in memory. A step of the engine also reads its sequences, follows its schedules, writes its history and its status,
and reports. After each step of the engine comes a bare one, in the same process; the values are medians. The models are
random: SmolLM2-135M's widths with a fifth of its layers, distilled.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from minitron.config.stages import DistillConfig
from minitron.data.indexed import IndexedWriter
from minitron.data.packed import PackedDataset
from minitron.engines.hf import loop
from minitron.engines.progress import Start
from minitron.models.losses import LossWeights, linear_loss
from minitron.models.scoring import compute_hidden_states, get_output_head

SEQUENCE, BATCH = 512, 2

WARM_UP = 2
"""Steps that do not count."""


def main() -> None:
    """Print the claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="steps of each side")
    parser.add_argument("--layers", type=int, default=6)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        engine, bare = measure_steps(Path(name), arguments.layers, arguments.runs + WARM_UP)
    claim = {
        "claim": "trainer_overhead", "value": round(engine / bare, 3), "unit": "x", "target": 1.03, "better": "lower",
        "against": "the bare step in PyTorch", "runs": arguments.runs, "seconds": round(engine, 3),
        "machine": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }  # fmt: skip
    print(json.dumps(claim))


def measure_steps(directory: Path, layers: int, steps: int) -> tuple[float, float]:
    """Return the median seconds of the engine's steps and of the bare ones."""
    model, dataset, work = directory / "model", directory / "dataset", directory / "work"
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
        num_hidden_layers=layers, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    dataset.mkdir()
    work.mkdir()
    for split in ("train", "validation"):
        writer = IndexedWriter(dataset / split, config.vocab_size)
        writer.add_documents([torch.randint(config.vocab_size, (2000,)).tolist() for _ in range(20)])
        writer.close()
    settings = DistillConfig(
        output=directory / "out", dataset=dataset, teacher=model, student=model, sequence_length=SEQUENCE,
        global_batch_size=BATCH, micro_batch_size=BATCH, max_steps=steps, warmup_steps=0, validation_sequences=1,
        validation_interval=steps, checkpoint_interval=steps,
    )  # fmt: skip
    bare_step = _BareStep(settings)
    seconds: dict[str, list[float]] = {"engine": [], "bare": []}
    last = 0.0

    def report(row: dict[str, Any]) -> None:
        nonlocal last
        if "loss" in row:  # not a validation
            seconds["engine"].append(time.perf_counter() - last)
            started = time.perf_counter()
            bare_step(row["step"])
            seconds["bare"].append(time.perf_counter() - started)
        last = time.perf_counter()

    loop.train(settings, model, loop.Teacher(model), work, Start(), report)
    engine, bare = (statistics.median(times[WARM_UP:]) for times in seconds.values())
    return engine, bare


class _BareStep:
    """The same models, sequences and optimizer in a plain loop."""

    def __init__(self, settings: DistillConfig) -> None:
        self._teacher = self._load(settings.teacher).eval().requires_grad_(False)
        self._student = self._load(settings.student).train()
        self._optimizer = torch.optim.AdamW(self._student.parameters(), lr=settings.learning_rate, fused=True)
        self._clipping = settings.gradient_clipping
        data = PackedDataset(settings.dataset / "train", SEQUENCE, seed=0)
        self._batches = [
            {name: torch.stack([data[index][name], data[index + 1][name]]) for name in ("input_ids", "labels")}
            for index in range(0, len(data) - 1, BATCH)
        ]

    def __call__(self, step: int) -> None:
        batch = self._batches[step % len(self._batches)]
        with torch.no_grad():
            teacher_hidden = compute_hidden_states(self._teacher, batch["input_ids"])
        hidden, labels = compute_hidden_states(self._student, batch["input_ids"]), batch["labels"].flatten()
        heads = get_output_head(self._student), get_output_head(self._teacher)
        loss = linear_loss(hidden, heads[0], labels, LossWeights(1.0, 0.0), teacher_hidden, heads[1]).loss
        (loss / len(labels)).backward()
        torch.nn.utils.clip_grad_norm_(self._student.parameters(), self._clipping)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _load(self, directory: Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


if __name__ == "__main__":
    main()
