"""Host memory by arithmetic: parameters from config.json, the sums of every stage, and the guide's tables."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from minitron.config.document import SAMPLES, make_plan, merge, read_preset
from minitron.config.resources import (
    GIB,
    Models,
    Sizes,
    count_models,
    count_parameters,
    format_request,
    list_writing,
    parse_quantity,
    sum_memory,
    total,
)
from minitron.config.settings import StageSettings
from minitron.config.shapes import PruneSettings
from minitron.errors import ConfigError
from minitron.models.checkpoint import count_config_parameters
from tests.constants import LLAMA_3_1_8B, REPOSITORY

TEACHER, WIDTH, DEPTH = 8_030_261_248, 4_512_746_496, 4_540_469_248
STUDENTS = {
    "llama-3.1-minitron-4b-width": WIDTH,
    "llama-3.1-minitron-4b-depth": DEPTH,
    "nemo-tutorial-width": WIDTH,
    "nemo-tutorial-depth": DEPTH,
}
PLACES = ("gke-gpu", "gke-spot")
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 3, "vocab_size": 128, "head_dim": 24,
}  # fmt: skip
EMPTY = Sizes(0, 0, 0, 0, 0, 0, 0)
LARGE = Models(1000 * GIB, 100 * GIB, 2, EMPTY, EMPTY)
"""Models whose activations and logits take no memory: test_memory.py has these."""
GUIDE = REPOSITORY / "docs" / "how-to" / "deploy.md"

SPEEDS = (("standard-rwx", 100), ("premium-rwx", 350))
"""MiB per second that GKE's storage classes write, by Google's page on Filestore's performance."""

A3_HIGHGPU_8G = 1872e9
"""Bytes of memory of a node; if Google's GB were GiB it had 7 % more."""


def allocate_on_gke(memory: float) -> float:
    """Return what GKE leaves to pods of a node's memory, by the formula of Google's page on node sizes."""
    reserved, left = 0.1 * GIB, memory
    for part, size in ((0.25, 4), (0.2, 4), (0.1, 8), (0.06, 112), (0.02, math.inf)):
        taken = min(left, size * GIB)
        reserved, left = reserved + part * taken, left - taken
    return memory - reserved


def plan_preset(*presets: str) -> dict[str, StageSettings]:
    document = merge({"teacher": "/t", "corpus": "/c"}, *map(read_preset, presets))
    return make_plan(
        {key: value for key, value in document.items() if not key.startswith(("cluster.", SAMPLES))}
    ).stages


def count_preset(preset: str) -> Models:
    prune = plan_preset(preset)["prune"]
    assert isinstance(prune, PruneSettings)
    return count_models(LLAMA_3_1_8B, prune)


def ask_for(stage: str, models: Models = LARGE, **document: Any) -> float:
    """Return the Gi that a stage asks for with these settings."""
    settings = make_plan(merge({"teacher": "/t", "corpus": "/c"}, document)).stages[stage]
    return total(sum_memory(settings, models)) / GIB


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_the_closed_formula_counts_what_transformers_builds(family: str, settings: dict[str, Any], tied: bool) -> None:
    architecture = SMALL | settings | {"model_type": family, "tie_word_embeddings": tied}
    sizes = {name: value for name, value in architecture.items() if name != "model_type"}
    if family == "qwen2":
        del sizes["head_dim"], architecture["head_dim"]
    assert count_parameters(architecture) == count_config_parameters(AutoConfig.for_model(family, **sizes))


def test_another_family_or_a_missing_size_is_said() -> None:
    with pytest.raises(ConfigError, match="model_type gemma is not one of llama, mistral, qwen2, qwen3"):
        count_parameters(SMALL | {"model_type": "gemma"})
    with pytest.raises(ConfigError, match=r"config.json has no hidden_size"):
        count_parameters({"model_type": "llama"})


