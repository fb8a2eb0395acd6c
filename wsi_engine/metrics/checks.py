"""What the classification metrics accept, checked in one place."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsi_engine.errors import SettingsError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def check_classes(values: ArrayLike, name: str = "labels") -> Ints:
    """Class numbers as int64 (N,), N at least 1.

    Raises:
        SettingsError: they are not whole numbers from 0 on, in one row.
    """
    array: NDArray[Any] = np.asarray(values)
    if not array.size:
        raise SettingsError(f"{name} are empty; a metric needs at least one slide")
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise SettingsError(f"{name} must be class numbers of shape (N,), not {array.dtype} {array.shape}")
    if array.min() < 0:
        raise SettingsError(f"{name} hold the class {array.min()}; classes count from 0")
    return array.astype(np.int64, copy=False)


def check_scores(labels: ArrayLike, scores: ArrayLike) -> tuple[Ints, Floats]:
    """Labels int64 (N,) and scores float64 (N,) or (N, C), finite and of one length.

    Raises:
        SettingsError: they do not fit each other, or a score is not finite.
    """
    true = check_classes(labels)
    array = np.asarray(scores, np.float64)
    if array.ndim not in {1, 2} or len(array) != len(true) or (array.ndim == 2 and array.shape[1] < 2):
        raise SettingsError(f"scores of shape {array.shape} do not fit {len(true)} labels; give (N,) or (N, classes)")
    classes = array.shape[1] if array.ndim == 2 else 2
    if true.max() >= classes:
        raise SettingsError(f"the label {true.max()} has no column among the scores of {classes} classes")
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))[0])
        raise SettingsError(f"the scores of row {row} are not finite; predict that slide again")
    return true, array


def check_probabilities(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Ints, Floats]:
    """Labels int64 (N,) and probabilities float64 (N, C); a single row (N,) is that of class 1 of two.

    Raises:
        SettingsError: they do not fit each other, lie outside 0–1, or a row does not sum to 1 (± 0.01, half precision).
    """
    true, array = check_scores(labels, probabilities)
    if array.min() < 0 or array.max() > 1:
        raise SettingsError(
            f"probabilities must be within 0–1, not {array.min():g}–{array.max():g}; apply softmax first"
        )
    if array.ndim == 1:
        return true, np.stack([1 - array, array], axis=1)
    sums = array.sum(axis=1)
    if np.abs(sums - 1).max() > 0.01:
        row = int(np.abs(sums - 1).argmax())
        raise SettingsError(f"the probabilities of row {row} sum to {sums[row]:g}, not to 1; apply softmax first")
    return true, array
