"""Whole sites to the parts of a cohort, so that every part has its share of every class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_EMPTY = 10.0
"""Cost of a class that a part has no patient of, times the part's share; no unevenness of one class costs as much."""

_LEAST_GAIN = 1e-9
"""A step that gains less is left, so that rounding cannot make the search go in circles."""


def share_sites(
    counts: NDArray[np.int64], shares: Sequence[float], orders: Sequence[Sequence[int]]
) -> NDArray[np.int64]:
    """Assign whole sites to parts so that each part's share of every class comes near to ``shares``.

    Sites are dealt one by one to where they serve best, then moved and swapped while that helps. The aim, not the
    solver, is that of preserved-site cross-validation (Howard et al., Nature Communications 2021).

    Args:
        counts: (S, C), patients of each class at each site.
        shares: (P,), share of the cohort that each part is to have, of sum 1.
        orders: orders to deal in, each a permutation of the S sites; of several the best outcome is taken.

    Returns:
        int64 (S,), the part of each site.
    """
    sharing = _Sharing(counts, shares)
    outcomes = [sharing.improve(sharing.deal(order)) for order in orders]
    costs = np.array([sharing.cost_of(parts) for parts in outcomes])
    return outcomes[int(np.flatnonzero(costs <= costs.min() + _LEAST_GAIN)[0])]


class _Sharing:
    """Sites, and what it costs to share them out in one way or another."""

    def __init__(self, counts: NDArray[np.int64], shares: Sequence[float]) -> None:
        self._counts = counts[:, counts.sum(axis=0) > 0]
        self._totals = self._counts.sum(axis=0)
        self._shares = np.asarray(shares, np.float64)

    def deal(self, order: Sequence[int]) -> NDArray[np.int64]:
        """Every site in turn to the part where it lowers the cost most."""
        parts = np.zeros(len(self._counts), np.int64)
        sums = np.zeros((len(self._shares), len(self._totals)), np.int64)
        for site in order:
            gain = self._cost(sums + self._counts[site], self._shares) - self._cost(sums, self._shares)
            parts[site] = np.argmin(gain)
            sums[parts[site]] += self._counts[site]
        return parts

    def improve(self, parts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Make the best move, or where none helps the best swap, until none helps."""
        parts = parts.copy()
        while True:
            sums = self._sum(parts)
            moves = self._price_moves(parts, sums)
            site, part = np.unravel_index(np.argmin(moves), moves.shape)
            if moves[site, part] < -_LEAST_GAIN:
                parts[site] = part
                continue
            swaps = self._price_swaps(parts, sums)
            one, other = np.unravel_index(np.argmin(swaps), swaps.shape)
            if swaps[one, other] >= -_LEAST_GAIN:
                return parts
            parts[one], parts[other] = parts[other], parts[one]

    def cost_of(self, parts: NDArray[np.int64]) -> float:
        """How far an outcome is from what is wanted."""
        return float(self._cost(self._sum(parts), self._shares).sum())

    def _price_moves(self, parts: NDArray[np.int64], sums: NDArray[np.int64]) -> NDArray[np.float64]:
        """(S, P): change of the cost where a site goes to a part."""
        cost = self._cost(sums, self._shares)
        left = self._cost(sums[parts] - self._counts, self._shares[parts]) - cost[parts]  # (S,)
        joined = self._cost(sums + self._counts[:, None], self._shares) - cost  # (S, P)
        prices: NDArray[np.float64] = left[:, None] + joined
        prices[np.arange(len(parts)), parts] = 0.0
        return prices

    def _price_swaps(self, parts: NDArray[np.int64], sums: NDArray[np.int64]) -> NDArray[np.float64]:
        """(S, S): change of the cost where two sites change places."""
        cost = self._cost(sums, self._shares)[parts]
        swapped = (sums[parts] - self._counts)[:, None] + self._counts  # (S, S, C): the first's part with the second
        after = self._cost(swapped, self._shares[parts][:, None])
        prices: NDArray[np.float64] = after + after.T - cost[:, None] - cost
        prices[parts[:, None] == parts] = 0.0
        return prices

    def _sum(self, parts: NDArray[np.int64]) -> NDArray[np.int64]:
        sums = np.zeros((len(self._shares), len(self._totals)), np.int64)
        np.add.at(sums, parts, self._counts)
        return sums

    def _cost(self, sums: NDArray[np.int64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Cost (…,) of parts that hold ``sums`` (…, C) patients where they should hold ``shares`` (…,) of them."""
        uneven = np.square(sums / self._totals - shares[..., None]).sum(axis=-1)
        missing = (sums == 0).sum(axis=-1) + (sums == 0).all(axis=-1)  # a part with nobody is worse than two with half
        cost: NDArray[np.float64] = uneven + _EMPTY * shares * missing
        return cost
