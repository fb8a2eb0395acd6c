"""Watershed from markers, each component of the mask for itself."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels._threads import run_parallel, thread_count
from wsi_engine.kernels.components import Components, check_connectivity, find_components, paint_components
from wsi_engine.kernels.distance import as_mask
from wsi_engine.kernels.flooding import flood_components
from wsi_engine.kernels.runs import as_labels

_SEVERAL, _NEGATIVE, _NAN = -1, -2, -3


@compiled
def _scan_loop(
    runs: NDArray[np.int32],
    first: int,
    stop: int,
    image: NDArray[Any],
    markers: NDArray[np.int32],
    found: NDArray[np.int32],
) -> None:
    """Fill ``found`` of the runs first … stop − 1 with their marker, 0 without one, _SEVERAL, or what is wrong."""
    for k in range(first, stop):
        row, line = markers[runs[k, 0], runs[k, 1] : runs[k, 2]], image[runs[k, 0], runs[k, 1] : runs[k, 2]]
        low, high, nan = np.int32(0), np.int32(0), False
        for x in range(row.size):
            low, high = min(low, row[x]), max(high, row[x])
        for x in range(row.size):
            nan |= line[x] != line[x]
        found[k] = high
        if high > 0:
            for x in range(row.size):
                if row[x] != 0 and row[x] != high:
                    found[k] = _SEVERAL
        if low < 0:
            found[k] = _NEGATIVE
        elif nan:
            found[k] = _NAN


@compiled
def _merge_loop(owner: NDArray[np.int32], found: NDArray[np.int32], only: NDArray[np.int32]) -> int:
    """Fill ``only``, zero so far, with the one marker of each component or _SEVERAL; returns what is wrong, else 0."""
    for k in range(owner.size):
        if found[k] < _SEVERAL:
            return int(found[k])
        if only[owner[k]] == 0:
            only[owner[k]] = found[k]
        elif found[k] != 0 and found[k] != only[owner[k]]:
            only[owner[k]] = _SEVERAL
    return 0


def _only_markers(components: Components, image: NDArray[Any], markers: NDArray[np.int32]) -> NDArray[np.int32]:
    """The one marker of each component, 0 without any or _SEVERAL: int32 (count + 1,)."""
    found = np.empty(len(components.owner), np.int32)
    run_parallel(_scan_loop, [(components.runs, *group, image, markers, found) for group in components.groups()])
    only = np.zeros(components.count + 1, np.int32)
    wrong = _merge_loop(components.owner, found, only)
    if wrong == _NEGATIVE:
        raise ValueError("watershed takes markers of at least 0 inside the mask, not negative ones")
    if wrong == _NAN:
        raise ValueError("watershed takes an image without NaN inside the mask")
    return only


@compiled
def _gather_loop(
    runs: NDArray[np.int32],
    owner: NDArray[np.int32],
    only: NDArray[np.int32],
    starts: NDArray[np.int64],
    out: NDArray[np.int32],
) -> None:
    """Fill ``out`` with the runs of components that hold several markers, gathered by component in raster order.

    The runs of component c begin at ``starts[c]``, which is moved to their end.
    """
    for k in range(owner.size):
        c = owner[k]
        if only[c] == _SEVERAL:
            for i in range(3):
                out[starts[c], i] = runs[k, i]
            starts[c] += 1


def _share(areas: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Components of these areas as groups (first, stop) of about equal area, a few for each thread."""
    if thread_count() == 1:
        return [(0, len(areas))]
    ends = np.cumsum(areas)
    groups = 4 * thread_count()
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, groups) // groups)
    edges = np.unique(np.concatenate([[0], cuts, [len(areas)]]))
    return [(int(a), int(b)) for a, b in itertools.pairwise(edges)]