@pytest.mark.parametrize("preset", STUDENTS)
def test_the_presets_have_the_published_sizes(preset: str) -> None:
    assert count_preset(preset)[:3] == (TEACHER, STUDENTS[preset], 2)


def test_heads_shrink_with_their_groups() -> None:
    """As in the stage: prune takes its sizes from the same function."""
    sizes = PruneSettings(num_key_value_heads=1).compute_student_sizes(SMALL)
    assert sizes["num_attention_heads"] == 2 and sizes["num_hidden_layers"] == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [("64Gi", 64 * 2**30), ("64G", 64e9), ("1.5k", 1500), ("7", 7), ("2Ti", 2**41), ("3Mi", 3 << 20)],
)
def test_a_quantity_is_bytes(text: str, expected: float) -> None:
    assert parse_quantity(text) == expected


def test_the_sums_of_engine_nemo() -> None:
    """Of a student of 100 Gi parameters; /dev/shm takes 16 Gi, and each process 8."""
    nemo = {"engine": "nemo"}
    one = {"distill": {"gpus": 8, "tensor_parallel_size": 8}}
    assert ask_for("distill", **nemo, **one) == 9 * 8 + 16 + max(36 * 100, 3 * 2 * 1000)
    assert ask_for("finetune", **nemo, **{"finetune": one["distill"]}) == 9 * 8 + 16 + 36 * 1000
    copies = {"distill": {"gpus": 8, "tensor_parallel_size": 2}}  # every copy of the model gathers the whole state
    assert ask_for("distill", **nemo, **copies) == 9 * 8 + 16 + (4 * 12 + 24) * 100
    nodes = {"distill": {"gpus": 0, "num_nodes": 2, "tensor_parallel_size": 8}}  # each writes its half
    assert ask_for("distill", LARGE._replace(teacher=100 * GIB), **nemo, **nodes) == 9 * 8 + 16 + (12 + 12) * 100
    cpu = {"distill": {"gpus": 0}}
    assert ask_for("distill", **nemo, **cpu) == 2 * 8 + (36 + 16) * 100 + 4 * 1000
    assert ask_for("prune", **nemo) == 2 * 8 + 16 + 3 * 2 * 1000
    assert ask_for("finetune", **nemo, finetune={"gpus": 8, "enabled": False}) == 8 + 16


def test_the_sums_of_engine_hf() -> None:
    gpu, cpu = {"engine": "hf"}, {"engine": "hf", **{f"{stage}.gpus": 0 for stage in ("finetune", "prune", "distill")}}
    assert ask_for("finetune", **gpu) == 8 + 16 + 12 * 1000
    assert ask_for("distill", **gpu) == 8 + 16 + max(2 * 1000, 12 * 100)
    assert ask_for("prune", **gpu) == 8 + 16 + 8
    eight = {"engine": "hf", "distill": {"gpus": 8}}  # one process has the whole best state, too
    assert ask_for("distill", LARGE._replace(teacher=100 * GIB), **eight) == 9 * 8 + 16 + (12 + 4) * 100
    assert ask_for("finetune", **cpu) == 8 + (16 + 12) * 1000
    assert ask_for("distill", **cpu) == 8 + (16 + 12) * 100 + 4 * 1000
    assert ask_for("prune", **cpu) == 8 + 8
    assert ask_for("prune", **gpu, prune={"gpus": 4}) == 5 * 8 + 16 + 4 * 8
    cpu["prune.method"], gpu["prune.method"] = "compensated", "compensated"
    assert ask_for("prune", **cpu) == 8 + 8
    assert ask_for("prune", **gpu) == 8 + 16 + 8
    cpu["prune.layers_by"], gpu["prune.layers_by"] = "loss", "loss"
    assert ask_for("prune", LARGE._replace(teacher=900 * GIB), **cpu) == 8 + 4 * 900 + 40 * 300
    assert ask_for("prune", LARGE._replace(teacher=900 * GIB), **gpu) == 8 + 16 + 20 * 300


