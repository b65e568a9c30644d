"""Time the step of a distillation against the work that it cannot do without: JSON lines.

Run it: `python benchmarks/kd_step.py` (`make bench`), on a GPU `python benchmarks/kd_step.py --gpu`.

`kd_loss_over_gemm`: the fused loss, forward and backward, over its four matrix products; `kd_loss_mixed_over_gemm`:
with a cross-entropy beside the KL; `…_tempered…`, `…_reverse…`, `…_jensen_shannon…`: at temperature 2, and of other
divergences. `kd_loss_over_checkpointed`: over the same chunks, recomputed in the backward pass
by torch.utils.checkpoint; `kd_loss_over_trl`, `kd_loss_over_nemo_automodel`: over the KL of those packages and the
logits that it needs, if they are installed; `kd_loss_over_liger_kernel` (on a GPU): over Liger's fused KL.
`kd_loss_memory_over_naive_N` (on a CPU): growth of the process's peak memory over that of the KL of whole logits of N
tokens, each in a process of its own. `kd_step_over_floor`: teacher forward, student forward and backward, over the same
two models without a loss, plus those four products. `kd_step_mfu` (on a GPU): the floating-point operations of the
step's matrix products over what the GPU could do in its time; nothing that is computed twice counts twice. The
optimizer's step is in none of them. The models are random. What is compared runs in turn in one process; the values are
medians. `baseline` is this device's value in baselines.json, which `--keep` writes.
"""

import argparse
import functools
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from minitron.config.resources.gpus import find_peak_speed
from minitron.engines.hf import autocast_on_gpu, compile_layers, get_compute_dtype, get_device
from minitron.models.losses import LossWeights, linear_loss
from minitron.models.memory import keep_freed_memory
from minitron.models.scoring import compute_hidden_states, get_output_head

BASELINES = Path(__file__).with_name("baselines.json")
"""By device and claim: the values of an earlier run."""

SIZES: dict[str, dict[str, Any]] = {
    # SmolLM2-135M's, and a narrower student; two layers give the ratios of thirty
    "cpu": {
        "layers": 2, "vocabulary": 49152, "batch": 2, "sequence": 512,
        "teacher": (576, 1536, 9, 3, 64), "student": (576, 1024, 9, 3, 64),
    },
    # Llama-3.1-8B's and its 4B student's in width, with half of their layers, so that a student in fp32 has room
    "cuda": {
        "layers": 16, "vocabulary": 128256, "batch": 4, "sequence": 2048,
        "teacher": (4096, 14336, 32, 8, 128), "student": (3072, 9216, 32, 8, 128),
    },
}  # fmt: skip
"""By device: hidden and intermediate size, heads, key-value groups and head_dim of both models."""

WEIGHTS = LossWeights(kl=1.0, cross_entropy=0.0)

LOSSES = {
    "kd_loss": (WEIGHTS, 1.1),
    "kd_loss_mixed": (LossWeights(kl=0.7, cross_entropy=0.3), 1.15),
    "kd_loss_tempered": (WEIGHTS._replace(temperature=2.0), 1.25),
    "kd_loss_reverse": (WEIGHTS._replace(divergence_beta=1.0), 1.25),
    "kd_loss_jensen_shannon": (WEIGHTS._replace(divergence_beta=0.5), 1.25),
}
"""By name: the weights of a loss, and the target of its time over the four matrix products."""

MEMORY_TARGETS = {1024: 0.3, 4096: 0.1}
"""By number of tokens."""


