"""Time how long a training waits for a checkpoint, against waiting until it is on the disk: a JSON line.

Run it: `python benchmarks/checkpoint.py` (`make bench`).

`checkpoint_blocks_step_seconds`: the longest time for which engine hf holds a training up to save a checkpoint that is
also the best state, at the sizes of SmolLM2-135M (weights and Adam's moments in fp32 are 1.6 GB, the best state is
0.5 GB). `against`: the median of the times until the same files are whole on the disk, each right after its copy. The
weights are random.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from minitron.engines.hf import get_device
from minitron.engines.hf.writer import StateWriter
from minitron.engines.progress import HISTORY

TARGET_SECONDS = 1.0


def main() -> None:
    """Print the claim."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    parameters = make_parameters(arguments.layers, arguments.vocabulary)
    moments = {f"{name}.{key}": weights.clone() for name, weights in parameters.items() for key in ("first", "second")}
    with tempfile.TemporaryDirectory(dir=".") as directory:
        blocked, written = measure_saves(parameters, moments, Path(directory), arguments.runs)
    on_gpu = get_device().type == "cuda"
    claim = {
        "claim": "checkpoint_blocks_step_seconds",
        "value": round(max(blocked), 3),
        "unit": "s",
        "target": TARGET_SECONDS,
        "better": "lower",
        "against": round(statistics.median(written), 3),
        "median": round(statistics.median(blocked), 3),
        "parameters": sum(weights.numel() for weights in parameters.values()),
        "runs": arguments.runs,
        "machine": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads",
    }
    print(json.dumps(claim), flush=True)


def make_parameters(layers: int, vocabulary: int) -> dict[str, Tensor]:
    """Return the random parameters of a model of SmolLM2-135M's width."""
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(get_device())
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def measure_saves(
    parameters: dict[str, Tensor], moments: dict[str, Tensor], directory: Path, runs: int
) -> tuple[list[float], list[float]]:
    """Return the seconds until the training would go on, and until the state is on the disk, of every save."""
    (initial := directory / "initial").mkdir()
    (initial / "config.json").write_text("{}")
    (work := directory / "work").mkdir()
    (work / HISTORY).touch()
    blocked, written = [], []
    for step in range(1, runs + 1):
        with StateWriter(initial, work, parameters, moments) as writer:
            started = time.perf_counter()
            writer.save(step, {"loss": 1.0}, {"best": step, "seconds": 1.0})
            blocked.append(time.perf_counter() - started)
        written.append(time.perf_counter() - started)
    return blocked, written


if __name__ == "__main__":
    main()
