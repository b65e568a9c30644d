"""Measure what pruning costs: the time of importance against a plain forward, and the memory of a cut. JSON lines.

Run it: `python benchmarks/pruning_cost.py`, with `--directory` on a disk with 26 GB.

`importance_over_forward`: the scores of a model that is read layer by layer from its files, over the forward of the
same model in memory, without logits, on the same tokens; they run in turn in one process, the values are medians.

`second_cut_over_first`: prune in a workspace that has the scores of the same teacher, over prune in an empty workspace,
to two widths. Every round has a new workspace; the values are medians. More calibration makes the ratio smaller.

`prune_8b_width_peak_rss_gb`, `prune_8b_depth_peak_rss_gb`: a model of Llama-3.1-8B's sizes in bfloat16 is cut to the
sizes of NVIDIA's 4B students by `python -m minitron.prune`; the value is that process's peak of resident memory, mapped
files included. The weights are random signs, because only their sizes matter here.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from minitron.config.stages import PruneConfig
from minitron.data.indexed import IndexedWriter
from minitron.data.packed import PackedDataset
from minitron.data.tokenizer import tokenizer_hash
from minitron.engines.hf import get_compute_dtype, get_device
from minitron.models.checkpoint import count_stored_parameters
from minitron.models.pruning.importance import measure_importance
from minitron.models.pruning.layers import LayerReader, ShardWriter
from minitron.stages.prune import run as run_prune
from minitron.storage.layout import MANIFEST

SIZES = {
    "tiny": {"vocabulary": 512, "hidden": 64, "intermediate": 128, "heads": 4, "groups": 2, "layers": 4},
    "135m": {"vocabulary": 49152, "hidden": 576, "intermediate": 1536, "heads": 9, "groups": 3, "layers": 8},
    "8b": {"vocabulary": 128256, "hidden": 4096, "intermediate": 14336, "heads": 32, "groups": 8, "layers": 32},
}
"""Llama-3.1-8B's sizes, SmolLM2-135M's with some of its layers, and those of a test."""

WIDTHS = {
    "tiny": {"hidden_size": 48, "intermediate_size": 96},
    "8b": {"hidden_size": 3072, "intermediate_size": 9216},
}
"""The cuts in width of arXiv 2408.11796; those in depth drop half of the layers."""

TOKENS = 10**5
"""Tokens of the dataset, random ids."""


def main() -> None:
    """Print the claims."""
    arguments = _parse_arguments()
    if arguments.claim in ("importance", "all"):
        print(json.dumps(measure_time(arguments)), flush=True)
    if arguments.claim in ("second_cut", "all"):
        print(json.dumps(measure_second_cut(arguments)), flush=True)
    if arguments.claim in ("memory", "all"):
        for claim in measure_memory(arguments):
            print(json.dumps(claim), flush=True)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claim", default="all", choices=("importance", "second_cut", "memory", "all"))
    parser.add_argument("--timed", default="135m", choices=SIZES, help="model whose importance and cuts are timed")
    parser.add_argument("--cut", default="8b", choices=WIDTHS, help="model that is cut")
    parser.add_argument("--kinds", nargs="+", default=["width", "depth"], choices=("width", "depth"))
    parser.add_argument("--method", default="minitron", choices=("minitron", "compensated"))
    parser.add_argument("--layers", type=int, help="of the model that is cut, if not all")
    parser.add_argument("--sequences", type=int, default=16, help="calibration sequences")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="receives the models and is emptied; default: a temporary one")
    return parser.parse_args()


# ---- time


def measure_time(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the claim of importance."""
    device, dtype = get_device(), get_compute_dtype()
    with TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        write_model(directory / "teacher", SIZES[arguments.timed])
        write_dataset(directory / "dataset", directory / "teacher", SIZES[arguments.timed]["vocabulary"])
        packed = PackedDataset(directory / "dataset" / "train", arguments.sequence_length, seed=1)
        reader = LayerReader(directory / "teacher")
        model: Any = AutoModelForCausalLM.from_pretrained(directory / "teacher", dtype=dtype).eval().to(device)
        ids = torch.stack([packed[index]["input_ids"] for index in range(arguments.sequences)])

        def score() -> None:
            measure_importance(reader, packed, arguments.sequences, arguments.micro_batch_size, dtype, device)

        @torch.no_grad()
        def run_forward() -> None:
            for batch in ids.split(arguments.micro_batch_size):
                model.model(input_ids=batch.to(device), use_cache=False)

        scored, forward = _time([score, run_forward], arguments.runs)
    return {
        "claim": "importance_over_forward", "value": round(scored / forward, 3), "unit": "x", "target": 1.15,
        "better": "lower", "against": "the forward of a model in memory", "runs": arguments.runs,
        "machine": _name_machine(), "model": arguments.timed, "tokens": ids.numel(), "seconds": round(scored, 3),
    }  # fmt: skip


