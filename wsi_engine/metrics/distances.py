"""How far the outlines of predicted nuclei lie from the true ones, in pixels; multiply by the mpp for micrometres.

Every nucleus is measured inside its own bounding box, never over the image.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from wsi_engine.errors import SettingsError
from wsi_engine.metrics.matching import match_one_to_one
from wsi_engine.metrics.overlap import Floats, Ints, Labels, Overlap, check_images, tabulate_overlap

Mask = NDArray[np.bool_]


def directed_hausdorff(true: Labels, predicted: Labels) -> float:
    """Mean over true nuclei of the farthest that one of their pixels lies from an overlapping prediction, in pixels.

    For each true nucleus t and each prediction p that overlaps it, the directed Hausdorff distance from t to t ∩ p
    (the largest distance of a pixel of t to the nearest pixel of t that p covers); of several predictions the worst
    counts. True nuclei without any overlap are left out, as in the figures "AHD" of Sahasrabudhe et al. (MICCAI
    2020), so read it beside a measure that counts misses.

    Args:
        true: integer (H, W), 0 for background.
        predicted: the same shape.

    Returns:
        0 where neither image holds a nucleus, NaN where no pair overlaps.

    Raises:
        SettingsError: the images are not integer label images of one shape.
    """
    return directed_from_overlap(true, predicted, tabulate_overlap(true, predicted))


def symmetric_hausdorff(true: Labels, predicted: Labels, percentile: float = 95.0) -> float:
    """Mean over matched pairs of the Hausdorff distance of their outlines, in pixels; at 95 % robust to single pixels.

    Pairs are those of AJI+ (one to one, largest total IoU). For each, the ``percentile`` of the distances from the
    outline of one nucleus to the nearest outline pixel of the other, in both directions; the larger of the two counts
    (Huttenlocher et al., IEEE TPAMI 1993, section 2). Outline: pixels of which a 4-neighbour is not of the nucleus.

    Args:
        true: integer (H, W), 0 for background.
        predicted: the same shape.
        percentile: above 0, at most 100; 100 is the plain Hausdorff distance.

    Returns:
        0 where neither image holds a nucleus, NaN where no pair overlaps.

    Raises:
        SettingsError: the images are not integer label images of one shape, or the percentile is out of range.
    """
    if not 0 < percentile <= 100:
        raise SettingsError(f"the percentile of a Hausdorff distance must be above 0 and at most 100, not {percentile}")
    table = tabulate_overlap(true, predicted)
    return symmetric_from_overlap(true, predicted, table, match_one_to_one(table), percentile)


def directed_from_overlap(true: Labels, predicted: Labels, table: Overlap) -> float:
    """:func:`directed_hausdorff` where the table of overlaps is already there."""
    if not len(table.shared):
        return 0.0 if table.empty else float("nan")
    true, predicted = check_images(true, predicted)
    worst = np.zeros(len(table.true))
    # A prediction that covers all of a nucleus is at distance 0.
    for pair in np.flatnonzero(table.shared < table.true.areas[table.true_rows]):
        row, other = table.true_rows[pair], table.predicted_rows[pair]
        top, left, bottom, right = table.true.boxes[row]
        nucleus = true[top:bottom, left:right] == table.true.ids[row]
        covered = nucleus & (predicted[top:bottom, left:right] == table.predicted.ids[other])
        farthest = _distance_to(covered)[nucleus].max()
        worst[row] = max(worst[row], farthest)
    return float(worst[np.unique(table.true_rows)].mean())


def symmetric_from_overlap(true: Labels, predicted: Labels, table: Overlap, pairs: Ints, percentile: float) -> float:
    """:func:`symmetric_hausdorff` where the table and its matched pairs, rows of the table, are already there."""
    if not len(pairs):
        return 0.0 if table.empty else float("nan")
    true, predicted = check_images(true, predicted)
    distances = np.zeros(len(pairs))
    for k, pair in enumerate(pairs):
        row, other = table.true_rows[pair], table.predicted_rows[pair]
        one, two = table.true.boxes[row], table.predicted.boxes[other]
        (top, left), (bottom, right) = np.minimum(one, two)[:2], np.maximum(one, two)[2:]
        a = _outline(true[top:bottom, left:right] == table.true.ids[row])
        b = _outline(predicted[top:bottom, left:right] == table.predicted.ids[other])
        there, back = _distance_to(b)[a], _distance_to(a)[b]
        distances[k] = max(np.percentile(there, percentile), np.percentile(back, percentile))
    return float(distances.mean())


def _distance_to(mask: Mask) -> Floats:
    """Euclidean distance of every pixel to the nearest one of ``mask``, which must hold one."""
    distance: Floats = distance_transform_edt(~mask)
    return distance


def _outline(mask: Mask) -> Mask:
    """Pixels of the mask of which a 4-neighbour is not; what lies beyond the array is not."""
    inner = np.zeros_like(mask)
    inner[1:-1, 1:-1] = mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    outer: Mask = mask & ~inner
    return outer
