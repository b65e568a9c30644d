"""Least squares on sums over tokens: the best matrix on some of its input channels, and which channels to keep.

The normal equations are summed batch by batch, so that no activations are kept, and solved in float64. The ridge draws
towards the present weights, not towards zero: what the tokens do not show stays as it is.

B = batch, S = sequence, N = tokens, C = input channels, O = output channels, K = kept input channels.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from minitron.errors import RunError

RIDGES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-6)
"""The ridges to choose from, as shares of the mean square of an input channel."""

CHOICE_RIDGE = 0.01
"""The ridge of choices: what others can replace has to be cheap, so it pulls weakly to the present weights."""

ROUNDS = 12
"""Rounds in which channels are dropped."""


class Moments:
    """The sums over tokens that a fit of inputs [N, C] to targets [N, O] needs, in float64."""

    def __init__(self, channels: int, outputs: int, device: torch.device) -> None:
        """Begin without tokens."""
        self.gram_CC = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        self.cross_CO = torch.zeros(channels, outputs, dtype=torch.float64, device=device)
        self._squares = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, inputs_NC: Tensor, targets_NO: Tensor) -> None:
        """Add tokens; the products of a batch are float64 on a CPU, float32 on a GPU: few of them are fast at more."""
        if inputs_NC.device.type == "cpu":
            inputs_NC, targets_NO = inputs_NC.double(), targets_NO.double()
            self.gram_CC.addmm_(inputs_NC.T, inputs_NC)  # without a second matrix of this size
            self.cross_CO.addmm_(inputs_NC.T, targets_NO)
        else:
            self.gram_CC += inputs_NC.T @ inputs_NC
            self.cross_CO += inputs_NC.T @ targets_NO
        self._squares += targets_NO.square().sum()
        self.tokens += len(inputs_NC)

    def without_last(self) -> "Moments":
        """Return the moments without the last input channel; they share memory."""
        part = copy.copy(self)
        part.gram_CC, part.cross_CO = self.gram_CC[:-1, :-1], self.cross_CO[:-1]
        return part

    def merge(self, others: "Moments") -> None:
        """Add the tokens of other moments."""
        self.gram_CC += others.gram_CC
        self.cross_CO += others.cross_CO
        self._squares += others._squares
        self.tokens += others.tokens

    def blend(self, present_OC: Tensor, share: float) -> None:
        """Move the targets towards what the present matrix gives: `share` of them is left, 1 - `share` is X Pᵀ."""
        present_CO = present_OC.T
        output_CO = self.gram_CC @ present_CO
        mixed, own = (present_CO * self.cross_CO).sum(), (present_CO * output_CO).sum()
        self._squares.mul_(share**2).add_(2 * share * (1 - share) * mixed + (1 - share) ** 2 * own)
        self.cross_CO.mul_(share).add_(output_CO, alpha=1 - share)

    def measure_error(self, weight_OC: Tensor) -> float:
        """Return the mean square, per token and output channel, that a matrix leaves of the targets."""
        weight_CO = weight_OC.T
        rest = self._squares + (weight_CO * (self.gram_CC @ weight_CO - 2 * self.cross_CO)).sum()
        return max(float(rest), 0.0) / (self.tokens * len(weight_OC))

    def factorize(self, ridge: float, columns: Tensor) -> tuple[Tensor | None, float]:
        """Return the Cholesky factor of the regularized Gram matrix of some columns, and the ridge in its unit.

        The factor is None if the matrix is so badly conditioned that it has none.

        Raises:
            RunError: an input or a target is not finite.
        """
        diagonal = self.gram_CC.diagonal()  # an input that is not finite is seen here
        if not (torch.isfinite(diagonal).all() and torch.isfinite(self.cross_CO).all()):
            raise RunError("activations are not finite: the model overflows, check its validation loss")
        regular = ridge * (float(diagonal.mean()) or 1.0)
        gram = self.gram_CC[columns[:, None], columns].mT  # LAPACK's order: it needs no copies to work in place
        gram.diagonal().add_(regular)
        info = torch.empty((), dtype=torch.int32, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(gram, out=(gram, info))
        return (None if failed else factor), regular


class SplitMoments:
    """The moments of the tokens that are fitted and of those that are held out; the last input column is the bias's."""

    def __init__(self) -> None:
        """Begin without tokens."""
        self._parts: dict[bool, Moments] = {}

    def add(self, held_out: bool, inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch [B, S, C] and [B, S, O]; `weights` [B, S, 1] multiply both sides."""
        weights = torch.ones_like(targets[..., :1]) if weights is None else weights
        inputs = (torch.cat([inputs, torch.ones_like(weights)], dim=-1) * weights).flatten(0, 1)
        targets = (targets * weights).flatten(0, 1)
        if held_out not in self._parts:
            self._parts[held_out] = Moments(inputs.shape[1], targets.shape[1], inputs.device)
        self._parts[held_out].add(inputs, targets)

    def add_change(self, held_out: bool, inputs: Tensor, before: Tensor, after: Tensor, hidden: Tensor) -> None:
        """Add what has to be added to the student's state `before` to come to the teacher's state `after`."""
        weights = compute_token_weights(after)
        self.add(held_out, inputs, after[..., hidden] - before, weights)

    def blend(self, present_OC: Tensor, share: float) -> None:
        """Move the targets towards what the present matrix gives, which has a column for the bias if it has one."""
        for part in self.get(with_bias=present_OC.shape[1] == len(self._parts[False].gram_CC)):
            part.blend(present_OC, share)

    def get(self, with_bias: bool) -> tuple[Moments, Moments]:
        """Return the moments of the fitted and of the held-out tokens."""
        fitted, held_out = (self._parts[held_out] for held_out in (False, True))
        return (fitted, held_out) if with_bias else (fitted.without_last(), held_out.without_last())


def compute_token_weights(state: Tensor) -> Tensor:
    """Return the weight [B, S, 1] of each token's error, one over the root mean square of its state [B, S, H].

    What follows sees states through a norm, and the few tokens of enormous states must not drown the others.
    """
    return state.square().mean(dim=-1, keepdim=True).rsqrt()


@dataclass(frozen=True)
class Fit:
    """A fitted matrix.

    Attributes:
        weight: [O, C] in float64, zero in the columns that were dropped.
        ridge: the chosen one; None: the present weights are better than any fit.
        error: mean square that it leaves on the held-out tokens.
        plain_error: the same of the present weights without the dropped columns.
    """

    weight: Tensor
    ridge: float | None
    error: float
    plain_error: float


def fit_columns(present_OC: Tensor, columns: Tensor, fitted: Moments, held_out: Moments) -> Fit:
    """Fit some columns W of a matrix; choose the ridge by the error on held-out tokens.

    Minimizes ‖Y − X Wᵀ‖² + r ‖W − P‖² over the tokens of `fitted`, where P are the present weights. The plain cut is a
    candidate, too, so that on the held-out tokens no fit is worse than it. With the ridge chosen, W is fitted again,
    on all tokens.

    Args:
        present_OC: the matrix, in float64.
        columns: indices [K] of the columns to keep.
        fitted: moments of the inputs and the targets; the held-out tokens are added in the end.
        held_out: the same on other tokens.

    Raises:
        RunError: the moments are not finite, or no ridge makes the equations solvable.
    """
    weight = torch.zeros_like(present_OC)
    weight[:, columns] = present_OC[:, columns]
    plain_error = held_out.measure_error(weight)
    best = Fit(weight, None, plain_error, plain_error)
    solved = False
    for ridge in RIDGES:
        if (refitted := solve(present_OC, columns, fitted, ridge)) is None:
            continue
        solved = True
        if (error := held_out.measure_error(refitted)) >= best.error:
            break  # from strong to weak: once it rises, it goes on rising
        best = Fit(refitted, ridge, error, plain_error)
    if not solved:
        raise complain_of_condition(fitted)
    if best.ridge is None:
        return best
    fitted.merge(held_out)
    refitted = solve(present_OC, columns, fitted, best.ridge)
    return best if refitted is None else replace(best, weight=refitted)


def solve(present_OC: Tensor, columns: Tensor, moments: Moments, ridge: float) -> Tensor | None:
    """Return the matrix [O, C] with some columns fitted; None if the moments are too badly conditioned."""
    factor, regular = moments.factorize(ridge, columns)
    if factor is None:
        return None
    weight = torch.zeros_like(present_OC)
    weight[:, columns] = torch.cholesky_solve(_aim(present_OC, moments, regular, columns), factor).T
    return weight


def choose_channels(present_OC: Tensor, fitted: Moments, channels: int, left: int) -> Tensor:
    """Choose by Optimal Brain Surgeon which of the first columns to keep; return their indices, ascending.

    Dropping the columns g and refitting the others costs tr(W_g [(R⁻¹)_gg]⁻¹ W_gᵀ), where R is the regularized Gram
    matrix of the inputs and W the refitted matrix (Hassibi and Stork, NIPS 1992; SparseGPT, arXiv 2301.00774, section
    3). They go one by one, in rounds; after each round R⁻¹ and W are computed anew.

    Args:
        present_OC: the matrix, in float64, with the bias as its last column if it has one, which always stays.
        fitted: moments of its inputs and targets.
        channels: number of columns to choose from.
        left: number of columns to keep.

    Raises:
        RunError: the moments are not finite, or too badly conditioned.
    """
    kept, most = torch.arange(channels, device=present_OC.device), math.ceil((channels - left) / ROUNDS)
    while (excess := len(kept) - left) > 0:
        dropped = _drop_one_by_one(_refit(present_OC, fitted, kept, channels), min(excess, most))
        kept = kept[_is_not_in(dropped, len(kept))]
    return kept


def choose_heads(
    present_OC: Tensor, fitted: Moments, heads: Tensor, size: int, owners: Tensor, left: int, channels: int
) -> Tensor:
    """Choose as `choose_channels` among groups of neighboring columns; they go one by one, and all is computed anew.

    Args:
        present_OC: the matrix, as there.
        fitted: moments of its inputs and targets.
        heads: indices of the heads to choose from, ascending; or of key-value groups.
        size: columns of each of them.
        owners: per head the group that it belongs to; each keeps equally many.
        left: number of heads to keep in each group.
        channels: number of columns of all heads.

    Raises:
        RunError: the moments are not finite, or too badly conditioned.
    """
    while (spare := torch.bincount(owners)[owners] > left).any():
        state = _refit(present_OC, fitted, expand_groups(heads, size), channels)
        cheapest = state.compute_costs(size).masked_fill(~spare, float("inf")).argmin()
        stays = _is_not_in(cheapest[None], len(heads))
        heads, owners = heads[stays], owners[stays]
    return heads


def expand_groups(groups: Tensor, size: int) -> Tensor:
    """Return the columns of groups of `size` neighbors."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


class _Refitted(NamedTuple):
    """The refit of the columns that are left: R⁻¹, the matrix, and what the pull to the present weights costs."""

    inverse_KK: Tensor
    weight_KO: Tensor
    pull_K: Tensor

    def compute_costs(self, size: int) -> Tensor:
        """Return what dropping each group of columns would add to the sum of squares."""
        count = len(self.weight_KO) // size
        weights = self.weight_KO.view(count, size, -1)
        if size == 1:  # a thousand systems of one equation would take a GPU seconds
            solved = weights / self.inverse_KK.diagonal()[:, None, None]
        else:
            blocks = self.inverse_KK.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            solved = torch.linalg.solve(blocks, weights)
        # a dropped column is pulled to its present weights, too: this part of the costs belongs to no choice
        return (weights * solved).sum(dim=(1, 2)) - self.pull_K.view(-1, size).sum(dim=1)


def _refit(present_OC: Tensor, fitted: Moments, kept: Tensor, channels: int) -> _Refitted:
    """Refit the kept columns and the bias, which is no part of what is returned."""
    columns = torch.cat([kept, torch.arange(channels, present_OC.shape[1], device=kept.device)])
    factor, regular = fitted.factorize(CHOICE_RIDGE, columns)
    if factor is None:
        raise complain_of_condition(fitted)
    inverse = torch.cholesky_inverse(factor, out=factor).mT
    weight = inverse @ _aim(present_OC, fitted, regular, columns)
    used = len(kept)
    return _Refitted(
        inverse[:used, :used].contiguous(), weight[:used], regular * present_OC[:, kept].square().sum(dim=0)
    )


def _drop_one_by_one(state: _Refitted, count: int) -> Tensor:
    """Return the positions of `count` columns to drop, each the cheapest after those before it.

    Only the cheapest 2 `count` columns at the beginning are candidates: dropping a column makes others dearer.
    """
    candidates = state.compute_costs(1).topk(min(2 * count, len(state.pull_K)), largest=False).indices
    inverse, weight = state.inverse_KK[candidates][:, candidates], state.weight_KO[candidates]
    dropped = torch.zeros_like(candidates, dtype=torch.bool)
    for _ in range(count):
        costs = weight.square().sum(dim=1) / inverse.diagonal() - state.pull_K[candidates]
        cheapest = costs.masked_fill(dropped, float("inf")).argmin()[None]
        row = inverse.index_select(0, cheapest) / inverse.diagonal()[cheapest]
        weight = weight - row.T * weight.index_select(0, cheapest)
        inverse = inverse - row.T * inverse.index_select(0, cheapest)
        dropped[cheapest] = True
    return candidates[dropped]


def _is_not_in(positions: Tensor, count: int) -> Tensor:
    """Return for each of `count` positions whether it is none of these."""
    stays = torch.ones(count, dtype=torch.bool, device=positions.device)
    stays[positions] = False
    return stays


def _aim(present_OC: Tensor, moments: Moments, regular: float, columns: Tensor) -> Tensor:
    """Return the right-hand side [K, O] of the normal equations."""
    return moments.cross_CO[columns] + regular * present_OC[:, columns].T


def complain_of_condition(moments: Moments) -> RunError:
    """Return the error of moments whose equations cannot be solved."""
    size = len(moments.gram_CC)
    return RunError(
        f"the {size} x {size} Gram matrix of the inputs over {moments.tokens} tokens is too badly conditioned; raise "
        "prune.calibration_sequences"
    )
