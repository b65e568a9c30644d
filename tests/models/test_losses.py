"""The fused loss against plain PyTorch in float64, and its memory."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from minitron.config.settings import DistillSettings, FinetuneSettings
from minitron.models import losses
from minitron.models.losses import (
    IGNORED,
    LossTerms,
    LossWeights,
    compute_loss_weights,
    linear_loss,
    sum_cosine_distances,
)

N, H, TEACHER_H, V = 300, 24, 40, 97  # N is no multiple of the chunk

WEIGHTS = [
    LossWeights(1, 0), LossWeights(1, 0, 2.5), LossWeights(0.7, 0.3), LossWeights(0.7, 0.3, 0.5), LossWeights(0, 1),
    LossWeights(1, 0, 1, 1), LossWeights(0.7, 0.3, 2, 1), LossWeights(1, 0, 1, 0.5), LossWeights(0.7, 0.3, 0.5, 0.1),
]  # fmt: skip
"""The divergence is the forward KL, the reverse KL and Jensen-Shannon, alone and mixed, at several temperatures."""


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(V, (N,), generator=generator)
    teacher_hidden = torch.randn(N, TEACHER_H, generator=generator).to(dtype)
    teacher_head = torch.randn(V, TEACHER_H, generator=generator).to(dtype)
    return hidden, head, labels, teacher_hidden, teacher_head


def ignore_some(labels: torch.Tensor) -> torch.Tensor:
    """Ignore a whole chunk, and some tokens of the others."""
    return labels.masked_fill((torch.arange(N) < 130) | (torch.arange(N) % 3 == 0), IGNORED)


def plain_loss(tensors: tuple[torch.Tensor, ...], weights: LossWeights) -> LossTerms:
    """Compute the terms from the whole logits of the tokens that count, with torch's own functions."""
    hidden, head, labels, teacher_hidden, teacher_head = tensors
    counts = labels != IGNORED
    student, teacher = (hidden @ head.T)[counts], (teacher_hidden @ teacher_head.T)[counts]
    labels = labels[counts]
    q, p = F.softmax(student / weights.temperature, -1), F.softmax(teacher / weights.temperature, -1)
    beta, m = weights.divergence_beta, weights.divergence_beta * p + (1 - weights.divergence_beta) * q
    if beta in (0, 1):
        divergence = F.kl_div(q.log(), p, reduction="sum") if beta == 0 else F.kl_div(p.log(), q, reduction="sum")
    else:
        divergence = beta * F.kl_div(m.log(), p, reduction="sum") + (1 - beta) * F.kl_div(m.log(), q, reduction="sum")
    cross_entropy = F.cross_entropy(student, labels, reduction="sum")
    return LossTerms(
        weights.kl * weights.temperature**2 * divergence + weights.cross_entropy * cross_entropy,
        F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="sum"),
        cross_entropy,
        F.cross_entropy(teacher, labels, reduction="sum"),
        (student.argmax(-1) == teacher.argmax(-1)).sum(),
        counts.sum(),
    )