def main() -> None:
    """Print the claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="refuse to measure on a CPU")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--keep", action="store_true", help="keep the values as this device's baseline")
    parser.add_argument(
        "--grow", nargs=2, metavar=("LOSS", "TOKENS"), help="print MB that a loss adds to the peak memory"
    )
    arguments = parser.parse_args()
    if arguments.grow:
        print(measure_growth(arguments.grow[0], int(arguments.grow[1])))
        return
    device = get_device()
    if arguments.gpu and device.type != "cuda":
        parser.error("--gpu: torch sees no GPU")
    torch.manual_seed(0)
    bench = _Bench(SIZES[device.type], device)
    claims = [*bench.measure_loss(arguments.runs), *bench.measure_step(arguments.runs)]
    if device.type == "cpu":
        claims += [bench.measure_memory(tokens, target) for tokens, target in MEMORY_TARGETS.items()]
    machine = torch.cuda.get_device_name() if device.type == "cuda" else name_cpu()
    baselines = json.loads(BASELINES.read_text())
    known = baselines.setdefault(machine, {})
    for claim in claims:
        baseline = {"baseline": known[claim["claim"]]} if claim["claim"] in known else {}
        print(json.dumps(claim | baseline | {"runs": arguments.runs, "machine": machine}), flush=True)
    if arguments.keep:
        known |= {claim["claim"]: claim["value"] for claim in claims}
        BASELINES.write_text(json.dumps(baselines, indent=2, sort_keys=True) + "\n")


def name_cpu() -> str:
    """Return the processor's name and the number of threads."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"


