"""Language-model and distillation losses that never hold more than a chunk of logits.

The head's matrix product, the loss and both gradients are computed chunk by chunk in the forward pass. So the [N, V]
logits of neither model exist in memory, and nothing is computed twice.

N = packed tokens, C = tokens of a chunk, B = tokens of a block, H = hidden size, V = vocabulary; the teacher may have
another H.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minitron.config.settings import DistillSettings, TrainingSettings, read_weight
from minitron.data.packed import IGNORED

CHUNK_TOKENS = {"cpu": 512, "cuda": 2048}
"""Tokens per chunk: enough for an efficient matrix product, few enough that C x V floats need little memory."""

BLOCK_LOGITS = 1 << 19
"""Logits of a chunk that a CPU computes the loss of at once: they stay in its cache from operation to operation."""

WINDOW = 128
"""Logits whose largest is found at once: a divisor of most models' vocabularies; torch.argmax searches the others."""


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
    with torch.autocast(hidden.device.type, enabled=False):  # it would round sums over tokens and words to bf16
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
        grad_hidden = torch.zeros_like(hidden) if wants_gradient else None
        grad_head = torch.zeros_like(head) if wants_gradient and head.requires_grad else None
        step = min(CHUNK_TOKENS.get(hidden.device.type, 512), len(hidden))
        block = max(BLOCK_LOGITS // len(head), 1) if hidden.device.type == "cpu" else step
        compute_loss = _compute_block_loss if targets is None else _compute_drawn_block_loss
        factors = weights
        if wants_gradient and hidden.is_cuda and can_compile():  # a short evaluation is not worth the compilation
            compute_loss, factors = _compile(compute_loss), _as_tensors(weights, hidden.device)
        compute_loss = functools.partial(compute_loss, factors, wants_gradient)
        # all chunks use the same memory: on a CPU the system takes longer to give new memory than to fill it
        buffers = [part.new_empty(step, len(head)) for part in (hidden, teacher_hidden) if part is not None]
        for start in range(0, len(hidden), step):
            chunk = slice(start, start + step)
            logits_CV = _multiply(hidden[chunk], w_head, buffers[0])
            teacher = [] if targets is None else [part[chunk] for part in targets]
            if teacher_hidden is not None and teacher_head is not None:
                teacher = [_multiply(teacher_hidden[chunk], teacher_head, buffers[1])]
            terms, grad_CV = _compute_chunk_loss(compute_loss, block, logits_CV, labels[chunk], *teacher)
            sums += terms
            if grad_hidden is not None and grad_CV is not None:  # without a weight there is no gradient
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


def _compute_chunk_loss(
    compute_loss: Callable[..., tuple[Tensor, Tensor | None]], block: int, logits_CV: Tensor, *parts: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the sums of a chunk and its gradient, which overwrites the logits where a chunk has several blocks."""
    if block >= len(logits_CV):
        return compute_loss(logits_CV, *parts)
    sums, grad_CV = torch.zeros(6, device=logits_CV.device), None
    for first in range(0, len(logits_CV), block):
        rows = slice(first, first + block)
        terms, grad_BV = compute_loss(logits_CV[rows], *(part[rows] for part in parts))
        sums += terms
        if grad_BV is not None:
            logits_CV[rows], grad_CV = grad_BV, logits_CV
    return sums, grad_CV


def _accumulate_head_gradient(grad_head: Tensor | None, grad_CV: Tensor, hidden_CH: Tensor) -> None:
    """Add the chunk's gradient of the head, in the head's own precision, also if the products are of another one."""
    if grad_head is None:
        return
    if grad_head.dtype == hidden_CH.dtype:
        grad_head.addmm_(grad_CV.T, hidden_CH)
    elif hidden_CH.is_cuda:
        torch.addmm(grad_head, grad_CV.T, hidden_CH, out_dtype=grad_head.dtype, out=grad_head)
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
def _compile(compute_loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return a block's loss as fused kernels, which read and write the logits a few times instead of forty."""
    return torch.compile(compute_loss)


def _as_tensors(weights: LossWeights, device: torch.device) -> LossWeights:
    """Return the weights that are not 0 as tensors: a compiler would compile again for every number of a schedule."""
    kl, cross_entropy = (
        torch.full((), float(weight), device=device) if weight else weight
        for weight in (weights.kl, weights.cross_entropy)
    )
    return weights._replace(kl=kl, cross_entropy=cross_entropy)


def _counts(weight: float | Tensor) -> bool:
    return isinstance(weight, Tensor) or weight != 0


class _Distribution(NamedTuple):
    """A softmax: the logits [B, V], their shares [B, V], their maximum [B], and the logarithm of the sum of exp [B].

    log(shares) is logits - log_sum: no second exponential or logarithm of every logit is needed.
    """

    logits: Tensor
    shares: Tensor
    maximum: Tensor
    log_sum: Tensor

    def compute_logarithms(self) -> Tensor:
        return self.logits - self.log_sum[:, None]

    def compute_cross_entropy(self, labels_B1: Tensor) -> Tensor:
        return self.log_sum - self.logits.gather(-1, labels_B1)[:, 0]

    def compare_top1(self, tokens_B1: Tensor) -> Tensor:
        """Return 1.0 where no token is more probable than the given one."""
        return (self.logits.gather(-1, tokens_B1)[:, 0] == self.maximum).float()


def _normalize(logits_BV: Tensor, top1_B1: Tensor | None = None) -> _Distribution:
    """Return the softmax; the largest share is one over the sum of the exponentials of what lies below the maximum.

    Where the most probable tokens are known, a CPU need not search again; the kernels of a GPU search on their way.
    """
    shares_BV = torch.softmax(logits_BV, -1)
    if top1_B1 is None or logits_BV.is_cuda:
        maximum_B, share_B = logits_BV.amax(-1), shares_BV.amax(-1)
    else:
        maximum_B, share_B = (each.gather(-1, top1_B1)[:, 0] for each in (logits_BV, shares_BV))
    return _Distribution(logits_BV, shares_BV, maximum_B, maximum_B - share_B.log())


def _find_top1(logits_BV: Tensor) -> Tensor:
    """Return the index [B, 1] of each row's largest logit; on a CPU torch.argmax alone takes longer than a softmax."""
    if logits_BV.is_cuda or logits_BV.shape[-1] % WINDOW:
        return logits_BV.argmax(-1, keepdim=True)
    windows = logits_BV.unflatten(-1, (-1, WINDOW))
    window_B1 = windows.amax(-1).argmax(-1, keepdim=True)
    largest = windows.gather(1, window_B1[..., None].expand(-1, 1, WINDOW))
    return window_B1 * WINDOW + largest.argmax(-1)


def _compute_block_loss(
    weights: LossWeights, wants_gradient: bool, logits_BV: Tensor, labels_B: Tensor, teacher_BV: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the six sums of a block, the divergence first, and the loss's gradient with respect to its logits."""
    labels_B1, temperature, beta = labels_B.clamp(min=0)[:, None], weights.temperature, weights.divergence_beta
    q = _normalize(logits_BV.float())
    cross_entropy_B = q.compute_cross_entropy(labels_B1)
    divergence_B = kl_B = teacher_cross_entropy_B = agreements_B = torch.zeros_like(cross_entropy_B)
    grad_BV = None
    if teacher_BV is not None:
        teacher_BV = teacher_BV.float()
        top1_B1 = _find_top1(teacher_BV)
        p = _normalize(teacher_BV, top1_B1)
        teacher_cross_entropy_B = p.compute_cross_entropy(labels_B1)
        agreements_B = q.compare_top1(top1_B1)
        tempered = [each if temperature == 1 else _normalize(each.logits / temperature) for each in (p, q)]
        wants_divergence = wants_gradient and _counts(weights.kl)
        divergence_B, grad_BV = _compute_divergence(tempered[0], tempered[1], beta, wants_divergence)
        kl_B = divergence_B if temperature == 1 and beta == 0 else _compute_divergence(p, q, 0.0, False)[0]
        _scale(grad_BV, weights.kl * temperature)
    if wants_gradient and _counts(weights.cross_entropy):
        likelihood_BV = q.shares
        likelihood_BV[torch.arange(len(labels_B), device=labels_B.device), labels_B1[:, 0]] -= 1
        _scale(likelihood_BV, weights.cross_entropy)
        grad_BV = likelihood_BV if grad_BV is None else grad_BV.add_(likelihood_BV)
    counts_B = (labels_B != IGNORED).float()
    terms = [divergence_B, kl_B, cross_entropy_B, teacher_cross_entropy_B, agreements_B, torch.ones_like(counts_B)]
    return torch.stack(terms) @ counts_B, None if grad_BV is None else grad_BV.to(logits_BV.dtype)


def _compute_drawn_block_loss(
    weights: LossWeights, wants_gradient: bool, logits_BV: Tensor, labels_B: Tensor, *parts: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return what `_compute_block_loss` does, with the teacher's distributions as they are known.

    The gradient of -Σ w log q is q - w: a row of q, from which K numbers are subtracted.
    """
    targets, labels_B1 = TeacherTargets(*parts), labels_B.clamp(min=0)[:, None]
    q = _normalize(logits_BV.float())
    cross_entropy_B = q.compute_cross_entropy(labels_B1)
    log_q_BK = q.logits.gather(1, targets.ids) - q.log_sum[:, None]
    kl_B = -(log_q_BK * targets.weights).sum(-1) - targets.entropy
    agreements_B = q.compare_top1(targets.top1[:, None])
    counts_B = (labels_B != IGNORED).float()
    terms = [kl_B, kl_B, cross_entropy_B, -targets.log_probability, agreements_B, torch.ones_like(counts_B)]
    grad_BV = None
    if wants_gradient:
        grad_BV = q.shares
        _scale(grad_BV, weights.kl + weights.cross_entropy)
        grad_BV.scatter_add_(1, targets.ids, targets.weights * -weights.kl)
        grad_BV.scatter_add_(1, labels_B1, torch.zeros_like(cross_entropy_B)[:, None] - weights.cross_entropy)
    return torch.stack(terms) @ counts_B, None if grad_BV is None else grad_BV.to(logits_BV.dtype)


def _compute_divergence(
    p: _Distribution, q: _Distribution, beta: float, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return D(p, q) of every token, and its gradient with respect to the logits of q.

    The gradient is q - p for KL(p‖q) (Hinton et al., arXiv 1503.02531, section 2.1). For the others, with
    m = beta · p + (1 - beta) · q, it is (1 - beta) · q · (log(q / m) - KL(q‖m)); for KL(q‖p), m is p and the factor 1.
    Logits divided by T have 1 / T of it, and T² · D has T times it.
    """
    if beta == 0:
        divergence_B = torch.linalg.vecdot(p.shares, p.logits - q.logits) - p.log_sum + q.log_sum
        return divergence_B, q.shares - p.shares if wants_gradient else None
    factor, log_m_BV = 1.0, p.compute_logarithms()
    if beta < 1:
        mixture_BV = torch.lerp(q.shares, p.shares, beta)
        factor, log_m_BV = 1 - beta, mixture_BV.clamp_(min=torch.finfo(mixture_BV.dtype).tiny).log_()
    ratio_BV = q.compute_logarithms().sub_(log_m_BV)
    reverse_B = torch.linalg.vecdot(q.shares, ratio_BV)
    divergence_B = factor * reverse_B
    if beta < 1:
        divergence_B = divergence_B + beta * torch.linalg.vecdot(p.shares, p.compute_logarithms().sub_(log_m_BV))
    grad_BV = ratio_BV.sub_(reverse_B[:, None]).mul_(q.shares) if wants_gradient else None
    _scale(grad_BV, factor)
    return divergence_B, grad_BV


def _scale(values_BV: Tensor | None, factor: float | Tensor) -> None:
    """Scale in place; a factor of 1 costs nothing."""
    if values_BV is not None and (isinstance(factor, Tensor) or factor != 1):
        values_BV *= factor


def _multiply(hidden_CH: Tensor, head: Tensor, buffer: Tensor) -> Tensor:
    """Return the logits [C, V], in the first rows of a buffer."""
    return torch.mm(hidden_CH, head.T, out=buffer[: len(hidden_CH)])
