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

from minitron.config.settings import DistillSettings, TrainingSettings, read_weight

IGNORED = -100
"""The label of a token that counts in no loss; torch's own, too."""

CHUNK_TOKENS = {"cpu": 128, "cuda": 2048}
"""Tokens per chunk: enough for an efficient matrix product, few enough that C x V floats need little memory."""


class LossWeights(NamedTuple):
    """The weights in kl · T² · D(teacher, student) + cross_entropy · CE(labels, student), and what D is.

    D compares the distributions at temperature T: the forward KL(teacher‖student) at divergence_beta 0, the reverse
    KL(student‖teacher) at 1, and between them the generalized Jensen-Shannon divergence of that beta (Agarwal et al.,
    arXiv 2306.13649, equation 1), which is symmetric at 0.5. `intermediate` is the weight of `sum_cosine_distances`,
    which is apart.
    """

    kl: float | Tensor = 0.0
    cross_entropy: float | Tensor = 1.0
    temperature: float = 1.0
    divergence_beta: float = 0.0
    intermediate: float = 0.0


def compute_loss_weights(config: TrainingSettings, step: int) -> LossWeights:
    """Return the weights of a step of a training, from 1; without a teacher the cross-entropy is all."""
    if not isinstance(config, DistillSettings):
        return LossWeights()
    progress = (step - 1) / max(config.max_steps - 1, 1)

    def weigh(weight: float | tuple[float, float]) -> float:
        first, last = read_weight(weight)
        return first + progress * (last - first)

    return LossWeights(
        weigh(config.kl_weight),
        weigh(config.cross_entropy_weight),
        config.temperature,
        config.divergence_beta,
        weigh(config.intermediate_weight) if config.intermediate_layers else 0.0,
    )


class TeacherTargets(NamedTuple):
    """A part of the teacher's distributions at temperature 1, K possible tokens each: see engines/hf/teacher_cache.py.

    Attributes:
        ids: the tokens, int64 [N, K]; without weight where there are fewer.
        weights: their shares [N, K], whose sum is 1.
        entropy: that of the distributions [N], in nats.
        log_probability: the teacher's, of the labels [N].
        top1: the most probable tokens, int64 [N].
    """

    ids: Tensor
    weights: Tensor
    entropy: Tensor
    log_probability: Tensor
    top1: Tensor


class LossTerms(NamedTuple):
    """Sums over the tokens that count, in nats, and the number of these tokens; only `loss` carries a gradient.

    `kl` is the forward KL at temperature 1, whatever the loss is, so that trainings can be compared.
    """

    loss: Tensor
    kl: Tensor
    cross_entropy: Tensor
    teacher_cross_entropy: Tensor
    agreements: Tensor
    tokens: Tensor


def linear_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    weights: LossWeights,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    targets: TeacherTargets | None = None,
) -> LossTerms:
    """Compute the loss of the logits `hidden @ head.T` against the labels and the teacher's logits.

    The gradient of the cross-entropy with respect to the logits is softmax(s) - one_hot(label); `_compute_divergence`
    has that of the divergence.

    Args:
        hidden: last hidden states of the student, [N, H].
        head: output embedding of the student, [V, H].
        labels: next tokens, int64 [N]; tokens with the label IGNORED count in no term.
        weights: the weights of the loss's terms, the temperature and the divergence.
        teacher_hidden: last hidden states of the teacher, [N, H']; None: no teacher terms.
        teacher_head: output embedding of the teacher, [V, H'].
        targets: what is known of the teacher's distributions, instead of its states; for the forward KL at temperature
            1. If the targets are drawn, so are the KL and the gradient; their means are the exact ones.

    Returns:
        The weighted loss and its terms.
    """
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    # rows of zeros give the head no gradient, and get none, whatever that of their logits is
    hidden = hidden.masked_fill((labels == IGNORED)[:, None], 0)
    teacher = (teacher_hidden, teacher_head, targets)
    return LossTerms(*_LinearLoss.apply(hidden, head, labels, weights, *teacher, wants_gradient))


