"""The shapes that a search races: counted from configs alone, within the budget, spread over depth and width."""

from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from minitron.config.parse import SectionError
from minitron.config.resources import count_parameters
from minitron.config.shapes import PRUNED_SIZES, PruneSettings, SearchSettings
from minitron.engines import samples
from minitron.engines.plan_checks import find_size_faults, read_sizes
from minitron.runtime.candidates import count_memory_gb, describe_student, propose_candidates

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256, "tie_word_embeddings": False,
    "dtype": "bfloat16",
}  # fmt: skip
SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "num_hidden_layers": 30, "vocab_size": 49152, "tie_word_embeddings": True,
    "dtype": "float32",
}  # fmt: skip
QWEN3 = SMOLLM2 | {"model_type": "qwen3", "head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
TEACHERS = {"8b": LLAMA_8B, "smollm2": SMOLLM2, "qwen3": QWEN3, "tiny": samples.TEACHER}


def propose(architecture: dict[str, Any], prune: PruneSettings | None = None, **search: Any) -> Any:
    return propose_candidates(SearchSettings(**search), architecture, prune or PruneSettings())


@pytest.mark.parametrize("architecture", TEACHERS.values(), ids=TEACHERS)
def test_candidates_use_the_budget_and_fit_the_teacher(architecture: dict[str, Any]) -> None:
    budget = int(0.75 * count_parameters(architecture))
    candidates = propose(architecture, parameters=budget)
    assert len(candidates) == 8 == len({candidate.name for candidate in candidates})
    for sizes, cost in candidates:
        assert 0.9 * budget <= cost <= budget
        assert not list(find_size_faults(PruneSettings(**sizes), architecture))
    axes = [{candidate.sizes[axis] for candidate in candidates} for axis in PRUNED_SIZES]
    assert all(len(values) > 1 for values in axes[:3]) and len(axes[-1]) > 1, "spread over depth and width"


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "tiny"])
def test_a_candidate_has_the_parameters_that_transformers_counts(name: str) -> None:
    import torch

    architecture = TEACHERS[name]
    for sizes, cost in propose(architecture, parameters=int(0.7 * count_parameters(architecture))):
        student = describe_student(architecture, sizes)
        config = AutoConfig.for_model(**{key: value for key, value in student.items() if key != "architectures"})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert cost == sum(parameter.numel() for parameter in model.parameters())


def test_memory_is_that_of_weights_and_cache() -> None:
    search = SearchSettings(memory_gb=1, batch=2, context=1000)
    student = describe_student(LLAMA_8B, read_sizes(LLAMA_8B))
    weights, cache = 8_030_261_248 * 2, 2 * 32 * 8 * 128 * 2 * 1000 * 2
    assert count_memory_gb(student, search) == pytest.approx((weights + cache) / 1e9)
    candidates = propose(LLAMA_8B, memory_gb=10, batch=4, context=32768)
    assert all(9 <= cost <= 10 for _, cost in candidates)
    assert min(candidate.sizes["num_key_value_heads"] for candidate in candidates) == 4, "the cache is most of it"


def test_latency_is_measured_once_for_each_width() -> None:
    measured = []

    def measure(student: Any) -> tuple[float, float]:
        measured.append((student["hidden_size"], student["intermediate_size"], student["num_attention_heads"]))
        return 1.0, student["hidden_size"] * student["intermediate_size"] / 1e6

    search = SearchSettings(latency_ms=20, tolerance=0.2)
    candidates = propose_candidates(search, SMOLLM2, PruneSettings(), measure)
    assert candidates and all(16 <= cost <= 20 for _, cost in candidates)
    assert len(measured) <= 64 + 1 and len({candidate.sizes["num_hidden_layers"] for candidate in candidates}) > 1


def test_the_shape_that_you_picked_races_if_it_meets_the_budget() -> None:
    picked = PruneSettings(intermediate_size=1024)
    assert propose(SMOLLM2, picked, parameters=107_972_928)[0].name == "30x576-1024-9/3"
    assert "30x576-1024-9/3" not in [shape.name for shape in propose(SMOLLM2, picked, parameters=90_000_000)]


def test_engine_nemo_gets_its_widths() -> None:
    prune = PruneSettings(engine="nemo")
    for sizes, _ in propose(LLAMA_8B, prune, parameters=5_000_000_000):
        assert sizes["hidden_size"] % 64 == sizes["intermediate_size"] % 64 == 0


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (
            {"parameters": 1000},
            "search.parameters: 1,000 is less than any shape has; the nearest, 1x16-32-1/1, has 18,992",
        ),
        ({"parameters": 10**9}, "search.parameters: 1,000,000,000 is met by the teacher, which has 213,568; give less"),
        (
            {"parameters": 150_000, "tolerance": 1e-6},
            "search.parameters: no shape has between 150,000 and 150,000; the nearest, ",
        ),
    ],
)
def test_a_budget_that_no_shape_meets_names_the_nearest(search: dict[str, Any], message: str) -> None:
    with pytest.raises(SectionError) as refused:
        propose(samples.TEACHER, **search)
    assert str(refused.value).startswith(message), refused.value


def test_a_search_has_one_budget() -> None:
    with pytest.raises(ValueError, match="parameters is given, too; a search has one budget"):
        SearchSettings(parameters=10, memory_gb=1)
