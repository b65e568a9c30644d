"""Least squares on sums over tokens: the best matrix on some of its input channels.

The normal equations are summed batch by batch, so that no activations are kept, and solved in float64. The ridge draws
towards the present weights, not towards zero: what the tokens do not show stays as it is.

B = batch, S = sequence, N = tokens, C = input channels, O = output channels, K = kept input channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.linalg import cholesky_ex, solve_triangular

from minitron.errors import RunError
from minitron.models.memory import return_freed_memory
from minitron.models.processes import add_shares, count_processes, gather_rows

RIDGES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-6)
"""The ridges to choose from, as shares of the mean square of an input channel."""

BLOCK = 2048
"""Rows of a Gram matrix that are computed at once."""

OUTPUTS = 256
"""Outputs of a matrix that are solved at once."""


class Moments:
    """The sums over tokens that a fit of inputs [N, C] to targets [N, O] needs, in float64.

    Of the Gram matrix there are blocks of rows as far as the diagonal: half the memory, and half the products.
    """

    def __init__(self, channels: int, outputs: int, device: torch.device) -> None:
        """Begin without tokens."""
        ends = [*range(BLOCK, channels, BLOCK), channels]
        sizes = [(end - start, end) for start, end in zip([0, *ends], ends, strict=False)]
        self.gram_blocks = [torch.zeros(size, dtype=torch.float64, device=device) for size in sizes]
        self.cross_CO = torch.zeros(channels, outputs, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, inputs_NC: Tensor, targets_NO: Tensor) -> None:
        """Add tokens; the products of a batch are float64 on a CPU, float32 on a GPU: few of them are fast at more."""
        if inputs_NC.device.type == "cpu":
            inputs_NC, targets_NO = inputs_NC.double(), targets_NO.double()
            for start, end, block in self._list_blocks():
                block.addmm_(inputs_NC[:, start:end].T, inputs_NC[:, :end])  # without a second matrix of this size
            self.cross_CO.addmm_(inputs_NC.T, targets_NO)
        else:
            for start, end, block in self._list_blocks():
                block += inputs_NC[:, start:end].T @ inputs_NC[:, :end]
            self.cross_CO += inputs_NC.T @ targets_NO
        self.tokens += len(inputs_NC)

    def collect(self, receiver: int = 0) -> None:
        """Add the tokens of the other processes; the receiver alone has the sums then."""
        tokens = torch.tensor(self.tokens)
        add_shares([*self.gram_blocks, self.cross_CO, tokens], receiver)
        self.tokens = int(tokens)

    def blend(self, present_OC: Tensor, share: float) -> None:
        """Move the targets towards what the present matrix gives: `share` of them is left, 1 - `share` is X Pᵀ."""
        self.cross_CO.mul_(share)
        for outputs in split_outputs(present_OC):
            present_CO, part_CO = present_OC[outputs].T.double().mul_(1 - share), self.cross_CO[:, outputs]
            for start, end, block in self._list_blocks():
                part_CO[start:end] += block @ present_CO[:end]
                part_CO[:start] += block[:, :start].T @ present_CO[start:end]

    def factorize(self, ridge: float, columns: Tensor) -> tuple[Tensor | None, float]:
        """Return the Cholesky factor [K, K] of the regularized Gram matrix of some columns, and the ridge in its unit.

        The factor is upper triangular. It is None if the matrix is so badly conditioned that it has none.

        Args:
            ridge: share of the mean square of an input channel.
            columns: their indices, ascending.

        Raises:
            RunError: an input or a target is not finite.
        """
        diagonal = torch.cat([block.diagonal(offset=start) for start, _, block in self._list_blocks()])
        check_finite(diagonal)
        check_finite(self.cross_CO)
        regular = ridge * (float(diagonal.mean()) or 1.0)
        gram = self._read_upper(columns)
        gram.diagonal().add_(regular)
        info = torch.empty((), dtype=torch.int32, device=gram.device)
        factor, failed = cholesky_ex(gram, upper=True, out=(gram, info))
        return (None if failed else factor), regular

    def _read_upper(self, columns: Tensor) -> Tensor:
        """Return the upper triangle of the Gram matrix of some columns, in LAPACK's order: it works in place there."""
        lower = self.cross_CO.new_empty(len(columns), len(columns))
        for start, end, block in self._list_blocks():
            first, last = torch.searchsorted(columns, torch.tensor([start, end], device=columns.device)).tolist()
            lower[first:last, :last] = block[columns[first:last] - start][:, columns[:last]]
        return lower.mT

    def _list_blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the first row of each block, the end of its rows, and the block [rows, end]."""
        for block in self.gram_blocks:
            yield block.shape[1] - len(block), block.shape[1], block


class HeldOutTokens:
    """Tokens on which a fit is measured, batch by batch: inputs [N, C] and targets [N, O]."""

    def __init__(self) -> None:
        """Begin without tokens."""
        self.batches: list[tuple[Tensor, Tensor]] = []

    def blend(self, present_OC: Tensor, share: float) -> None:
        """Move the targets as `Moments.blend` does."""
        for inputs, targets in self.batches:
            targets.lerp_(inputs @ present_OC.T, 1 - share)

    def measure_error(self, weight_OC: Tensor) -> float:
        """Return the mean square, per token and output channel, that a matrix leaves of the targets."""
        rest = [(targets - inputs @ weight_OC.T).square().sum(dtype=torch.float64) for inputs, targets in self.batches]
        return float(torch.stack(rest).sum()) / sum(targets.numel() for _, targets in self.batches)


class SplitTokens:
    """The tokens of a fit: sums over those that are fitted, and the held-out ones. The last input may be the bias's."""

    def __init__(self, channels: int, outputs: int, with_bias: bool, device: torch.device) -> None:
        """Begin without tokens."""
        self.fitted, self.held_out = Moments(channels + with_bias, outputs, device), HeldOutTokens()
        self._with_bias = with_bias

    def add(self, held_out: bool, inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch [B, S, C] and [B, S, O]; `weights` [B, S, 1] multiply both sides."""
        if self._with_bias:
            inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
        if weights is not None:
            inputs, targets = inputs * weights, targets * weights
        batch = inputs.flatten(0, 1), targets.flatten(0, 1)
        if held_out:
            self.held_out.batches.append(batch)
        else:
            self.fitted.add(*batch)

    def add_change(self, held_out: bool, inputs: Tensor, before: Tensor, after: Tensor, teacher: Tensor) -> None:
        """Add what has to be added to the student's state `before` to come to `after`, its share of the teacher's."""
        self.add(held_out, inputs, after - before, compute_token_weights(teacher))

    def collect(self) -> None:
        """Give process 0 the tokens of all processes; what the others have then is of no use.

        The fit's matrices need the memory that the batches took, hundreds of megabytes.
        """
        self.fitted.collect()
        if count_processes() > 1:
            none = [self.fitted.cross_CO.new_empty(0, size).float() for size in self.fitted.cross_CO.shape]
            own = zip(none, *self.held_out.batches, strict=True)
            inputs, targets = (gather_rows(torch.cat(rows)) for rows in own)
            self.held_out.batches = list(zip(inputs, targets, strict=True))
        return_freed_memory()

    def blend(self, present_OC: Tensor, share: float) -> None:
        """Move the targets towards what the present matrix gives, which has a column for the bias if it has one."""
        self.fitted.blend(present_OC, share)
        self.held_out.blend(present_OC, share)


def compute_token_weights(state: Tensor) -> Tensor:
    """Return the weight [B, S, 1] of each token's error, one over the root mean square of its state [B, S, H].

    What follows sees states through a norm, and the few tokens of enormous states must not drown the others. The state
    of a token whose embedding is zero, such as padding's, may be zero.
    """
    return state.square().mean(dim=-1, keepdim=True).clamp(min=torch.finfo(state.dtype).tiny).rsqrt()


@dataclass(frozen=True)
class Fit:
    """A fitted matrix.

    Attributes:
        weight: [O, C], zero in the columns that were dropped.
        ridge: the chosen one; None: the present weights are better than any fit.
        error: mean square that it leaves on the held-out tokens.
        plain_error: the same of the present weights without the dropped columns.
    """

    weight: Tensor
    ridge: float | None
    error: float
    plain_error: float


def fit_columns(present_OC: Tensor, columns: Tensor, fitted: Moments, held_out: HeldOutTokens) -> Fit:
    """Fit some columns W of a matrix; choose the ridge by the error on held-out tokens.

    Minimizes ‖Y − X Wᵀ‖² + r ‖W − P‖² over the tokens of `fitted`, where P are the present weights. The plain cut is a
    candidate, too, so that on the held-out tokens no fit is worse than it. With the ridge chosen, W is fitted again,
    on all tokens.

    Args:
        present_OC: the matrix.
        columns: indices [K] of the columns to keep, ascending.
        fitted: moments of the inputs and the targets; the held-out tokens are added in the end.
        held_out: other tokens.

    Raises:
        RunError: the moments are not finite, or no ridge makes the equations solvable.
    """
    best = _choose_ridge(present_OC, columns, fitted, held_out)
    if best.ridge is None:
        return best
    for batch in held_out.batches:
        fitted.add(*batch)
    refitted = solve(present_OC, columns, fitted, best.ridge)
    return best if refitted is None else replace(best, weight=refitted)


def _choose_ridge(present_OC: Tensor, columns: Tensor, fitted: Moments, held_out: HeldOutTokens) -> Fit:
    """Return the fit with the least error on held-out tokens, or the plain cut if that has less."""
    best, is_solved = _cut_columns(present_OC, columns, held_out), False
    for ridge in RIDGES:
        if (refitted := solve(present_OC, columns, fitted, ridge)) is None:
            continue
        is_solved = True
        if (error := held_out.measure_error(refitted)) >= best.error:
            break  # from strong to weak: once it rises, it goes on rising
        best = replace(best, weight=refitted, ridge=ridge, error=error)
    if not is_solved:
        raise complain_of_condition(fitted)
    return best


def _cut_columns(present_OC: Tensor, columns: Tensor, held_out: HeldOutTokens) -> Fit:
    """Return the plain cut."""
    weight = torch.zeros_like(present_OC)
    weight[:, columns] = present_OC[:, columns]
    error = held_out.measure_error(weight)
    return Fit(weight, None, error, error)


def solve(present_OC: Tensor, columns: Tensor, moments: Moments, ridge: float) -> Tensor | None:
    """Return the matrix [O, C], in its dtype, with some columns fitted; None if the moments are badly conditioned."""
    factor, regular = moments.factorize(ridge, columns)
    if factor is None:
        return None
    weight = torch.zeros_like(present_OC)
    for outputs in split_outputs(present_OC):
        half_KO = solve_triangular(factor.mT, compute_aim(present_OC, moments, regular, columns, outputs), upper=False)
        weight[outputs, columns] = solve_triangular(factor, half_KO, upper=True).T.to(weight.dtype)
    return weight


def expand_groups(groups: Tensor, size: int) -> Tensor:
    """Return the columns of groups of `size` neighbors."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def split_outputs(present_OC: Tensor) -> Iterator[slice]:
    """Yield the outputs that are solved at once."""
    return (slice(start, start + OUTPUTS) for start in range(0, len(present_OC), OUTPUTS))


def compute_aim(present_OC: Tensor, moments: Moments, regular: float, columns: Tensor, outputs: slice) -> Tensor:
    """Return the right-hand side [K, outputs] of the normal equations of some columns and outputs of a matrix."""
    return present_OC[outputs, columns].T.double().mul_(regular).add_(moments.cross_CO[columns, outputs])


def check_finite(sums: Tensor) -> None:
    """Refuse sums over tokens whose activations overflow.

    Raises:
        RunError: one of them is not finite.
    """
    if not torch.isfinite(sums).all():
        raise RunError("activations are not finite: the model overflows, check its validation loss")


def complain_of_condition(moments: Moments) -> RunError:
    """Return the error of moments whose equations cannot be solved."""
    size = len(moments.cross_CO)
    return RunError(
        f"the {size} x {size} Gram matrix of the inputs over {moments.tokens} tokens is too badly conditioned; raise "
        "prune.calibration_sequences"
    )
