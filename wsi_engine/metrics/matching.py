"""Which predicted nucleus stands for which true one: rows of the table of overlaps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from wsi_engine.metrics.overlap import Floats, Ints, Overlap


def best_partners(table: Overlap) -> Ints:
    """For each true nucleus that has one, its pair of highest IoU, the first of equal ones: rows of the table."""
    order = np.lexsort((-table.ious, table.true_rows))  # stable: the lower id stays first
    owners = table.true_rows[order]
    first = np.ones(len(order), bool)
    first[1:] = owners[1:] != owners[:-1]
    best: Ints = order[first]
    return best


def match_one_to_one(table: Overlap) -> Ints:
    """The pairs of the one-to-one matching of largest total IoU: ascending rows of the table."""
    alone = _pairs_without_rivals(table)
    contested = np.flatnonzero(~alone)
    if not len(contested):
        return np.flatnonzero(alone)
    chosen = contested[_assign(table.true_rows[contested], table.predicted_rows[contested], table.ious[contested])]
    return np.sort(np.concatenate([np.flatnonzero(alone), chosen]))


def _pairs_without_rivals(table: Overlap) -> NDArray[np.bool_]:
    """Pairs whose two objects touch nothing else: they belong to every best matching."""
    of_true = np.bincount(table.true_rows, minlength=len(table.true))
    of_predicted = np.bincount(table.predicted_rows, minlength=len(table.predicted))
    lone: NDArray[np.bool_] = (of_true[table.true_rows] == 1) & (of_predicted[table.predicted_rows] == 1)
    return lone


def _assign(rows: Ints, columns: Ints, gains: Floats) -> Ints:
    """Indices of the pairs, at most one a row and one a column, whose gains sum to the most.

    Every row also gets a column of its own that means "no partner", so that a full matching always exists and the
    sparse solver can be used; a pair is worth 1 + its gain against 1 for none.
    """
    row_ids, row_at = np.unique(rows, return_inverse=True)
    column_ids, column_at = np.unique(columns, return_inverse=True)
    own = np.arange(len(row_ids))
    values = np.concatenate([1.0 + gains, np.ones(len(own))])
    places = (np.concatenate([row_at, own]), np.concatenate([column_at, len(column_ids) + own]))
    graph = coo_array((values, places), shape=(len(own), len(column_ids) + len(own))).tocsr()
    _, partner = min_weight_full_bipartite_matching(graph, maximize=True)
    taken: Ints = np.flatnonzero(partner[row_at] == column_at)
    return taken