def compute_naive_kl(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Return the KL of whole logits, as most trainers compute it."""
    student, teacher = ((a @ b.T).float().log_softmax(-1) for a, b in ((hidden, head), (teacher_hidden, teacher_head)))
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def compute_checkpointed_kl(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Return the KL in chunks whose logits are computed again in the backward pass."""
    sums = [
        checkpoint(compute_naive_kl, *parts, use_reentrant=False)
        for chunk, teacher_chunk in zip(hidden.split(128), teacher_hidden.split(128), strict=True)
        for parts in [(chunk, head.to(chunk.dtype), teacher_chunk, teacher_head)]
    ]
    return torch.stack(sums).sum()


def compute_trl_kl(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor
) -> Tensor:
    """Return TRL's KL of whole logits [N, V]."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    student, teacher = hidden @ head.T, teacher_hidden @ teacher_head.T
    return GKDTrainer.generalized_jsd_loss(student[None], teacher[None], labels[None], beta=0.0, reduction="sum")


def compute_automodel_kl(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor
) -> Tensor:
    """Return NeMo AutoModel's KL of whole logits [N, V]."""
    from nemo_automodel.components.loss.kd_loss import KDLoss

    return KDLoss()(hidden @ head.T, teacher_hidden @ teacher_head.T, labels, num_batch_labels=1)


def compute_liger_kl(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor
) -> Tensor:
    """Return Liger's KL, the mean over the tokens, which computes the logits in chunks."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.0)(hidden, head, teacher_hidden, teacher_head, labels)


PEERS = {"trl": compute_trl_kl, "nemo_automodel": compute_automodel_kl}
"""Losses of other packages by module; each is measured if it is installed."""

GPU_PEERS = {"liger_kernel": compute_liger_kl}
"""Those whose kernels need a GPU."""


def measure_growth(loss: str, tokens: int) -> float:
    """Return the MB by which a loss, forward and backward, raises this process's peak memory: `fused` or `naive`."""
    sizes = SIZES["cpu"]
    (width, *_), (teacher_width, *_) = sizes["student"], sizes["teacher"]
    hidden, head = torch.randn(tokens, width), torch.randn(sizes["vocabulary"], width).requires_grad_()
    teacher_hidden, teacher_head = torch.randn(tokens, teacher_width), torch.randn(sizes["vocabulary"], teacher_width)
    labels = torch.zeros(tokens, dtype=torch.long)

    def run(count: int) -> None:
        head.grad, part = None, hidden[:count].detach().requires_grad_()
        if loss == "naive":
            compute_naive_kl(part, head, teacher_hidden[:count], teacher_head).backward()
        else:
            linear_loss(part, head, labels[:count], WEIGHTS, teacher_hidden[:count], teacher_head).loss.backward()

    run(8)
    before = read_peak_mb()
    run(tokens)
    return read_peak_mb() - before


def read_peak_mb() -> float:
    """Return this program's peak memory; getrusage also counts the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


class _Bench:
    """The two models, a batch, and what is timed on them."""

    def __init__(self, sizes: dict[str, Any], device: torch.device) -> None:
        self._device, self._sizes = device, sizes
        if device.type == "cpu":
            keep_freed_memory()  # as a training does
        self._teacher = self._make_model(sizes["teacher"], get_compute_dtype()).eval().requires_grad_(False)
        self._student = self._make_model(sizes["student"], torch.float32).train()
        for model in (self._teacher, self._student):
            compile_layers(model)
        shape = (sizes["batch"], sizes["sequence"])
        self._input_ids = torch.randint(sizes["vocabulary"], shape, device=device)
        self._labels = torch.randint(sizes["vocabulary"], (self._input_ids.numel(),), device=device)
        self._hidden, self._teacher_hidden = (
            torch.randn(self._labels.numel(), sizes[name][0], device=device, dtype=get_compute_dtype())
            for name in ("student", "teacher")
        )

    def measure_loss(self, runs: int) -> list[dict[str, Any]]:
        """Return the claims of the loss."""
        hidden, head = self._hidden.requires_grad_(), get_output_head(self._student)
        teacher = self._teacher_hidden, get_output_head(self._teacher)

        def compute_loss(weights: LossWeights) -> None:
            hidden.grad = head.grad = None
            linear_loss(hidden, head, self._labels, weights, *teacher).loss.backward()

        def checkpoint_loss() -> None:
            hidden.grad = head.grad = None
            compute_checkpointed_kl(hidden, head, *teacher).backward()

        def run_peer(compute_kl: Callable[..., Tensor]) -> None:
            hidden.grad = head.grad = None
            compute_kl(hidden, head.to(hidden.dtype), *teacher, self._labels).backward()

        known = PEERS | (GPU_PEERS if self._device.type == "cuda" else {})
        peers = {name: compute_kl for name, compute_kl in known.items() if importlib.util.find_spec(name)}
        functions: list[Callable[[], None]] = [checkpoint_loss, self._multiply]
        functions += [functools.partial(compute_loss, weights) for weights, _ in LOSSES.values()]
        functions += [functools.partial(run_peer, compute_kl) for compute_kl in peers.values()]
        checkpointed, products, *others = self._time(functions, runs)
        losses, of_peers = others[: len(LOSSES)], others[len(LOSSES) :]
        loss = losses[0]
        return [
            *(
                self._claim(f"{name}_over_gemm", seconds / products, "x", target, "lower", "its four matrix products")
                for (name, (_, target)), seconds in zip(LOSSES.items(), losses, strict=True)
            ),
            self._claim("kd_loss_over_checkpointed", loss / checkpointed, "x", 0.67, "lower", "torch.utils.checkpoint"),
            *(
                self._claim(f"kd_loss_over_{name}", loss / seconds, "x", 1, "lower", f"{name} {version(name)}")
                for name, seconds in zip(peers, of_peers, strict=True)
            ),
        ]

    def measure_memory(self, tokens: int, target: float) -> dict[str, Any]:
        """Return the claim of the loss's memory.

        Both sides run in processes of their own, whose peaks are theirs, and which give every freed block back.
        """

        def run(loss: str) -> float:
            command = [sys.executable, __file__, "--grow", loss, str(tokens)]
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
            return float(subprocess.check_output(command, text=True, env=environment))

        fused, naive = run("fused"), run("naive")
        name = f"kd_loss_memory_over_naive_{tokens}"
        claim = self._claim(name, fused / naive, "x", target, "lower", "the KL of whole logits")
        return claim | {"mb": round(fused, 1), "naive_mb": round(naive, 1)}

    def measure_step(self, runs: int) -> list[dict[str, Any]]:
        """Return the claims of the whole step."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step, models, products = self._time([self._step, self._run_models, self._multiply], runs)
        floor = models + products
        claims = [
            self._claim("kd_step_over_floor", step / floor, "x", 1.1, "lower", "models and matrix products alone")
        ]
        claims[0] |= {"tokens_per_second": round(self._labels.numel() / step, 1)}
        if self._device.type == "cuda" and (peak := find_peak_speed(torch.cuda.get_device_name())):
            used = {"peak_gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)}
            claims.append(
                self._claim(
                    "kd_step_mfu", self._count_operations() / step / peak, "of peak", 0.4, "higher", "data sheet"
                )
                | used
            )
        return claims

    def _step(self) -> None:
        self._student.zero_grad(set_to_none=True)
        with autocast_on_gpu():
            hidden = compute_hidden_states(self._student, self._input_ids).to(get_compute_dtype())
        with torch.no_grad():
            teacher_hidden = compute_hidden_states(self._teacher, self._input_ids)
        heads = get_output_head(self._student), get_output_head(self._teacher)
        terms = linear_loss(hidden, heads[0], self._labels, WEIGHTS, teacher_hidden, heads[1])
        (terms.loss / self._labels.numel()).backward()

    def _run_models(self) -> None:
        self._student.zero_grad(set_to_none=True)
        with autocast_on_gpu():
            hidden = compute_hidden_states(self._student, self._input_ids).to(get_compute_dtype())
        with torch.no_grad():
            compute_hidden_states(self._teacher, self._input_ids)
        hidden.backward(torch.ones_like(hidden))

    @torch.no_grad()
    def _multiply(self) -> None:
        """Compute the four products of the heads: both models' logits, and the student's two gradients."""
        head, teacher_head = (
            get_output_head(model).to(get_compute_dtype()) for model in (self._student, self._teacher)
        )
        for start in range(0, len(self._labels), 1024):
            chunk = self._hidden[start : start + 1024]
            logits = chunk @ head.T
            self._teacher_hidden[start : start + 1024] @ teacher_head.T
            logits @ head
            logits.T @ chunk

    def _count_operations(self) -> float:
        """Count the operations of the step's matrix products: 2 per weight and token forward, 4 backward.

        Attention is causal: a token sees half of the sequence on average.
        """
        layers, sequence = self._sizes["layers"], self._sizes["sequence"]
        per_token = 0.0
        for model, passes, name in ((self._student, 3, "student"), (self._teacher, 1, "teacher")):
            weights = sum(w.numel() for key, w in model.named_parameters() if w.dim() == 2 and "embed" not in key)
            _, _, heads, _, head_dim = self._sizes[name]
            per_token += passes * (2 * weights + 4 * layers * heads * head_dim * sequence / 2)
        return per_token * self._labels.numel()

    def _time(self, functions: list[Callable[[], None]], runs: int) -> list[float]:
        """Return the median seconds of each; the first two rounds warm up."""
        seconds: list[list[float]] = [[] for _ in functions]
        for _ in range(runs + 2):
            for function, times in zip(functions, seconds, strict=True):
                self._wait()
                started = time.perf_counter()
                function()
                self._wait()
                times.append(time.perf_counter() - started)
        return [statistics.median(times[2:]) for times in seconds]

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _make_model(self, sizes: tuple[int, ...], dtype: torch.dtype) -> PreTrainedModel:
        hidden, intermediate, heads, groups, head_dim = sizes
        config = LlamaConfig(
            vocab_size=self._sizes["vocabulary"], hidden_size=hidden, intermediate_size=intermediate,
            num_hidden_layers=self._sizes["layers"], num_attention_heads=heads, num_key_value_heads=groups,
            head_dim=head_dim, tie_word_embeddings=False,
        )  # fmt: skip
        with torch.device(self._device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)

    @staticmethod
    def _claim(name: str, value: float, unit: str, target: float, better: str, against: str) -> dict[str, Any]:
        return {
            "claim": name, "value": round(value, 3), "unit": unit, "target": target, "better": better,
            "against": against,
        }  # fmt: skip


if __name__ == "__main__":
    main()
