"""Compensated cuts on tiny models of every supported architecture: fits, choices, exactness, bad calibration."""

from collections.abc import Collection
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from minitron.errors import ConfigError, RunError
from minitron.models.checkpoint import load_model
from minitron.models.pruning import compensation, least_squares
from minitron.models.pruning.calibration import check_calibration
from minitron.models.pruning.compensation import CHOSEN, cut_with_compensation
from minitron.models.pruning.layers import LayerReader
from minitron.models.pruning.least_squares import HeldOutTokens, Moments, fit_columns
from minitron.models.pruning.surgeon import CHOICE_RIDGE, Surgeon
from minitron.models.pruning.surgery import Given, Plan, Shape, choose_plan
from tests.stages.test_prune import (
    ARCHITECTURES,
    CUTS,
    cut,
    make_model,
    open_layers,
    random_importance,
    shape,
    token_ids,
)

CPU = torch.device("cpu")


class Made(NamedTuple):
    """A student, loaded, and what the cut says of it."""

    student: PreTrainedModel
    plan: Plan
    fits: list[dict[str, Any]]
    explained: float | None


def compensate(
    model: PreTrainedModel,
    cuts: dict[str, int],
    directory: Path,
    choose: Collection[str] = CHOSEN,
    sequences: int = 24,
    micro_batch_size: int = 5,
    given: Given | None = None,
) -> Made:
    """Cut a model in a new directory."""
    sizes = replace(Shape.from_config(model.config), **cuts)
    plan, teacher = choose_plan(random_importance(), sizes, given), open_layers(model, directory / "teacher")
    (student := directory / "student").mkdir()
    found = cut_with_compensation(teacher, plan, sizes, token_ids(sequences), micro_batch_size, CPU, student, choose)
    return Made(load_model(student), *found)


@torch.no_grad()
def measure_distance(student: PreTrainedModel, teacher: PreTrainedModel) -> float:
    """Return how far the logits of a student are from its teacher's, on tokens of no calibration."""
    ids = torch.randint(0, 512, (8, 32), generator=torch.Generator().manual_seed(77))
    logits = teacher(ids).logits
    return float((student(ids).logits - logits).norm() / logits.norm())


