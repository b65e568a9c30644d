"""Language-model and distillation losses that never hold more than a chunk of logits.

The head's matrix product, the loss and both gradients are computed chunk by chunk in the forward pass. So the [N, V]
logits of neither model exist in memory, and nothing is computed twice.

N = packed tokens, C = tokens of a chunk, H = hidden size, V = vocabulary; the teacher may have another H.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = {"cpu": 128, "cuda": 2048}
"""Tokens per chunk: enough for an efficient matrix product, few enough that C x V floats need little memory."""


class LossWeights(NamedTuple):
    """The weights in kl · T² · KL(teacher‖student) + cross_entropy · CE(labels, student), and the temperature T."""

    kl: float = 0.0
    cross_entropy: float = 1.0
    temperature: float = 1.0


class LossTerms(NamedTuple):
    """Sums over N tokens, in nats; only `loss` carries a gradient."""

    loss: Tensor
    kl: Tensor
    cross_entropy: Tensor
    teacher_cross_entropy: Tensor
    agreements: Tensor


def linear_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    weights: LossWeights,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
) -> LossTerms:
    """Compute the loss of the logits `hidden @ head.T` against the labels and the teacher's logits.

    The gradient of T² · KL(softmax(t/T)‖softmax(s/T)) with respect to the logits s is T · (softmax(s/T) - softmax(t/T))
    (Hinton et al., arXiv 1503.02531, section 2.1); that of the cross-entropy is softmax(s) - one_hot(label).

    Args:
        hidden: last hidden states of the student, [N, H].
        head: output embedding of the student, [V, H].
        labels: next tokens, int64 [N].
        weights: the weights of the loss's terms, and the temperature.
        teacher_hidden: last hidden states of the teacher, [N, H']; None: no teacher terms.
        teacher_head: output embedding of the teacher, [V, H'].

    Returns:
        The weighted loss and its terms, each summed over the N tokens; the KL term is at temperature T, without T².
    """
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    return LossTerms(*_LinearLoss.apply(hidden, head, labels, weights, teacher_hidden, teacher_head, wants_gradient))


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        weights: LossWeights,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        wants_gradient: bool,
    ) -> tuple[Tensor, ...]:
        w_head = head.to(hidden.dtype)  # under mixed precision the head is kept in fp32
        sums = torch.zeros(5, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_gradient else None
        grad_head = torch.zeros_like(head) if wants_gradient and head.requires_grad else None
        step = CHUNK_TOKENS.get(hidden.device.type, 128)
        fuses = wants_gradient and hidden.is_cuda and can_compile()  # a short evaluation is not worth the compilation
        compute_chunk_loss = _compile_chunk_loss() if fuses else _compute_chunk_loss
        for start in range(0, len(hidden), step):
            chunk = slice(start, start + step)
            teacher_CV = None
            if teacher_hidden is not None and teacher_head is not None:
                teacher_CV = teacher_hidden[chunk] @ teacher_head.T
            terms, grad_CV = compute_chunk_loss(
                hidden[chunk] @ w_head.T, labels[chunk], teacher_CV, weights, wants_gradient
            )
            del teacher_CV
            sums += terms
            if grad_hidden is not None and grad_CV is not None:
                grad_CV = grad_CV.to(hidden.dtype)
                torch.mm(grad_CV, w_head, out=grad_hidden[chunk])
                _accumulate_head_gradient(grad_head, grad_CV, hidden[chunk])
        ctx.save_for_backward(grad_hidden, grad_head)
        loss, *others = sums.unbind()
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grad_outputs[0]
        return (
            grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_head is None else grad_head.mul_(scale),
            *[None] * 5,
        )


def _accumulate_head_gradient(grad_head: Tensor | None, grad_CV: Tensor, hidden_CH: Tensor) -> None:
    """Add the chunk's gradient of the head, in the head's own precision."""
    if grad_head is None:
        return
    if grad_head.dtype == hidden_CH.dtype:
        grad_head.addmm_(grad_CV.T, hidden_CH)
    else:
        grad_head.add_(grad_CV.T @ hidden_CH)


@functools.cache
def can_compile() -> bool:
    """Try whether torch.compile makes kernels for this machine's GPU; say why if it does not.

    Triton needs a C compiler and Python's headers, which slim images lack.
    """
    try:
        torch.compile(lambda values: -values)(torch.ones(1, device="cuda"))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        print(f"torch.compile does not work here, training runs without it and is slower: {reason}", flush=True)
        return False
    return True


@functools.cache
def _compile_chunk_loss() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return `_compute_chunk_loss` as fused kernels, which read and write the logits a few times instead of forty."""
    return torch.compile(_compute_chunk_loss)


def _compute_chunk_loss(
    logits_CV: Tensor, labels_C: Tensor, teacher_CV: Tensor | None, weights: LossWeights, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the five sums of a chunk and the loss's gradient with respect to its logits; buffers are reused."""
    logits_CV = logits_CV.float()
    teacher_CV = None if teacher_CV is None else teacher_CV.float()
    cross_entropy = F.cross_entropy(logits_CV, labels_C, reduction="sum")
    zero = cross_entropy.new_zeros(())
    kl = teacher_cross_entropy = agreements = zero
    grad_CV = None
    if teacher_CV is not None:
        agreements = (logits_CV.argmax(-1) == teacher_CV.argmax(-1)).sum().float()
        teacher_cross_entropy = F.cross_entropy(teacher_CV, labels_C, reduction="sum")
        kl, grad_CV = _compute_forward_kl(
            logits_CV, teacher_CV, weights.temperature, wants_gradient and weights.kl != 0
        )
    if grad_CV is not None:
        grad_CV *= weights.kl * weights.temperature
    if wants_gradient and weights.cross_entropy:
        probabilities_CV = torch.softmax(logits_CV, -1)
        probabilities_CV[torch.arange(len(labels_C), device=labels_C.device), labels_C] -= 1
        probabilities_CV *= weights.cross_entropy
        grad_CV = probabilities_CV if grad_CV is None else grad_CV.add_(probabilities_CV)
    loss = weights.kl * weights.temperature**2 * kl + weights.cross_entropy * cross_entropy
    return torch.stack([loss, kl, cross_entropy, teacher_cross_entropy, agreements]), grad_CV


def _compute_forward_kl(
    logits_CV: Tensor, teacher_CV: Tensor, temperature: float, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the sum of KL(p‖q) over the chunk and q - p, for p, q = softmax of teacher's, student's logits / T."""
    log_q_CV = F.log_softmax(logits_CV / temperature, -1)
    log_p_CV = F.log_softmax(teacher_CV / temperature, -1)
    p_CV = log_p_CV.exp()
    kl = p_CV.flatten() @ log_p_CV.sub_(log_q_CV).flatten()
    return kl, log_q_CV.exp_().sub_(p_CV) if wants_gradient else None
