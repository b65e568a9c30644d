"""Memory of a training: the sums are those of a real training on a CPU, and of steps measured on GPUs."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from minitron.config.document import make_plan
from minitron.config.resources import Models, Sizes, count_models, find_peak, list_gpu_phases, list_training_phases
from minitron.config.resources.device import CHUNK, CUDA, HELD_OUT
from minitron.config.resources.estimate import estimate_run
from minitron.config.resources.gpus import GPUS
from minitron.config.settings import DistillSettings
from minitron.config.shapes import PruneSettings
from minitron.data.indexed import IndexedWriter
from minitron.models.losses import CHUNK_TOKENS
from minitron.models.pruning.calibration import MOST_HELD_OUT
from tests.constants import LLAMA_3_1_8B, REPOSITORY

TOLERANCE = 0.15

MODEL = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536,
    "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
"""22 million parameters: much beside what the libraries take, and activations are a fifth; small enough for seconds."""

SETTINGS: dict[str, Any] = {
    "sequence_length": 256, "global_batch_size": 4, "micro_batch_size": 2, "max_steps": 2, "warmup_steps": 0,
    "validation_sequences": 1, "validation_interval": 2, "checkpoint_interval": 1,
}  # fmt: skip

TRAIN = """
import gc, json, sys
from pathlib import Path
import torch
from minitron.config.stages import DistillConfig
from minitron.engines.hf import train

