"""Optimal Brain Surgeon: choose which input channels of a matrix go, by what the others cannot replace.

C = input channels, O = output channels, D = channels that are dropped.
"""

import math

import torch
from torch import Tensor
from torch.linalg import vector_norm

from minitron.models.pruning.least_squares import (
    Moments,
    complain_of_condition,
    compute_aim,
    expand_groups,
    split_outputs,
)

CHOICE_RIDGE = 0.01
"""The ridge of choices: what others can replace has to be cheap, so it pulls weakly to the present weights."""

ROUNDS = 12
"""Rounds in which channels are dropped."""


class Surgeon:
    """Chooses by Optimal Brain Surgeon which input channels of a matrix go, while the others are refitted.

    Dropping the columns g and refitting the others costs tr(W_g [(R⁻¹)_gg]⁻¹ W_gᵀ), where R is the regularized Gram
    matrix of the inputs and W the refitted matrix (Hassibi and Stork, NIPS 1992; SparseGPT, arXiv 2301.00774, section
    3). R⁻¹ and W of what is left follow from those before, by the Schur complement.
    """

    def __init__(self, present_OC: Tensor, fitted: Moments, channels: int) -> None:
        """Refit all columns.

        Args:
            present_OC: the matrix, with the bias as its last column if it has one, which always stays.
            fitted: moments of its inputs and targets.
            channels: number of columns to choose from.

        Raises:
            RunError: the moments are not finite, or too badly conditioned.
        """
        columns = torch.arange(present_OC.shape[1], device=present_OC.device)
        factor, regular = fitted.factorize(CHOICE_RIDGE, columns)
        if factor is None:
            raise complain_of_condition(fitted)
        self._inverse_CC = torch.cholesky_inverse(factor, upper=True, out=factor).mT
        self._weight_CO, self._pull_C = torch.empty_like(fitted.cross_CO), fitted.cross_CO.new_zeros(channels)
        for outputs in split_outputs(present_OC):
            self._weight_CO[:, outputs] = self._inverse_CC @ compute_aim(present_OC, fitted, regular, columns, outputs)
            self._pull_C += regular * present_OC[outputs, :channels].double().square().sum(dim=0)
        self._is_left = torch.ones(channels, dtype=torch.bool, device=columns.device)

    def drop(self, columns_D: Tensor) -> None:
        """Drop columns, and refit the others."""
        rows_DC = self._inverse_CC[columns_D]
        solved_DC = torch.linalg.solve(rows_DC[:, columns_D], rows_DC)
        self._weight_CO.addmm_(solved_DC.T, self._weight_CO[columns_D], alpha=-1)
        self._inverse_CC.addmm_(solved_DC.T, rows_DC, alpha=-1)
        self._inverse_CC[columns_D, columns_D] = 1.0  # the rest of their rows is about zero now: blocks stay regular
        self._is_left[columns_D] = False

    def keep(self, columns: Tensor) -> None:
        """Drop all other columns."""
        others = self._is_left.clone()
        others[columns] = False
        self.drop(others.nonzero().flatten())

    def drop_channels(self, left: int) -> Tensor:
        """Drop single columns until so many are left; return their indices, ascending.

        They go one by one, in rounds. In a round only the cheapest columns at its beginning are candidates, twice as
        many as go: dropping a column makes others dearer.
        """
        excess = int(self._is_left.sum()) - left
        most = math.ceil(excess / ROUNDS)
        for start in range(0, excess, most or 1):
            self._drop_one_by_one(min(most, excess - start))
        return self._is_left.nonzero().flatten()

    def drop_groups(self, size: int, left: int, owners: Tensor | None = None) -> Tensor:
        """Drop groups of neighboring columns, one by one, until each owner has so many; return the indices left.

        Args:
            size: columns of a group: of a head, or of a key-value group's heads.
            left: number of groups to keep per owner.
            owners: per group its owner; None: there is one.
        """
        owners = torch.zeros_like(self._is_left[::size], dtype=torch.int64) if owners is None else owners
        while True:
            is_left = self._is_left[::size]
            spare = is_left & (torch.bincount(owners[is_left], minlength=len(owners))[owners] > left)
            if not spare.any():
                return is_left.nonzero().flatten()
            cheapest = self._compute_costs(size).masked_fill(~spare, float("inf")).argmin()
            self.drop(expand_groups(cheapest[None], size))

    def _compute_costs(self, size: int) -> Tensor:
        """Return what dropping each group of columns would add to the sum of squares; infinity if it is dropped."""
        channels = len(self._is_left)
        weight_CO, count = self._weight_CO[:channels], channels // size
        if size == 1:  # a thousand systems of one equation would take a GPU seconds
            costs = vector_norm(weight_CO, dim=1).square() / self._inverse_CC.diagonal()[:channels]
        else:
            grid = self._inverse_CC[:channels, :channels].view(count, size, count, size)
            blocks, weights = grid.diagonal(dim1=0, dim2=2).permute(2, 0, 1), weight_CO.view(count, size, -1)
            costs = (weights * torch.linalg.solve(blocks, weights)).sum(dim=(1, 2))
        # a dropped column is pulled to its present weights, too: this part of the costs belongs to no choice
        costs -= self._pull_C.view(-1, size).sum(dim=1)
        return costs.masked_fill(~self._is_left[::size], float("inf"))

    def _drop_one_by_one(self, count: int) -> None:
        """Drop so many columns, each the cheapest after those before it."""
        number = min(2 * count, int(self._is_left.sum()))
        candidates = self._compute_costs(1).topk(number, largest=False).indices
        inverse, weight = self._inverse_CC[candidates][:, candidates], self._weight_CO[candidates]
        dropped = torch.zeros_like(candidates, dtype=torch.bool)
        for _ in range(count):
            costs = weight.square().sum(dim=1) / inverse.diagonal() - self._pull_C[candidates]
            cheapest = costs.masked_fill(dropped, float("inf")).argmin()[None]
            row = inverse.index_select(0, cheapest) / inverse.diagonal()[cheapest]
            weight.addmm_(row.T, weight.index_select(0, cheapest), alpha=-1)
            inverse.addmm_(row.T, inverse.index_select(0, cheapest), alpha=-1)
            dropped[cheapest] = True
        self.drop(candidates[dropped])