def measure_second_cut(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the claim of a second cut."""
    sizes = SIZES[arguments.timed]
    with TemporaryDirectory(dir=arguments.directory) as name:
        directory, rounds = Path(name), count()
        write_model(directory / "teacher", sizes)
        write_dataset(directory / "dataset", directory / "teacher", sizes["vocabulary"])

        def cut(width: int, workspace: Path) -> None:
            config = PruneConfig(
                teacher=directory / "teacher", dataset=directory / "dataset", output=workspace / f"pruned-{width}",
                workspace=workspace, intermediate_size=width, calibration_sequences=arguments.sequences,
                sequence_length=arguments.sequence_length, micro_batch_size=arguments.micro_batch_size,
            )  # fmt: skip
            with redirect_stdout(sys.stderr):  # only claims are printed
                run_prune(config)

        first, second = _time(
            [
                lambda: cut(sizes["intermediate"] // 2, directory / f"{next(rounds)}"),
                lambda: cut(sizes["intermediate"] // 4, max(directory.glob("[0-9]*"), key=lambda path: int(path.name))),
            ],
            arguments.runs,
        )
    return {
        "claim": "second_cut_over_first", "value": round(second / first, 3), "unit": "x", "target": 0.5,
        "better": "lower", "against": "the first cut of the same teacher", "runs": arguments.runs,
        "machine": _name_machine(), "model": arguments.timed,
        "tokens": arguments.sequences * arguments.sequence_length, "seconds": round(second, 3),
        "seconds_of_first": round(first, 3),
    }  # fmt: skip


def _time(functions: list[Callable[[], None]], runs: int) -> list[float]:
    """Return the median seconds of each; the first round warms up."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(runs + 1):
        for function, times in zip(functions, seconds, strict=True):
            started = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return [statistics.median(times[1:]) for times in seconds]


# ---- memory


def measure_memory(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the claim of every cut."""
    sizes = SIZES[arguments.cut] | ({"layers": arguments.layers} if arguments.layers else {})
    cuts = {"width": WIDTHS[arguments.cut], "depth": {"num_hidden_layers": sizes["layers"] // 2}}
    with TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        write_model(teacher := directory / "teacher", sizes)
        write_dataset(directory / "dataset", teacher, sizes["vocabulary"])
        weights = sum(path.stat().st_size for path in teacher.glob("*.safetensors"))
        for kind in arguments.kinds:
            with TemporaryDirectory(dir=directory) as output:
                student = Path(output) / "student"
                peak, seconds = prune(arguments, directory, student, cuts[kind])
                shards = [path.stat().st_size for path in student.glob("*.safetensors")]
                yield {
                    "claim": f"prune_{arguments.cut}_{kind}_peak_rss_gb", "value": round(peak / 1e9, 2), "unit": "GB",
                    "target": 6, "better": "lower", "runs": 1, "machine": _name_machine(),
                    "against": f"{weights / 1e9:.2f} GB of weights, which transformers loads",
                    "seconds": round(seconds, 1), "method": arguments.method, "layers": sizes["layers"],
                    "calibration_tokens": arguments.sequences * arguments.sequence_length,
                    "teacher_parameters": count_stored_parameters(teacher),
                    "parameters": count_stored_parameters(student), "shards": len(shards),
                    "largest_shard_gb": round(max(shards) / 1e9, 2),
                }  # fmt: skip


def prune(arguments: argparse.Namespace, directory: Path, output: Path, cuts: dict[str, int]) -> tuple[int, float]:
    """Prune in a process of its own; return its peak of resident memory in bytes and its seconds."""
    config = {
        "teacher": str(directory / "teacher"), "dataset": str(directory / "dataset"), "output": str(output),
        "method": arguments.method, "calibration_sequences": arguments.sequences,
        "sequence_length": arguments.sequence_length, "micro_batch_size": arguments.micro_batch_size,
    }  # fmt: skip
    (file := directory / "prune.yaml").write_text(yaml.safe_dump(config | cuts))
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "minitron.prune", "--config", str(file)], stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"prune: exit status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024, time.perf_counter() - started


# ---- inputs


def write_model(directory: Path, sizes: dict[str, int]) -> None:
    """Write a random Llama in bfloat16, shard by shard, with a tokenizer of few words."""
    directory.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["hidden"], intermediate_size=sizes["intermediate"],
        num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"], num_key_value_heads=sizes["groups"],
        head_dim=sizes["hidden"] // sizes["heads"], tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
        eos_token_id=0, bos_token_id=0, max_position_embeddings=8192, rms_norm_eps=1e-5, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(directory)
    words = Tokenizer(WordLevel({"<eos>": 0, "word": 1}, unk_token="word"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator, writer = np.random.default_rng(0), ShardWriter(directory)
    for name, parameter in model.named_parameters():
        writer.add([(name, _make_weight(parameter.shape, generator))])
    writer.finish()


def _make_weight(shape: torch.Size, generator: np.random.Generator) -> torch.Tensor:
    """Return ones for a norm, and for a matrix random signs that keep the size of its inputs; they are 1 bit each."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    bits = np.unpackbits(np.frombuffer(generator.bytes(math.ceil(math.prod(shape) / 8)), np.uint8))
    signs = torch.from_numpy(bits[: math.prod(shape)]).view(shape).bfloat16()
    return signs.mul_(2).sub_(1).mul_(shape[1] ** -0.5)


def write_dataset(directory: Path, teacher: Path, vocabulary: int) -> None:
    """Write random tokens as prepare does."""
    directory.mkdir()
    generator = np.random.default_rng(0)
    writer = IndexedWriter(directory / "train", vocabulary)
    writer.add_documents([generator.integers(0, vocabulary, 1000).tolist() for _ in range(TOKENS // 1000)])
    writer.close()
    (directory / MANIFEST).write_text(json.dumps({"tokenizer_sha256": tokenizer_hash(teacher), "licence": "none"}))


def _name_machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
