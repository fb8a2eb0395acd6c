"""Labelling objects of a mask, filling their holes, removing the small ones, numbering them anew."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels.components import Components, check_connectivity, find_components, paint_components
from wsi_engine.kernels.distance import as_mask
from wsi_engine.kernels.runs import as_labels


def label(mask: NDArray[Any], connectivity: int = 8) -> NDArray[np.int32]:
    """Number the objects of a mask: 1 … n in the raster order of their first pixels, 0 outside.

    Equal to ``scipy.ndimage.label`` with its cross (4) or with ``np.ones((3, 3))`` (8); n is the greatest label.
    Shared by threads; the result does not depend on how many.

    Args:
        mask: bool or integer (H, W), non-zero is True; may be empty.
        connectivity: 4, pixels of an object touch by sides, or 8, by sides or corners.

    Returns:
        int32 (H, W).

    Raises:
        TypeError: ``mask`` is neither bool nor integer.
        ValueError: ``mask`` is not (H, W), or ``connectivity`` is neither 4 nor 8.

    Complexity: O(H·W + R·α(R)) for R horizontal runs.

    Source: L. He et al., "A run-based two-scan labeling algorithm", IEEE Trans. Image Processing 17 (2008).
    """
    components = find_components(as_mask(mask, "label"), check_connectivity(connectivity, "label"))
    out = np.zeros(np.shape(mask), np.int32)
    paint_components(components, np.arange(components.count + 1, dtype=np.int32), out)
    return out


@compiled
def _border_loop(
    runs: NDArray[np.int32], owner: NDArray[np.int32], height: int, width: int, inner: NDArray[np.bool_]
) -> None:
    """Set ``inner`` to False for the components that reach the border of the array."""
    for k in range(owner.size):
        y = runs[k, 0]
        if y == 0 or y == height - 1 or runs[k, 1] == 0 or runs[k, 2] == width:
            inner[owner[k]] = False


def find_holes(mask: NDArray[np.bool_]) -> tuple[Components, NDArray[np.bool_]]:
    """Components of the False pixels, joined by sides, and which of them are holes: do not reach the border.

    Args:
        mask: bool (H, W), C-contiguous.

    Returns:
        components 1 … n, and bool (n + 1,), whose place 0 is not used.
    """
    components = find_components(~mask, 4)
    holes = np.ones(components.count + 1, np.bool_)
    _border_loop(components.runs, components.owner, mask.shape[0], mask.shape[1], holes)
    return components, holes


def fill_holes(mask: NDArray[Any], max_area: float | None = None) -> NDArray[np.bool_]:
    """The mask with its holes filled: the regions of False pixels, joined by sides, that do not reach the border.

    Without ``max_area`` equal to ``scipy.ndimage.binary_fill_holes``. What lies inside a hole (an island) is no part of
    it and does not count to its area. Shared by threads.

    Args:
        mask: bool or integer (H, W), non-zero is True; may be empty.
        max_area: fill only holes of at most this many pixels; None fills all.

    Returns:
        bool (H, W).

    Raises:
        TypeError: ``mask`` is neither bool nor integer.
        ValueError: ``mask`` is not (H, W), or ``max_area`` is negative or NaN.

    Complexity: O(H·W + R·α(R)) for R horizontal runs of False.

    Source: P. Soille, "Morphological image analysis", 2nd ed. 2004, chapter 6 (holes as background that does not
    reach the border); components as in :func:`label`.
    """
    mask = as_mask(mask, "fill_holes")
    if max_area is not None and not max_area >= 0:
        raise ValueError(f"fill_holes takes a greatest area of at least 0 pixels, not {max_area}")
    components, wanted = find_holes(mask)
    if max_area is not None:
        wanted &= components.areas() <= max_area
    out = mask.copy()
    paint_components(components, wanted, out)
    return out


@compiled
def _keep_loop(
    labels: NDArray[np.int32], keys: NDArray[np.int32], kept: NDArray[np.bool_], out: NDArray[np.int32]
) -> None:
    """Fill ``out`` (N,) with the labels (N,) whose key is kept, else 0."""
    for i in range(labels.size):
        out[i] = labels[i] if kept[keys[i]] else 0


@compiled
def _first_seen_loop(labels: NDArray[np.int32], table: NDArray[np.int32], out: NDArray[np.int32]) -> None:
    """Number the labels (N,) in ``table``, zero so far, as they appear; fill ``out`` (N,) with their numbers."""
    count = 0
    for i in range(labels.size):
        value = labels[i]
        if value != 0 and table[value] == 0:
            count += 1
            table[value] = count
        out[i] = table[value]


def _as_small_labels(labels: NDArray[Any], name: str) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
    """Labels (H, W), the same or their ranks as (H·W,) for use in a table, and the greatest value of the latter.

    Ranks are taken when a label exceeds the number of pixels, for the table not to outgrow the image; 0 stays 0.
    """
    labels = as_labels(labels, name)
    flat = labels.reshape(-1)
    low, high = (int(flat.min()), int(flat.max())) if flat.size else (0, 0)
    if low < 0:
        raise ValueError(f"{name} takes labels of at least 0, not {low}")
    if high > flat.size:
        values = np.unique(flat)
        if values[0] != 0:
            values = np.insert(values, 0, 0)
        flat, high = np.searchsorted(values, flat).astype(np.int32), len(values) - 1
    return labels, flat, high


@overload
def remove_small(mask_or_labels: NDArray[np.bool_], min_area: float) -> NDArray[np.bool_]: ...
@overload
def remove_small(mask_or_labels: NDArray[Any], min_area: float) -> NDArray[np.int32]: ...
def remove_small(mask_or_labels: NDArray[Any], min_area: float) -> NDArray[Any]:
    """Remove the objects of fewer than ``min_area`` pixels.

    In a bool mask an object is what is connected by sides or corners. In an integer image it is all the pixels of a
    label, in one piece or several; the labels that stay keep their numbers (see :func:`relabel`). A mask of 0 and 255
    is therefore one object: compare it with 0 first. Masks are shared by threads.

    Args:
        mask_or_labels: bool (H, W), or integer (H, W) of at least 0, where 0 is background; may be empty.
        min_area: least number of pixels of an object that stays.

    Returns:
        bool (H, W) from a mask, int32 (H, W) from labels.

    Raises:
        TypeError: the array is neither bool nor integer.
        ValueError: the array is not (H, W), a label is negative or above 2³¹ − 1, or ``min_area`` is negative or NaN.

    Complexity: O(H·W), with one sort of the pixels more when a label exceeds their number.

    Source: components as in :func:`label`.
    """
    if not min_area >= 0:
        raise ValueError(f"remove_small takes a least area of at least 0 pixels, not {min_area}")
    if np.asarray(mask_or_labels).dtype == np.bool_:
        mask = as_mask(mask_or_labels, "remove_small")
        components = find_components(mask, 8)
        kept = np.zeros(mask.shape, np.bool_)
        paint_components(components, components.areas() >= min_area, kept)
        return kept
    labels, flat, high = _as_small_labels(mask_or_labels, "remove_small")
    large = np.bincount(flat, minlength=high + 1) >= min_area
    large[0] = False
    out = np.empty(labels.shape, np.int32)
    _keep_loop(labels.reshape(-1), flat, large, out.reshape(-1))
    return out


def relabel(labels: NDArray[Any]) -> NDArray[np.int32]:
    """Number the labels 1 … n in the raster order of their first pixels; 0 stays 0.

    Args:
        labels: bool or integer (H, W), at least 0; may be empty.

    Returns:
        int32 (H, W).

    Raises:
        TypeError: ``labels`` is neither bool nor integer.
        ValueError: ``labels`` is not (H, W), or a label is negative or above 2³¹ − 1.

    Complexity: O(H·W), with one sort of the pixels more when a label exceeds their number.

    Source: a table of the labels seen, filled in one scan.
    """
    labels, flat, high = _as_small_labels(labels, "relabel")
    out = np.empty(labels.shape, np.int32)
    _first_seen_loop(flat, np.zeros(high + 1, np.int32), out.reshape(-1))
    return out
