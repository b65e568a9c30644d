"""A cached teacher: what is drawn of its distribution, the files, and the students that learn from them."""

from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from torch import Tensor

from minitron.config.document import make_plan
from minitron.config.stages import DistillConfig, EvaluateConfig
from minitron.data.packed import open_training_data
from minitron.engines.hf import teacher_cache
from minitron.engines.hf.teacher_cache import CachedTeacher, cache_teacher
from minitron.errors import ConfigError
from minitron.models.losses import LossWeights, TeacherTargets, linear_loss
from minitron.runtime import cleanup
from tests.constants import SEQUENCE

DRAWS, VOCABULARY = 16, 40


def log_probabilities() -> Tensor:
    """Return [30, V]: flat, peaked and almost certain distributions."""
    logits = torch.randn(30, VOCABULARY, generator=torch.Generator().manual_seed(0))
    return torch.log_softmax(logits * torch.linspace(0.1, 8, 30)[:, None], -1)


def spread(ids: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
    """Return the weights as [C, V]."""
    dense = torch.zeros(len(lengths), VOCABULARY, dtype=torch.float64)
    return dense.index_put((torch.arange(len(lengths)).repeat_interleave(lengths), ids), weights.double())


def test_the_mean_of_the_draws_is_the_distribution() -> None:
    """Over all shifts; each single draw is off by less than one in each token."""
    log_p, shifts = log_probabilities(), 500
    total = torch.zeros(30, VOCABULARY, dtype=torch.float64)
    for shift in range(shifts):
        *drawn, entropy = teacher_cache.sample_tokens(log_p, torch.full((30,), (shift + 0.5) / shifts), DRAWS)
        numbers = spread(*drawn)
        assert (numbers.sum(-1) == DRAWS).all() and (numbers - DRAWS * log_p.double().exp()).abs().max() < 1
        total += numbers
    torch.testing.assert_close(total / shifts / DRAWS, log_p.double().exp(), rtol=0, atol=2 / shifts / DRAWS)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1))


def test_top_k_keeps_the_most_probable_tokens() -> None:
    log_p = log_probabilities()
    *kept, _ = teacher_cache.keep_most_probable(log_p, log_p, 3)
    dense = spread(*kept)
    assert ((dense > 0).sum(-1) == 3).all()
    torch.testing.assert_close(dense.sum(-1).float(), log_p.exp().topk(3).values.sum(-1))


@pytest.fixture
def config(compressed: EvaluateConfig, tmp_path: Path) -> DistillConfig:
    """A distillation of 6 steps of 8 sequences, with a cached teacher."""
    models = {"teacher": compressed.teacher, "student": compressed.pruned, "dataset": compressed.dataset}
    training = {"sequence_length": SEQUENCE, "micro_batch_size": 4, "global_batch_size": 8, "max_steps": 6}
    places = {"output": tmp_path / "student", "workspace": tmp_path / "ws"}
    return DistillConfig(**models, **training, **places, teacher_cache="sampled", teacher_cache_size=DRAWS)


def list_shards(config: DistillConfig) -> list[Path]:
    return sorted(Path(config.workspace or "").glob("teacher-cache/*/*.safetensors"))


@pytest.fixture
def shards_of_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "SHARD", 8)


def open_cache(config: DistillConfig, **change: Any) -> tuple[CachedTeacher, dict[str, float], Mock]:
    """Return the cached training, its metrics, and the mock that loads the teacher."""
    config = config.model_copy(update=change)
    load = Mock(side_effect=lambda: teacher_cache.load_teacher(config.teacher))
    return *cache_teacher(config, open_training_data(config)[0], load), load


def read_targets(cached: CachedTeacher, index: int) -> TeacherTargets:
    item = cached[index]
    return TeacherTargets(*(item[name] for name in TeacherTargets._fields))


@pytest.mark.usefixtures("shards_of_8")
def test_only_what_is_missing_is_computed(config: DistillConfig, capsys: pytest.CaptureFixture) -> None:
    cached, metrics, load = open_cache(config)
    assert len(list_shards(config)) == 6 and len(load.mock_calls) == 1
    assert metrics["teacher_cache_bytes_per_token"] == pytest.approx(
        sum(path.stat().st_size for path in list_shards(config)) / (48 * SEQUENCE), abs=0.1
    )
    first = read_targets(cached, 5)
    again, same, load = open_cache(config, max_steps=3, micro_batch_size=1, learning_rate=1.0)
    assert not load.mock_calls and same == metrics
    assert all(map(torch.equal, first, read_targets(again, 5)))
    times = [path.stat().st_mtime_ns for path in list_shards(config)]
    damaged = list_shards(config)[2]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    repaired, _, load = open_cache(config, max_steps=7, micro_batch_size=3)
    assert len(load.mock_calls) == 1 and len(list_shards(config)) == 7
    assert f"warning: distill: {damaged}: damaged (its checksum is another one)" in capsys.readouterr().err
    changed = [place for place, path in enumerate(list_shards(config)[:6]) if path.stat().st_mtime_ns != times[place]]
    assert changed == [2]
    assert torch.equal(read_targets(repaired, 20).ids, read_targets(cached, 20).ids)
    _, _, load = open_cache(config, caching=False)
    assert len(load.mock_calls) == 1, "without caching everything is computed anew"
    (item,) = [item for item in cleanup.list_items(config.workspace or "") if item.kind == "a teacher's distributions"]
    assert cleanup.delete_item(item) and not list_shards(config)