@pytest.mark.parametrize("chunk", [7, 128, 1000])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_values_and_gradients_equal_plain_pytorch(
    weights: LossWeights, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head is the embedding, too: its gradient comes from both."""
    monkeypatch.setitem(losses.CHUNK_TOKENS, "cpu", chunk)
    monkeypatch.setattr(losses, "BLOCK_LOGITS", 50 * V)
    terms, gradients = {}, {}
    for dtype, compute in ((torch.float32, lambda *args: linear_loss(*args[:3], weights, *args[3:])), (
        torch.float64, lambda *args: plain_loss(args, weights)
    )):  # fmt: skip
        hidden, head, labels, *teacher = tensors(dtype)
        inputs = hidden + head[labels].tanh()
        terms[dtype] = compute(inputs, head, ignore_some(labels), *teacher)
        (3 * terms[dtype].loss).backward()
        gradients[dtype] = (hidden.grad, head.grad)
    for actual, expected in zip(terms[torch.float32], terms[torch.float64], strict=True):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-4)
    for actual, expected in zip(gradients[torch.float32], gradients[torch.float64], strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_distributions_without_a_common_word_have_finite_gradients(weights: LossWeights) -> None:
    """Probabilities that are 0 in float32, of a student that is sure of what the teacher excludes."""
    logits, labels = torch.full((2, V), -200.0), torch.tensor([0, 1])
    logits[:, 0] = 200.0
    teacher_logits = logits.flip(-1)
    terms, gradient = losses._compute_block_loss(weights, True, logits, labels, teacher_logits)
    assert terms.isfinite().all() and gradient is not None and gradient.isfinite().all()


def test_mixed_precision_rounds_no_sum() -> None:
    """Validations run in it, and choose the best state by sums over thousands of tokens."""
    hidden, head, labels, *teacher = tensors(torch.float32)
    expected = linear_loss(hidden, head, labels, LossWeights(1, 1), *teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_loss(hidden, head, labels, LossWeights(1, 1), *teacher) == expected


def test_a_loss_without_weights_has_no_gradient() -> None:
    hidden, head, labels, *teacher = tensors(torch.float32)
    linear_loss(hidden, head, labels, LossWeights(0, 0), *teacher).loss.backward()
    assert hidden.grad is not None and not hidden.grad.any() and head.grad is not None and not head.grad.any()


def test_labels_that_are_all_ignored_give_no_loss_and_no_gradient() -> None:
    hidden, head, labels, *teacher = tensors(torch.float32)
    terms = linear_loss(hidden, head, torch.full_like(labels, IGNORED), LossWeights(1, 1), *teacher)
    terms.loss.backward()
    assert not any(terms) and not hidden.grad.any() and not head.grad.any()


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_a_chunk_is_one_graph_for_the_compiler(weights: LossWeights) -> None:
    """A break in the graph would write the logits out between the kernels."""
    hidden, head, labels, teacher_hidden, teacher_head = tensors(torch.float32)
    logits, teacher_logits = (hidden @ head.T).detach(), teacher_hidden @ teacher_head.T
    block = (weights, True, logits, ignore_some(labels), teacher_logits)
    torch.compiler.reset()
    compiled = torch.compile(losses._compute_block_loss, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(*block), losses._compute_block_loss(*block), strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_schedule_of_the_weights_is_compiled_once() -> None:
    hidden, head, labels, teacher_hidden, teacher_head = tensors(torch.float32)
    logits, teacher_logits = (hidden @ head.T).detach(), teacher_hidden @ teacher_head.T
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(losses._compute_block_loss, backend=counter, fullgraph=True)
    for share in (0.1, 0.2, 0.3):
        weights = LossWeights(1 - share, share)
        actual = compiled(losses._as_tensors(weights, logits.device), True, logits, labels, teacher_logits)
        for value, wanted in zip(
            actual, losses._compute_block_loss(weights, True, logits, labels, teacher_logits), strict=True
        ):
            torch.testing.assert_close(value, wanted)
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the kernels that torch.compile makes are not tested")
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_kernels_are_as_exact_as_plain_pytorch(
    dtype: torch.dtype, weights: LossWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 the products round logits of size 5 by up to 0.4 %, with and without kernels: gradients differ by 1.5 %.

    The head is kept in fp32, as mixed precision does; the reference reads the rounded hidden states.
    """
    monkeypatch.setitem(losses.CHUNK_TOKENS, "cuda", 128)  # three chunks, the last one shorter
    hidden, head, labels, teacher_hidden, teacher_head = (tensor.detach().cuda() for tensor in tensors(torch.float32))
    labels = ignore_some(labels.cpu()).cuda()
    half = [tensor.to(dtype) for tensor in (hidden, teacher_hidden, teacher_head)]
    inputs = (half[0].requires_grad_(), head.requires_grad_(), labels, half[1], half[2])

    def compute(compute_loss: Any, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs[:2]]
        loss = compute_loss((*leaves, *inputs[2:])).loss
        loss.backward()
        return [tensor.double() for tensor in (loss, *(leaf.grad for leaf in leaves))]

    doubles = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs)
    expected = compute(lambda tensors: plain_loss(tensors, weights), doubles)
    assert losses.can_compile()
    compiled = compute(lambda tensors: linear_loss(*tensors[:3], weights, *tensors[3:]), inputs)
    monkeypatch.setattr(losses, "can_compile", lambda: False)
    plain = compute(lambda tensors: linear_loss(*tensors[:3], weights, *tensors[3:]), inputs)
    for wanted, ours, simple in zip(expected, compiled, plain, strict=True):
        assert (ours - wanted).norm() <= 1.1 * (simple - wanted).norm() + 1e-5 * wanted.norm()


def test_cosine_distances_are_means_over_the_pairs_and_sums_over_the_tokens_that_count() -> None:
    first, second, labels = torch.randn(N, H).requires_grad_(), torch.randn(N, H), torch.zeros(N, dtype=torch.long)
    labels = ignore_some(labels)
    both = [(first, second), (first, first.detach())]
    expected = (1 - F.cosine_similarity(first.double(), second.double()))[labels != IGNORED].sum() / 2
    distance = sum_cosine_distances(both, labels)
    distance.backward()
    torch.testing.assert_close(distance.double(), expected, rtol=1e-5, atol=1e-4)
    assert first.grad is not None and not first.grad[labels == IGNORED].any() and first.grad.any()


