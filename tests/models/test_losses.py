"""The fused loss against plain PyTorch in float64, and its memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from minitron.models import losses
from minitron.models.losses import LossWeights, linear_loss

N, H, TEACHER_H, V = 300, 24, 40, 97  # N is no multiple of the chunk


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(V, (N,), generator=generator)
    teacher_hidden = torch.randn(N, TEACHER_H, generator=generator).to(dtype)
    teacher_head = torch.randn(V, TEACHER_H, generator=generator).to(dtype)
    return hidden, head, labels, teacher_hidden, teacher_head


def plain_loss(
    tensors: tuple[torch.Tensor, ...], weights: LossWeights
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, head, labels, teacher_hidden, teacher_head = tensors
    student, teacher = hidden @ head.T, teacher_hidden @ teacher_head.T
    log_q = F.log_softmax(student / weights.temperature, -1)
    p = F.softmax(teacher / weights.temperature, -1)
    kl = F.kl_div(log_q, p, reduction="sum")
    cross_entropy = F.cross_entropy(student, labels, reduction="sum")
    return weights.kl * weights.temperature**2 * kl + weights.cross_entropy * cross_entropy, kl, cross_entropy


@pytest.mark.parametrize(
    "weights",
    [LossWeights(1, 0), LossWeights(1, 0, 2.5), LossWeights(0.7, 0.3), LossWeights(0.7, 0.3, 0.5), LossWeights(0, 1)],
    ids=str,
)
def test_values_and_gradients_equal_plain_pytorch(weights: LossWeights) -> None:
    expected_inputs, inputs = tensors(torch.float64), tensors(torch.float32)
    expected, kl, cross_entropy = plain_loss(expected_inputs, weights)
    (3 * expected).backward()
    terms = linear_loss(*inputs[:3], weights, *inputs[3:])
    (3 * terms.loss).backward()
    torch.testing.assert_close(terms.loss.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(terms.kl.double(), kl, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(terms.cross_entropy.double(), cross_entropy, rtol=1e-5, atol=1e-4)
    for actual, wanted in zip(inputs[:2], expected_inputs[:2], strict=True):
        torch.testing.assert_close(actual.grad.double(), wanted.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", [LossWeights(1, 0), LossWeights(0.7, 0.3, 0.5)], ids=str)
def test_a_chunk_is_one_graph_for_the_compiler(weights: LossWeights) -> None:
    """A break in the graph would write the logits out between the kernels."""
    hidden, head, labels, teacher_hidden, teacher_head = tensors(torch.float32)
    chunk = ((hidden @ head.T).detach(), labels, teacher_hidden @ teacher_head.T, weights, True)
    compiled = torch.compile(losses._compute_chunk_loss, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(*chunk), losses._compute_chunk_loss(*chunk), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the kernels that torch.compile makes are not tested")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_compiled_kernels_equal_plain_pytorch(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 the head is kept in fp32, as mixed precision does; the reference reads the rounded hidden states.

    The products round logits of size 5 to bf16, by up to 0.4 %: without kernels, too, the gradients differ by 0.7 %.
    """
    monkeypatch.setitem(losses.CHUNK_TOKENS, "cuda", 128)  # three chunks, the last one shorter
    weights = LossWeights(0.7, 0.3, 2.0)
    hidden, head, labels, teacher_hidden, teacher_head = (tensor.detach().cuda() for tensor in tensors(torch.float32))
    half = [tensor.to(dtype) for tensor in (hidden, teacher_hidden, teacher_head)]
    inputs = (half[0].requires_grad_(), head.requires_grad_(), labels, half[1], half[2])
    expected_inputs = tuple(
        tensor.detach().double().requires_grad_() if tensor.is_floating_point() else tensor for tensor in inputs
    )
    expected, *_ = plain_loss(expected_inputs, weights)
    expected.backward()
    assert losses.can_compile()
    terms = linear_loss(*inputs[:3], weights, *inputs[3:])
    terms.loss.backward()
    for actual, wanted in (
        (terms.loss, expected), (inputs[0].grad, expected_inputs[0].grad), (head.grad, expected_inputs[1].grad)
    ):  # fmt: skip
        assert (actual.double() - wanted).norm() <= tolerance * wanted.norm()


def test_teacher_terms() -> None:
    hidden, head, labels, teacher_hidden, teacher_head = tensors(torch.float32)
    terms = linear_loss(hidden, head, labels, LossWeights(1, 0), teacher_hidden, teacher_head)
    student, teacher = hidden @ head.T, teacher_hidden @ teacher_head.T
    torch.testing.assert_close(terms.teacher_cross_entropy, F.cross_entropy(teacher, labels, reduction="sum"))
    assert terms.agreements == (student.argmax(-1) == teacher.argmax(-1)).sum()


def test_without_a_teacher_it_is_the_cross_entropy() -> None:
    hidden, head, labels, *_ = tensors(torch.float32)
    terms = linear_loss(hidden, head, labels, LossWeights())
    torch.testing.assert_close(terms.loss, F.cross_entropy(hidden @ head.T, labels, reduction="sum"))
    assert terms.kl == terms.teacher_cross_entropy == terms.agreements == 0


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
    """2048 tokens x 32768 words: an fp32 logits tensor is 256 MB, a naive KL holds four; our chunks are 16 MB.

    In a process of its own, whose peak is its own.
    """
    program = (
        "import resource, torch\n"
        "from minitron.models.losses import LossWeights, linear_loss\n"
        "h, w = torch.randn(2048, 16).requires_grad_(), torch.randn(32768, 16).requires_grad_()\n"
        "t, u, y = torch.randn(2048, 16), torch.randn(32768, 16), torch.zeros(2048, dtype=torch.long)\n"
        "linear_loss(h[:8], w, y[:8], LossWeights(1, 1), t[:8], u).loss.backward()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "linear_loss(h, w, y, LossWeights(1, 1), t, u).loss.backward()\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    grown = float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)
    chunk = losses.CHUNK_TOKENS["cpu"] * 32768 * 4 / 2**20
    assert grown < 9 * chunk