def test_the_sums_of_the_other_stages() -> None:
    assert (ask_for("prepare"), ask_for("register")) == (16, 8)
    assert ask_for("evaluate") == 8 + 16 + 2 * 1000
    assert ask_for("evaluate", evaluate={"gpus": 4}) == 5 * 8 + 16 + 4 * 2 * 1000
    assert ask_for("evaluate", evaluate={"gpus": 0}) == 8 + 4 * (2 * 1000 + 2 * 100)
    assert ask_for("evaluate", LARGE._replace(teachers=1), evaluate={"gpus": 0}) == 8 + 4 * (1000 + 2 * 100)
    assert ask_for("evaluate", evaluate={"gpus": 0, "champion": "models:/a/1"}) == 8 + 4 * (2 * 1000 + 3 * 100)


def test_the_demo_asks_for_more_than_it_was_measured_to_take() -> None:
    """The tutorial has the peaks of SmolLM2-135M, engine hf without a GPU."""
    row = next(line for line in (REPOSITORY / "docs/tutorial.md").read_text().splitlines() if "peak memory, MB" in line)
    models = Models(134_515_008, 88_509_888, 2)
    stages = plan_preset("demo")
    for name, peak in zip(stages, re.findall(r"\d+", row), strict=True):
        settings = stages[name].model_copy(update={"gpus": 0, "engine": "hf"})
        assert int(peak) * 2**20 < total(sum_memory(settings, models)) < int(peak) * 2**20 + 16 * GIB


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("preset", STUDENTS)
def test_a_node_has_the_memory_of_every_stage(preset: str, place: str) -> None:
    models = count_preset(preset)
    for settings in plan_preset(preset, place).values():
        assert total(sum_memory(settings, models)) < allocate_on_gke(A3_HIGHGPU_8G)


def write_memory_table() -> str:
    """Return the guide's table of what the stages of the presets ask for."""
    lines = [
        "| preset | student | prepare | finetune | prune | distill | evaluate | register |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for preset in STUDENTS:
        models = count_preset(preset)
        requests = [format_request(sum_memory(settings, models)) for settings in plan_preset(preset).values()]
        lines.append(f"| `{preset}` | {models.student:,} | {' | '.join(requests)} |")
    return "\n".join(lines)


def write_disk_table() -> str:
    """Return the guide's table of what the trainings of the presets write, and how long their workspaces take."""
    classes = " | ".join(f"{name}, {speed} MiB/s" for name, speed in SPEEDS)
    lines = [
        f"| preset | finetune | distill | together | {classes} |",
        "|---|---|---|---|---|---|",
    ]
    for preset in STUDENTS:
        models, stages = count_preset(preset), plan_preset(preset)
        written = {stage: list_writing(stages[stage], models) for stage in ("finetune", "distill")}
        cells = [" + ".join(f"{e.times} × {e.size / 1e9:.1f}" for e in entries) for entries in written.values()]
        together = sum(entry.total for entries in written.values() for entry in entries)
        minutes = [f"{together / (speed * 2**20) / 60:.0f} min" for _, speed in SPEEDS]
        lines.append(f"| `{preset}` | {' | '.join([*cells, f'{together / 1e9:.0f} GB', *minutes])} |")
    return "\n".join(lines)


@pytest.mark.parametrize("write_table", [write_memory_table, write_disk_table])
def test_the_tables_of_the_guide_are_the_arithmetic(write_table: Callable[[], str]) -> None:
    print(write_table())
    assert write_table() in GUIDE.read_text()


def test_the_workspace_on_gke_is_of_the_class_in_the_guides_table() -> None:
    claim = yaml.safe_load((REPOSITORY / "manifests/overlays/gke/workspace.yaml").read_text())["spec"]
    assert claim["storageClassName"] == SPEEDS[-1][0]
    assert parse_quantity(claim["resources"]["requests"]["storage"]) >= 2.5 * 2**40, "less makes no smaller instance"