def sum_cosine_distances(pairs: list[tuple[Tensor, Tensor]], labels: Tensor) -> Tensor:
    """Return the mean over the pairs of the sum of 1 - cosine similarity over the tokens that count.

    Args:
        pairs: states of the student and of the teacher, [N, H] each.
        labels: next tokens, int64 [N].
    """
    counts = (labels != IGNORED).float()
    sums = [(1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)) @ counts for student, teacher in pairs]
    return torch.stack(sums).mean()


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
        targets: TeacherTargets | None,
        wants_gradient: bool,
    ) -> tuple[Tensor, ...]:
        w_head = head.to(hidden.dtype)  # under mixed precision the head is kept in fp32
        sums = torch.zeros(6, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_gradient else None
        grad_head = torch.zeros_like(head) if wants_gradient and head.requires_grad else None
        step = CHUNK_TOKENS.get(hidden.device.type, 128)
        fuses = wants_gradient and hidden.is_cuda and can_compile()  # a short evaluation is not worth the compilation
        compute_chunk_loss = _compute_chunk_loss if targets is None else _compute_drawn_chunk_loss
        factors = weights
        if fuses:
            compute_chunk_loss, factors = _compile(compute_chunk_loss), _as_tensors(weights, hidden.device)
        for start in range(0, len(hidden), step):
            chunk = slice(start, start + step)
            teacher: Any = None if targets is None else TeacherTargets(*(part[chunk] for part in targets))
            if teacher_hidden is not None and teacher_head is not None:
                teacher = teacher_hidden[chunk] @ teacher_head.T
            terms, grad_CV = compute_chunk_loss(
                hidden[chunk] @ w_head.T, labels[chunk], teacher, factors, wants_gradient
            )
            del teacher
            sums += terms
            if grad_hidden is not None and grad_CV is not None:
                grad_CV = grad_CV.to(hidden.dtype)
                torch.mm(grad_CV, w_head, out=grad_hidden[chunk])
                _accumulate_head_gradient(grad_head, grad_CV, hidden[chunk])
        ctx.save_for_backward(grad_hidden, grad_head)
        divergence, *others = sums.unbind()
        loss = weights.kl * weights.temperature**2 * divergence + weights.cross_entropy * others[1]
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grad_outputs[0]
        return (
            grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_head is None else grad_head.mul_(scale),
            *[None] * 6,
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
def _compile(compute_chunk_loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return a chunk's loss as fused kernels, which read and write the logits a few times instead of forty."""
    return torch.compile(compute_chunk_loss)


def _as_tensors(weights: LossWeights, device: torch.device) -> LossWeights:
    """Return the weights that are not 0 as tensors: a compiler would compile again for every number of a schedule."""
    kl, cross_entropy = (
        torch.full((), float(weight), device=device) if weight else weight
        for weight in (weights.kl, weights.cross_entropy)
    )
    return weights._replace(kl=kl, cross_entropy=cross_entropy)


def _counts(weight: float | Tensor) -> bool:
    return isinstance(weight, Tensor) or weight != 0


def _compute_chunk_loss(
    logits_CV: Tensor, labels_C: Tensor, teacher_CV: Tensor | None, weights: LossWeights, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the six sums of a chunk, the divergence first, and the loss's gradient with respect to its logits.

    One log_softmax per model gives all of them if the temperature is 1. Buffers are reused.
    """
    labels_C1, temperature = labels_C.clamp(min=0)[:, None], weights.temperature
    logits_CV = logits_CV.float()
    log_q_CV = F.log_softmax(logits_CV, -1)
    cross_entropy_C = -log_q_CV.gather(-1, labels_C1)[:, 0]
    divergence_C = kl_C = teacher_cross_entropy_C = agreements_C = torch.zeros_like(cross_entropy_C)
    grad_CV = q_CV = None
    if teacher_CV is not None:
        teacher_CV = teacher_CV.float()
        agreements_C = (logits_CV.argmax(-1) == teacher_CV.argmax(-1)).float()
        log_p_CV = F.log_softmax(teacher_CV, -1)
        teacher_cross_entropy_C = -log_p_CV.gather(-1, labels_C1)[:, 0]
        if temperature != 1:
            kl_C, *_ = _compute_divergence(log_p_CV, log_q_CV, 0.0, wants_gradient=False)
            log_p_CV, log_q_CV = (F.log_softmax(values / temperature, -1) for values in (teacher_CV, logits_CV))
        elif weights.divergence_beta:
            kl_C = _dot_rows(log_p_CV.exp(), log_p_CV - log_q_CV)
        wants_divergence = wants_gradient and _counts(weights.kl)
        divergence_C, q_CV, grad_CV = _compute_divergence(log_p_CV, log_q_CV, weights.divergence_beta, wants_divergence)
        if not weights.divergence_beta and temperature == 1:
            kl_C = divergence_C
        _scale(grad_CV, weights.kl * temperature)
    if wants_gradient and _counts(weights.cross_entropy):
        if q_CV is None or temperature != 1:
            q_CV = torch.softmax(logits_CV, -1)
        q_CV[torch.arange(len(labels_C), device=labels_C.device), labels_C1[:, 0]] -= 1
        _scale(q_CV, weights.cross_entropy)
        grad_CV = q_CV if grad_CV is None else grad_CV.add_(q_CV)
    counts_C = (labels_C != IGNORED).float()
    terms = [divergence_C, kl_C, cross_entropy_C, teacher_cross_entropy_C, agreements_C, torch.ones_like(counts_C)]
    return torch.stack(terms) @ counts_C, grad_CV


def _compute_drawn_chunk_loss(
    logits_CV: Tensor, labels_C: Tensor, targets: TeacherTargets, weights: LossWeights, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return what `_compute_chunk_loss` does, with the teacher's distributions as they are known.

    The gradient of -Σ w log q is q - w: a row of q, from which K numbers are subtracted.
    """
    labels_C1 = labels_C.clamp(min=0)[:, None]
    log_q_CV = F.log_softmax(logits_CV.float(), -1)
    cross_entropy_C = -log_q_CV.gather(1, labels_C1)[:, 0]
    kl_C = -(log_q_CV.gather(1, targets.ids) * targets.weights).sum(-1) - targets.entropy
    agreements_C = (log_q_CV.argmax(-1) == targets.top1).float()
    counts_C = (labels_C != IGNORED).float()
    terms = [kl_C, kl_C, cross_entropy_C, -targets.log_probability, agreements_C, torch.ones_like(counts_C)]
    grad_CV = None
    if wants_gradient:
        grad_CV = log_q_CV.exp_().mul_(weights.kl + weights.cross_entropy)
        grad_CV.scatter_add_(1, targets.ids, targets.weights * -weights.kl)
        grad_CV.scatter_add_(1, labels_C1, torch.zeros_like(cross_entropy_C)[:, None] - weights.cross_entropy)
    return torch.stack(terms) @ counts_C, grad_CV


def _compute_divergence(
    log_p_CV: Tensor, log_q_CV: Tensor, beta: float, wants_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return D(p, q) of every token, q, and D's gradient with respect to the logits whose softmax is q.

    The gradient is q - p for KL(p‖q) (Hinton et al., arXiv 1503.02531, section 2.1). For the others, with
    m = beta · p + (1 - beta) · q, it is (1 - beta) · q · (log(q / m) - KL(q‖m)); for KL(q‖p), m is p and the factor 1.
    Logits divided by T have 1 / T of it, and T² · D has T times it. Both arguments are overwritten.
    """
    if beta == 0:
        p_CV = log_p_CV.exp()
        divergence_C = _dot_rows(p_CV, log_p_CV.sub_(log_q_CV))
        q_CV = log_q_CV.exp_() if wants_gradient else None
        return divergence_C, q_CV, None if q_CV is None else torch.sub(q_CV, p_CV, out=log_p_CV)
    q_CV, log_m_CV = log_q_CV.exp(), log_p_CV
    if beta < 1:
        p_CV = log_p_CV.exp()
        log_m_CV = torch.lerp(q_CV, p_CV, beta).clamp_(min=torch.finfo(p_CV.dtype).tiny).log_()
    ratio_CV = log_q_CV.sub_(log_m_CV)
    reverse_C = _dot_rows(q_CV, ratio_CV)
    factor = 1.0 if beta == 1 else 1 - beta
    divergence_C = factor * reverse_C
    if beta < 1:
        divergence_C = divergence_C + beta * _dot_rows(p_CV, log_p_CV.sub_(log_m_CV))
    grad_CV = ratio_CV.sub_(reverse_C[:, None]).mul_(q_CV) if wants_gradient else None
    _scale(grad_CV, factor)
    return divergence_C, q_CV, grad_CV


def _scale(values_CV: Tensor | None, factor: float | Tensor) -> None:
    """Scale in place; a factor of 1 costs nothing."""
    if values_CV is not None and (isinstance(factor, Tensor) or factor != 1):
        values_CV *= factor


def _dot_rows(a_CV: Tensor, b_CV: Tensor) -> Tensor:
    """Return the dot products of the rows, [C]; a compiler fuses the sum, else a matrix product reads each once."""
    return (a_CV * b_CV).sum(-1) if torch.compiler.is_compiling() else torch.einsum("cv,cv->c", a_CV, b_CV)