def test_weights_go_from_the_first_step_to_the_last() -> None:
    config = DistillSettings(max_steps=5, kl_weight=(1.0, 0.5), cross_entropy_weight=0.25, intermediate_layers=[(1, 1)])
    weights = [compute_loss_weights(config, step) for step in range(1, 6)]
    assert [weight.kl for weight in weights] == [1.0, 0.875, 0.75, 0.625, 0.5]
    assert [weight.intermediate for weight in weights] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert {weight.cross_entropy for weight in weights} == {0.25}
    assert compute_loss_weights(DistillSettings(max_steps=1, kl_weight=(1.0, 0.5)), 1).kl == 1.0
    assert compute_loss_weights(FinetuneSettings(), 1) == LossWeights(0.0, 1.0)


def test_without_a_teacher_it_is_the_cross_entropy() -> None:
    hidden, head, labels, *_ = tensors(torch.float32)
    terms = linear_loss(hidden, head, labels, LossWeights())
    torch.testing.assert_close(terms.loss, F.cross_entropy(hidden @ head.T, labels, reduction="sum"))
    assert terms.kl == terms.teacher_cross_entropy == terms.agreements == 0


@pytest.mark.parametrize("vocabulary", [97, 128, 512, 1280])
def test_the_most_probable_token_is_that_of_argmax(vocabulary: int) -> None:
    """Each token is the largest of a row; vocabularies that are multiples of 128 are searched in windows."""
    logits = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0)) - 9
    logits.diagonal().add_(20)
    assert torch.equal(losses._find_top1(logits)[:, 0], torch.arange(vocabulary))


def test_the_teacher_itself_has_no_loss_and_no_gradient() -> None:
    hidden, head, labels, *_ = tensors(torch.float32)
    terms = linear_loss(hidden, head, labels, LossWeights(1, 0), hidden.detach(), head.detach())
    terms.loss.backward()
    assert abs(terms.loss.item()) < 1e-3 and terms.agreements == N
    assert hidden.grad.abs().max() < 1e-5


def test_gradients_add_up_over_micro_batches() -> None:
    whole, parts = tensors(torch.float32), tensors(torch.float32)
    linear_loss(*whole[:3], LossWeights(1, 1), *whole[3:]).loss.div(N).backward()
    hidden, head, labels, teacher_hidden, teacher_head = parts
    for part in (slice(0, 100), slice(100, N)):
        linear_loss(hidden[part], head, labels[part], LossWeights(1, 1), teacher_hidden[part], teacher_head).loss.div(
            N
        ).backward()
    torch.testing.assert_close(head.grad, whole[1].grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(hidden.grad, whole[0].grad, rtol=1e-4, atol=1e-6)


def test_nothing_is_kept_for_a_gradient_that_is_not_wanted() -> None:
    hidden, head, labels, *_ = tensors(torch.float32)
    with torch.no_grad():
        assert not linear_loss(hidden, head, labels, LossWeights()).loss.requires_grad
    frozen = linear_loss(hidden, head.detach(), labels, LossWeights()).loss
    frozen.backward()
    assert hidden.grad is not None and head.grad is None


def test_peak_memory_is_a_few_chunks_of_logits() -> None:
    """2048 tokens x 32768 words: an fp32 logits tensor is 256 MB, a naive KL holds four; our chunks are 64 MB.

    In a process of its own, whose peak is its own: getrusage would count that of the process that started it, too. It
    gives every freed block back, whose reuse the C library otherwise leaves to chance.
    """
    program = (
        "import torch\n"
        "from minitron.models.losses import LossWeights, linear_loss\n"
        "h, w = torch.randn(2048, 16).requires_grad_(), torch.randn(32768, 16).requires_grad_()\n"
        "t, u, y = torch.randn(2048, 16), torch.randn(32768, 16), torch.zeros(2048, dtype=torch.long)\n"
        "linear_loss(h[:8], w, y[:8], LossWeights(1, 1), t[:8], u).loss.backward()\n"
        "def peak(): return next(int(row.split()[1]) for row in open('/proc/self/status') if row.startswith('VmHWM'))\n"
        "before = peak()\n"
        "linear_loss(h, w, y, LossWeights(1, 1), t, u).loss.backward()\n"
        "print((peak() - before) / 1024)\n"
    )
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", program]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    chunk = losses.CHUNK_TOKENS["cpu"] * 32768 * 4 / 2**20
    assert 2 * chunk < grown < 3 * chunk  # the logits of both models, and blocks of them