@pytest.mark.parametrize("axis", CUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_fit_is_worse_than_the_plain_cut_on_held_out_tokens(architecture: str, axis: str, tmp_path: Path) -> None:
    found = compensate(make_model(architecture, tied=axis == "layers"), CUTS[axis], tmp_path)
    assert Shape.from_config(found.student.config) == shape(**CUTS[axis])
    for fit in found.fits:
        for name in ("o_proj", "down_proj"):
            assert fit[name]["error"] <= fit[name]["plain_error"], (fit["layer"], name)
    for heads, groups in zip(found.plan.heads, found.plan.key_value, strict=True):
        per_group = len(heads) // len(groups)
        assert [head // 4 for head in heads] == [group for group in groups for _ in range(per_group)]


@pytest.mark.parametrize("axis", ["hidden", "intermediate", "heads", "layers"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_compensated_student_is_closer_to_its_teacher_than_the_plain_cut(
    architecture: str, axis: str, tmp_path: Path
) -> None:
    model = make_model(architecture)
    plan = choose_plan(random_importance(), shape(**CUTS[axis]))
    plain = measure_distance(cut(model, plan, tmp_path / "plain"), model)
    found = compensate(model, CUTS[axis], tmp_path / "compensated")
    assert measure_distance(found.student, model) < plain


def double_channels(model: PreTrainedModel) -> None:
    """Make the second half of the MLP's channels, and of each group's query heads, copies of the first."""
    for layer in model.model.layers:
        mlp, attention = layer.mlp, layer.self_attn
        for matrix in (mlp.gate_proj, mlp.up_proj):
            for parameter in matrix.parameters():
                parameter.data[40:] = parameter.data[:40]
        for parameter in attention.q_proj.parameters():
            by_group = parameter.data.view(4, 2, 16, *parameter.shape[1:])  # groups, halves, two heads of 8 channels
            by_group[:, 1] = by_group[:, 0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_others_can_replace_is_cut_without_loss(architecture: str, tmp_path: Path) -> None:
    """Minitron's cut of the same model loses most of it: the copies carry half of each output."""
    model = make_model(architecture)
    double_channels(model)
    found = compensate(model, {"intermediate_size": 40, "num_attention_heads": 8}, tmp_path, sequences=48)
    with torch.no_grad():
        expected, logits = (either(token_ids(3)).logits for either in (model, found.student))
    assert (logits - expected).norm() < 1e-5 * expected.norm()


def confine_states(model: PreTrainedModel) -> None:
    """Leave the states 8 directions of 10 channels whose last norm is negative, and 40 of the 54 others."""
    projector, generator = torch.zeros(64, 64), torch.Generator().manual_seed(5)
    for channels, directions in ((slice(10), 8), (slice(10, 64), 40)):
        size = channels.stop - (channels.start or 0)
        basis = torch.linalg.qr(torch.randn(size, directions, generator=generator))[0]
        projector[channels, channels] = basis @ basis.T
    model.model.norm.weight.data.abs_()[:10] *= -1
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            parameter.data = parameter.data @ projector
        elif "o_proj" in name or "down_proj" in name:
            parameter.data = projector @ parameter.data


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_directions_that_no_state_has_are_cut_without_loss(architecture: str, tied: bool, tmp_path: Path) -> None:
    """With a tied head this needs weights of the last norm that differ in their signs alone."""
    model = make_model(architecture, tied)
    confine_states(model)
    if tied:
        model.model.norm.weight.data.sign_().mul_(1.3)
    found = compensate(model, {"hidden_size": 48}, tmp_path, sequences=48)
    assert found.explained == pytest.approx(1)
    assert measure_distance(found.student, model) < 1e-4
    given = compensate(model, {"hidden_size": 48}, tmp_path / "given", CHOSEN - {"hidden"}, sequences=48)
    assert given.explained is None and measure_distance(given.student, model) > 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_components_are_closer_than_given_channels(tied: bool, tmp_path: Path) -> None:
    model = make_model("llama", tied)
    found = compensate(model, {"hidden_size": 48}, tmp_path / "found")
    given = compensate(model, {"hidden_size": 48}, tmp_path / "given", CHOSEN - {"hidden"})
    assert measure_distance(found.student, model) < measure_distance(given.student, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_student_has_the_dtype_of_its_teacher(dtype: torch.dtype, tmp_path: Path) -> None:
    found = compensate(make_model("qwen2").to(dtype), CUTS["all"], tmp_path)
    assert {weight.dtype for weight in found.student.parameters()} == {dtype}


def test_layers_before_the_first_gap_stay_what_they_are_and_the_one_before_it_takes_over(tmp_path: Path) -> None:
    model = make_model("llama")
    found = compensate(model, {"num_hidden_layers": 2}, tmp_path / "two", given={"layers": [0, 2]})
    assert [fit["layer"] for fit in found.fits] == [0, 2]
    found = compensate(model, {"num_hidden_layers": 3}, tmp_path / "three", given={"layers": [0, 1, 3]})
    assert [fit["layer"] for fit in found.fits] == [1, 3]
    weights, expected = (either.model.layers[0].state_dict() for either in (found.student, model))
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


def test_the_choice_may_be_minitrons(tmp_path: Path) -> None:
    found = compensate(make_model("qwen3"), CUTS["all"], tmp_path, choose=())
    assert found.plan == choose_plan(random_importance(), shape(**CUTS["all"]))


def test_the_size_of_the_micro_batches_changes_nothing_but_rounding(tmp_path: Path) -> None:
    model = make_model("qwen3")
    one, other = (
        compensate(model, {"intermediate_size": 40}, tmp_path / str(size), micro_batch_size=size) for size in (1, 24)
    )
    assert one.plan == other.plan
    for weight, expected in zip(one.student.parameters(), other.student.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-4)


def test_the_teachers_layer_is_gone_before_the_largest_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sizes of an 8B model it is 0.9 GB, and the fit of the MLP decides how much memory a cut needs."""
    weights: list[StorageWeakRef] = []
    load_layer, choose_channels = LayerReader.load_layer, compensation._CompensatedCut._choose_channels

    def load(*arguments: Any) -> Any:
        layer = load_layer(*arguments)
        weights.append(StorageWeakRef(layer.mlp.down_proj.weight.untyped_storage()))
        return layer

    def choose(*arguments: Any) -> torch.Tensor:
        assert weights
        assert all(weight.expired() for weight in weights)
        return choose_channels(*arguments)

    monkeypatch.setattr(LayerReader, "load_layer", load)
    monkeypatch.setattr(compensation._CompensatedCut, "_choose_channels", choose)
    assert len(compensate(make_model("llama"), CUTS["all"], tmp_path).fits) > 1


# ---- the fit


def make_tokens(tokens: int, noise: float, seed: int, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, matrix.shape[1], generator=generator)
    return inputs, inputs @ matrix.T + noise * torch.randn(tokens, len(matrix), generator=generator)


def make_moments(inputs: torch.Tensor, targets: torch.Tensor) -> Moments:
    moments = Moments(inputs.shape[1], targets.shape[1], CPU)
    moments.add(inputs, targets)
    return moments


def hold_out(inputs: torch.Tensor, targets: torch.Tensor) -> HeldOutTokens:
    tokens = HeldOutTokens()
    tokens.batches.append((inputs, targets))
    return tokens


def test_a_fit_finds_the_matrix_and_the_noisier_the_tokens_the_stronger_the_ridge() -> None:
    matrix = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    present, columns = torch.zeros(5, 20), torch.arange(20)

    def fit(tokens: int, noise: float) -> least_squares.Fit:
        fitted, held_out = (make_tokens(tokens, noise, seed, matrix) for seed in (1, 2))
        return fit_columns(present, columns, make_moments(*fitted), hold_out(*held_out))

    exact, noisy = fit(100, 0.0), fit(40, 8.0)
    torch.testing.assert_close(exact.weight, matrix, rtol=1e-5, atol=1e-5)
    assert exact.ridge is not None and noisy.ridge is not None and noisy.ridge > exact.ridge
    assert exact.error < 1e-9 and noisy.error <= noisy.plain_error


def test_what_is_right_already_is_not_fitted() -> None:
    matrix = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    fitted, held_out = (make_tokens(40, 1.0, seed, matrix) for seed in (1, 2))
    found = fit_columns(matrix, torch.arange(20), make_moments(*fitted), hold_out(*held_out))
    assert found.ridge is None or found.error <= found.plain_error
    assert (found.weight - matrix).norm() < 0.05 * matrix.norm()


def test_the_columns_that_are_chosen_are_the_best_of_all_choices() -> None:
    """Three of seven, two of which are nearly the same: both are important, and either of them suffices."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(500, 7, generator=generator)
    inputs[:, 5] = inputs[:, 2] + 0.01 * torch.randn(500, generator=generator)
    matrix = torch.tensor([[0.1, 0.9, 2.0, 0.05, 1.5, 2.0, 0.2]])
    tokens = inputs, inputs @ matrix.T
    errors = {
        kept: fit_columns(matrix, torch.tensor(kept), make_moments(*tokens), hold_out(*tokens)).error
        for kept in combinations(range(7), 3)
    }
    chosen = Surgeon(matrix, make_moments(*tokens), 7).drop_channels(3)
    assert tuple(chosen.tolist()) == min(errors, key=errors.__getitem__)


def choose_by_brute_force(
    inputs: torch.Tensor, matrix: torch.Tensor, size: int, owners: list[int], left: int
) -> set[int]:
    """Drop heads one by one, each time the one without which a refit of all others has the least error."""
    gram = inputs.double().T @ inputs.double()
    gram += CHOICE_RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    heads = set(range(len(owners)))

    def measure_error(kept: set[int]) -> float:
        """Return what a refit with the ridge leaves of the outputs, in the regularized norm."""
        columns = torch.tensor([head * size + channel for head in sorted(kept) for channel in range(size)])
        others = torch.tensor([c for c in range(len(gram)) if c // size not in kept])
        rest = gram[others][:, others] - gram[others][:, columns] @ torch.linalg.solve(
            gram[columns][:, columns], gram[columns][:, others]
        )
        pull = CHOICE_RIDGE * (inputs.double().square().sum(0).mean())
        dropped = matrix[:, others].double()
        return float((dropped @ rest * dropped).sum() - pull * dropped.square().sum())

    while True:
        spare = [h for h in heads if sum(owners[other] == owners[h] for other in heads) > left]
        if not spare:
            return heads
        heads.remove(min(spare, key=lambda head: measure_error(heads - {head})))


def test_heads_that_go_one_by_one_are_those_of_a_new_refit_each_time() -> None:
    """Two owners keep two of four heads of three channels each."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(300, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    matrix, owners = torch.randn(6, 24, generator=generator), [0, 0, 0, 0, 1, 1, 1, 1]
    surgeon = Surgeon(matrix, make_moments(inputs, inputs @ matrix.T), 24)
    surgeon.keep(torch.arange(24))
    chosen = surgeon.drop_groups(3, 2, torch.tensor(owners))
    assert set(chosen.tolist()) == choose_by_brute_force(inputs, matrix, 3, owners, 2)


def test_blocks_of_a_gram_matrix_give_what_one_block_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums, targets that are moved, the factor of some columns, a fit and a choice."""
    matrix = torch.randn(9, 20, generator=torch.Generator().manual_seed(0))
    present, columns = matrix + 0.1, torch.tensor([0, 1, 6, 7, 8, 13, 19])
    found = []
    for block in (64, 7, 1):
        monkeypatch.setattr(least_squares, "BLOCK", block)
        monkeypatch.setattr(least_squares, "OUTPUTS", block)
        fitted, held_out = (make_tokens(60, 1.0, seed, matrix) for seed in (1, 2))
        moments, rest = make_moments(*fitted), hold_out(*held_out)
        moments.blend(present, 0.5)
        rest.blend(present, 0.5)
        factor, _ = moments.factorize(0.01, columns)
        chosen = Surgeon(present, moments, 19).drop_channels(5)
        found.append((factor, moments.cross_CO, fit_columns(present, columns, moments, rest).weight, chosen))
    for blocks in found[1:]:
        torch.testing.assert_close(blocks, found[0])


# ---- bad input


def test_too_few_tokens_are_refused_with_how_many_are_needed() -> None:
    config = make_model("llama").config  # its widest matrix has 128 columns: 16 heads of 8
    check_calibration(6, 32, config)
    with pytest.raises(ConfigError, match=r"calibration_sequences: 4 .*32 tokens .* 128 columns; give at least 5"):
        check_calibration(4, 32, config)
    with pytest.raises(ConfigError, match="give at least 2"):
        check_calibration(1, 8192, config)


def test_activations_that_are_not_numbers_are_refused_with_their_layer(tmp_path: Path) -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[7] = 3e38
    with pytest.raises(RunError, match=r"compensated cut of layer 2: activations are not finite"):
        compensate(model, CUTS["intermediate"], tmp_path / "intermediate")
    with pytest.raises(RunError, match=r"principal components of layer 2: activations are not finite"):
        compensate(model, CUTS["hidden"], tmp_path / "hidden")


def test_equations_that_have_no_solution_are_refused() -> None:
    tokens = make_tokens(10, 0.0, 1, torch.ones(2, 3))
    moments = make_moments(*tokens)
    moments.gram_blocks[0] += torch.tensor([[1.0, 99.0, 0.0], [99.0, 1.0, 0.0], [0.0, 0.0, 1.0]]) * 1e9  # of no tokens
    with pytest.raises(RunError, match=r"3 x 3 Gram matrix of the inputs over 10 tokens is too badly conditioned"):
        fit_columns(torch.zeros(2, 3), torch.arange(3), moments, hold_out(*tokens))
    with pytest.raises(RunError, match="too badly conditioned"):
        Surgeon(torch.zeros(2, 3), moments, 3)


def test_tokens_without_an_embedding_are_no_obstacle(tmp_path: Path) -> None:
    """Padding has none in many models. Without biases, its state stays zero at the start of a sequence."""
    model = make_model("qwen3", tied=True)
    model.model.embed_tokens.weight.data[token_ids(1)[0, 0]] = 0
    found = compensate(model, CUTS["all"], tmp_path)
    assert all(torch.isfinite(weight).all() for weight in found.student.parameters())


def test_a_layer_that_no_token_reaches_keeps_its_weights(tmp_path: Path) -> None:
    model = make_model("llama")
    for parameter in model.model.layers[2].mlp.gate_proj.parameters():
        parameter.data.zero_()
    found = compensate(model, CUTS["intermediate"], tmp_path)
    kept = found.plan.intermediate[2]
    expected = model.model.layers[2].mlp.down_proj.weight[:, kept]
    torch.testing.assert_close(found.student.model.layers[2].mlp.down_proj.weight, expected)