def _flood_several(
    components: Components,
    only: NDArray[np.int32],
    image: NDArray[Any],
    markers: NDArray[np.int32],
    connectivity: int,
    out: NDArray[np.int32],
) -> None:
    """Flood the components that hold several markers."""
    chosen = np.flatnonzero(only == _SEVERAL)
    if len(chosen) == 0:
        return
    counts = np.bincount(components.owner, minlength=components.count + 1) * (only == _SEVERAL)
    begins = np.cumsum(counts) - counts
    starts = np.append(begins[chosen], counts.sum())
    runs = np.empty((int(starts[-1]), 3), np.int32)
    _gather_loop(components.runs, components.owner, only, begins, runs)
    areas = components.areas()[chosen]
    sheet = np.zeros((image.shape[0] + 2) * (image.shape[1] + 2), np.int32)  # memory only where it is written
    tasks = [
        (runs, starts[a : b + 1], int(areas[a:b].max()), image, markers, connectivity, sheet, out)
        for a, b in _share(areas)
    ]
    run_parallel(flood_components, tasks)


def watershed(
    image: NDArray[Any], markers: NDArray[Any], mask: NDArray[Any] | None = None, *, connectivity: int = 4
) -> NDArray[np.int32]:
    """Flood an image from markers: every pixel of the mask that can be reached gets the label of one of them.

    The water rises from the least value of a marker to the greatest value of the mask. At each level the pixels of that
    value that were reached are taken, first those reached first, and with them whatever lower ones they reach; each
    passes its label on to its neighbours without one, in the order up, left, right, down (then the corners). Values are
    compared exactly, as float64. The components of the mask do not know of one another: one with a single marker is
    filled without a look at the image, the others are flooded, shared by threads. The result does not depend on how
    many.

    Equal to ``skimage.segmentation.watershed`` of scikit-image 0.26 (connectivity 1 for 4, 2 for 8) but for one kind
    of tie: pixels of markers that have the same value, in one component, are taken here in raster order; there in the
    order that its heap happens to leave them in, which hangs on the rest of the image. Where no two pixels of the
    markers in a component share a value the results are the same, plateaus elsewhere included.

    Args:
        image: bool, integer or float (H, W) without NaN inside the mask; may be empty. Integers beyond 2⁵³ are rounded.
        markers: bool or integer (H, W), at least 0; 0 is no marker, and markers outside of the mask are not looked at.
        mask: bool or integer (H, W), non-zero is True; None is all True.
        connectivity: 4, labels pass by sides, or 8, by sides and corners.

    Returns:
        int32 (H, W); 0 outside of the mask and in components without marker.

    Raises:
        TypeError: the dtype of ``image``, ``markers`` or ``mask`` is none of these.
        ValueError: shapes differ or are not (H, W), a marker is negative or above 2³¹ − 1, ``image`` holds NaN inside
            the mask, or ``connectivity`` is neither 4 nor 8.

    Complexity: O(H·W), as the values are sorted by bytes and the level never falls.

    Source: F. Meyer, "Un algorithme optimal de ligne de partage des eaux", AFCET 1991 (flooding by ordered queues);
    P. Soille and M. Ansoult, "Automated basin delineation from digital elevation models using mathematical
    morphology", Signal Processing 20 (1990).
    """
    image = np.asarray(image)
    if image.dtype.kind not in "biuf":
        raise TypeError(f"watershed takes an image of bool, integers or floats, not {image.dtype}")
    if image.ndim != 2:
        raise ValueError(f"watershed takes an image of shape (H, W), not {image.shape}")
    check_connectivity(connectivity, "watershed")
    found = as_labels(markers, "watershed")
    inside = np.ones(image.shape, np.bool_) if mask is None else as_mask(mask, "watershed")
    if not image.shape == found.shape == inside.shape:
        raise ValueError(
            f"watershed takes image, markers and mask of one shape, not {image.shape}, {found.shape}, {inside.shape}"
        )
    if (image.shape[0] + 2) * (image.shape[1] + 2) > np.iinfo(np.int32).max:
        raise ValueError(f"watershed takes an image of fewer than 2³¹ pixels, border included, not {image.shape}")
    image = np.ascontiguousarray(image, np.float32 if np.can_cast(image.dtype, np.float32) else np.float64)
    out = np.zeros(image.shape, np.int32)
    components = find_components(inside, connectivity)
    only = _only_markers(components, image, found)
    paint_components(components, np.maximum(only, 0), out)
    _flood_several(components, only, image, found, connectivity, out)
    return out