def read(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

class Tracker:
    def log(self, *numbers): pass

directory, settings, peaks = Path(sys.argv[1]), json.loads(sys.argv[2]), []
torch.nn.Linear(64, 64)(torch.randn(64, 64)).sum().backward()
for recompute in (True, False):
    config = DistillConfig(
        output=directory / "out", dataset=directory / "dataset", teacher=directory / "model",
        student=directory / "model", gradient_checkpointing=recompute, **settings
    )
    (work := directory / f"work-{recompute}").mkdir()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = read("VmRSS")
    train(config, directory / "model", work / "model", Tracker(), directory / "model")
    peaks.append(read("VmHWM") - before)
print(json.dumps(peaks))
"""
"""Trains with and without recomputation, and prints by how many bytes each raised the peak of resident memory."""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, int]:
    """The bytes that a distillation takes, with and without recomputation, in a process of its own.

    The process gives every freed block back, as the C library does with blocks above 32 MB, which large models have.
    """
    directory = tmp_path_factory.mktemp("memory")
    sizes = {name: value for name, value in MODEL.items() if name != "model_type"}
    config = AutoConfig.for_model("llama", **sizes, architectures=["LlamaForCausalLM"])
    AutoModelForCausalLM.from_config(config).save_pretrained(directory / "model")
    (directory / "dataset").mkdir()
    for split in ("train", "validation"):
        writer = IndexedWriter(directory / "dataset" / split, config.vocab_size)
        writer.add_documents([[*range(1000)]] * 5)
        writer.close()
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRAIN, str(directory), json.dumps(SETTINGS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    recomputing, plain = json.loads(done.stdout.splitlines()[-1])
    return {True: recomputing, False: plain}


@pytest.mark.parametrize("recompute", [False, True])
def test_a_training_on_a_cpu_takes_the_memory_of_the_plan(peaks: dict[bool, int], recompute: bool) -> None:
    """It guards every term: a weight, a moment, a gradient, an activation or a logit that is counted wrong."""
    settings = DistillSettings(gradient_checkpointing=recompute, **SETTINGS)
    phase = find_peak(list_training_phases(settings, count_models(MODEL, PruneSettings())))
    print(phase, peaks[recompute] / 1e6)
    assert phase.total == pytest.approx(peaks[recompute], rel=TOLERANCE)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_sums_are_the_peaks_of_the_guide_to_engine_hf(recompute: bool) -> None:
    """The step of benchmarks/kd_step.py on an H100: half of the layers, no optimizer, no context of CUDA."""
    name = r"compiled, `gradient_checkpointing`" if recompute else "compiled"
    page = (REPOSITORY / "docs/explanation/engines.md").read_text()
    (measured,) = re.findall(rf"^\| {name} \(\S+\) \| .* \| (\d+) GiB \|$", page, re.MULTILINE)
    architecture = LLAMA_3_1_8B | {"num_hidden_layers": 16}
    models = count_models(architecture, PruneSettings(hidden_size=3072, intermediate_size=9216))
    settings = DistillSettings(
        gpus=1, sequence_length=2048, global_batch_size=4, micro_batch_size=4, gradient_checkpointing=recompute
    )
    moments = 2 * 4 * models.student
    peak = find_peak(list_gpu_phases(settings, models)).total - CUDA - moments
    assert peak / 2**30 == pytest.approx(int(measured), rel=TOLERANCE)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_sums_are_the_peaks_of_the_whole_8b_on_one_h200(recompute: bool) -> None:
    """All layers and the optimizer; torch counted its tensors, without the context of CUDA. The guide has both."""
    name = r"all layers, `gradient_checkpointing`" if recompute else "all layers"
    page = (REPOSITORY / "docs/explanation/engines.md").read_text()
    ((measured, planned),) = re.findall(rf"^\| {name} \| .* \| ([\d.]+) GiB \| ([\d.]+) GiB \|$", page, re.MULTILINE)
    models = count_models(LLAMA_3_1_8B, PruneSettings(hidden_size=3072, intermediate_size=9216))
    settings = DistillSettings(
        gpus=1, sequence_length=8192, global_batch_size=4, micro_batch_size=1, gradient_checkpointing=recompute
    )
    peak = (find_peak(list_gpu_phases(settings, models)).total - CUDA) / 2**30
    assert round(peak, 1) == float(planned)
    assert peak == pytest.approx(float(measured), rel=TOLERANCE)


def test_a_chunk_is_that_of_the_loss() -> None:
    assert {"cpu": CHUNK[False], "cuda": CHUNK[True]} == CHUNK_TOKENS


def test_tokens_that_are_held_out_are_those_of_the_cut() -> None:
    assert HELD_OUT == MOST_HELD_OUT


def test_several_gpus_divide_weights_gradients_moments_and_teacher() -> None:
    models = Models(8 * 10**9, 4 * 10**9, 2, Sizes(), Sizes())
    one = DistillSettings(gpus=1, micro_batch_size=1, gradient_checkpointing=True)
    eight = one.model_copy(update={"gpus": 8})
    (alone, divided) = (
        {term.meaning: term.size for term in find_peak(list_gpu_phases(settings, models)).terms}
        for settings in (one, eight)
    )
    for meaning in ("weights, fp32", "Adam's moments, fp32", "teacher, bf16", "gradients, fp32"):
        assert divided[meaning] * 8 == alone[meaning]
    assert sum(divided.values()) < sum(alone.values()) / 2


def test_parallel_workers_of_engine_nemo_divide_what_they_share() -> None:
    eight = {"engine": "nemo", "gpus": 8, "micro_batch_size": 1}
    plain, split, both = (
        {
            term.meaning: term.size
            for term in find_peak(list_gpu_phases(DistillSettings(**eight, **sizes), Models())).terms
        }
        for sizes in ({}, {"tensor_parallel_size": 8}, {"tensor_parallel_size": 8, "sequence_parallel": True})
    )
    for meaning in ("weights, bf16", "gradients, fp32", "teacher, bf16", "logits of the micro-batch"):
        assert split[meaning] * 8 == plain[meaning]
    assert "master weights and Adam's moments, fp32" in plain and plain != split
    assert both["activations"] * 8 == plain["activations"] and both["activations"] < split["activations"]


def test_a_teacher_whose_distributions_are_kept_is_not_in_memory_while_the_student_learns() -> None:
    with_teacher = DistillSettings(gpus=1, micro_batch_size=1)
    cached = with_teacher.model_copy(update={"teacher_cache": "sampled"})
    before, after = (
        {phase.name: [term.meaning for term in phase.terms] for phase in list_gpu_phases(settings, Models())}
        for settings in (with_teacher, cached)
    )
    assert "teacher, bf16" in before["loss"] and "teacher, bf16" not in after["loss"]
    assert list(after) == ["teacher", *before]


def test_the_disk_has_room_for_the_teachers_distributions() -> None:
    document = {"teacher": "/t", "corpus": "/c", "distill.teacher_cache": "sampled"}
    disk = estimate_run(make_plan(document), Models(), GPUS["h100-80gb"])["distill"].disk
    (size,) = [term.size for term in disk if term.meaning.startswith("the teacher's distributions")]
    assert size == 30 * 128 * 8192 * (50 * 5 + 16)