@pytest.mark.usefixtures("shards_of_8")
def test_a_killed_computation_goes_on(config: DistillConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    save, write = teacher_cache.save_file, Mock(side_effect=teacher_cache._write_shard)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(teacher_cache, "save_file", Mock(side_effect=[DEFAULT, DEFAULT, KeyboardInterrupt], wraps=save))
        open_cache(config)
    assert len(list_shards(config)) == 2 and not list(Path(config.workspace or "").rglob("*.tmp"))
    monkeypatch.setattr(teacher_cache, "_write_shard", write)
    open_cache(config)
    assert [call.args[-1] for call in write.mock_calls] == [2, 3, 4, 5]


@pytest.mark.parametrize("form", ["sampled", "top_k"])
def test_the_files_have_the_distribution_of_the_teacher(config: DistillConfig, form: str) -> None:
    cached, metrics, _ = open_cache(config, teacher_cache=form, teacher_cache_size=200)
    teacher = teacher_cache.load_teacher(config.teacher)
    for index in (0, 17):
        found = read_targets(cached, index)
        with torch.no_grad():
            log_p = torch.log_softmax(teacher(cached[index]["input_ids"][None]).logits[0], -1)
        assert torch.equal(found.top1, log_p.argmax(-1))
        torch.testing.assert_close(found.log_probability, log_p.gather(1, cached[index]["labels"][:, None])[:, 0])
        dense = torch.zeros_like(log_p).scatter_add_(1, found.ids, found.weights)
        torch.testing.assert_close(dense.sum(-1), torch.ones(SEQUENCE))
        if form == "sampled":
            assert (dense - log_p.exp()).abs().max() < 1 / 200
            torch.testing.assert_close(found.entropy, -(log_p.exp() * log_p).sum(-1))
        else:
            kept = log_p.exp().where(dense > 0, 0)
            torch.testing.assert_close(dense, kept / kept.sum(-1, keepdim=True), rtol=1e-3, atol=1e-5)
    assert metrics["teacher_validation_loss"] > 0


def test_drawn_gradients_have_the_exact_mean() -> None:
    """Over all shifts; hidden states and head are those of a model with V tokens."""
    log_p = log_probabilities()
    generator = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(30, 8, generator=generator), torch.randn(VOCABULARY, 8, generator=generator)
    labels = torch.randint(VOCABULARY, (30,), generator=generator)

    def find_gradient(targets: TeacherTargets | None) -> tuple[Tensor, ...]:
        inputs = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        teacher = (log_p, torch.eye(VOCABULARY)) if targets is None else (None, None, targets)
        terms = linear_loss(*inputs, labels, LossWeights(0.8, 0.3), *teacher)
        terms.loss.backward()
        return terms.loss.detach(), terms.kl, terms.teacher_cross_entropy, inputs[0].grad, inputs[1].grad

    sums, shifts = [torch.zeros(())] * 5, 200
    for shift in range(shifts):
        ids, numbers, lengths, entropy = teacher_cache.sample_tokens(
            log_p, torch.full((30,), (shift + 0.5) / shifts), DRAWS
        )
        is_used = torch.arange(DRAWS) < lengths[:, None]
        padded, weights = torch.zeros(30, DRAWS, dtype=torch.int64), torch.zeros(30, DRAWS)
        padded[is_used], weights[is_used] = ids, numbers / DRAWS
        label = log_p.gather(1, labels[:, None])[:, 0]
        found = find_gradient(TeacherTargets(padded, weights, entropy, label, log_p.argmax(-1)))
        sums = [total + each / shifts for total, each in zip(sums, found, strict=True)]
    for mean, exact in zip(sums, find_gradient(None), strict=True):
        torch.testing.assert_close(mean, exact, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        (
            "distill.temperature",
            2.0,
            r"distill.teacher_cache: it needs temperature 1.0, not 2.0; set that, or leave it out",
        ),
        ("distill.intermediate_layers", [[1, 1]], r"distill.teacher_cache: it needs intermediate_layers \[\], not \["),
        ("distill.divergence_beta", 0.5, r"distill.teacher_cache: it needs divergence_beta 0.0, not 0.5; set that"),
        ("engine", "nemo", r"distill.teacher_cache: it needs engine hf, not nemo; set that, or leave it out"),
    ],
)
def test_what_a_cache_cannot_do_is_refused(setting: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan({"teacher": "/t", "corpus": "/c", "distill.teacher_cache": "sampled", setting: value})
