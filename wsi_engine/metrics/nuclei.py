"""How well predicted nuclei agree with true ones: AJI, AJI+, panoptic quality, Dice, and all of them at once.

Label ids are any positive integers. One rule holds for images without nuclei: where neither image holds one, the
agreement is perfect (1, and distance 0); where only one of them does, it is 0 (and distances are undefined, NaN).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wsi_engine.errors import SettingsError
from wsi_engine.metrics.distances import directed_from_overlap, symmetric_from_overlap
from wsi_engine.metrics.matching import best_partners, match_one_to_one
from wsi_engine.metrics.overlap import Ints, Labels, Overlap, tabulate_overlap


@dataclass(frozen=True)
class NucleiScores:
    """Agreement of one predicted label image with the truth; distances in pixels.

    Attributes:
        aji: aggregated Jaccard index, :func:`aji`.
        aji_plus: the same with one-to-one matching, :func:`aji_plus`.
        dq, sq, pq: detection, segmentation and panoptic quality, :func:`panoptic_quality`.
        dice: overlap of the foregrounds, :func:`dice`.
        dice2: overlap over all pairs that touch, :func:`dice2`.
        directed_hausdorff: :func:`~wsi_engine.metrics.distances.directed_hausdorff`.
        hausdorff_95: :func:`~wsi_engine.metrics.distances.symmetric_hausdorff` at 95 %.
        true_count, predicted_count: objects in each image.
        matched: true positives at IoU above 0.5.
    """

    aji: float
    aji_plus: float
    dq: float
    sq: float
    pq: float
    dice: float
    dice2: float
    directed_hausdorff: float
    hausdorff_95: float
    true_count: int
    predicted_count: int
    matched: int


def score_nuclei(true: Labels, predicted: Labels) -> NucleiScores:
    """Every nuclei metric of two label images, integer (H, W) of one shape, from one table of overlaps.

    Raises:
        SettingsError: the images are not integer label images of one shape.
    """
    table = tabulate_overlap(true, predicted)
    partners = match_one_to_one(table)
    dq, sq, pq = _quality(table, 0.5)
    return NucleiScores(
        aji=_aggregate(table, best_partners(table)),
        aji_plus=_aggregate(table, partners),
        dq=dq,
        sq=sq,
        pq=pq,
        dice=_foreground_dice(table),
        dice2=_pair_dice(table),
        directed_hausdorff=directed_from_overlap(true, predicted, table),
        hausdorff_95=symmetric_from_overlap(true, predicted, table, partners, 95.0),
        true_count=len(table.true),
        predicted_count=len(table.predicted),
        matched=int(np.count_nonzero(table.ious > 0.5)),
    )


def aji(true: Labels, predicted: Labels) -> float:
    """Aggregated Jaccard index, within 0–1 (Kumar et al., IEEE TMI 2017, algorithm 1).

    Each true nucleus takes the predicted one of highest IoU, of equal ones that of the lowest id; one prediction may
    serve several. The index is the sum of intersections over the sum of unions plus the areas of true nuclei without
    any partner and of predictions that were never taken.

    Args:
        true: integer (H, W), 0 for background.
        predicted: the same shape.

    Returns:
        1 where neither image holds a nucleus, 0 where only one does.

    Raises:
        SettingsError: the images are not integer label images of one shape.
    """
    table = tabulate_overlap(true, predicted)
    return _aggregate(table, best_partners(table))


def aji_plus(true: Labels, predicted: Labels) -> float:
    """:func:`aji` with one-to-one matching of the largest total IoU (Graham et al., Medical Image Analysis 2019)."""
    table = tabulate_overlap(true, predicted)
    return _aggregate(table, match_one_to_one(table))


def panoptic_quality(true: Labels, predicted: Labels, threshold: float = 0.5) -> tuple[float, float, float]:
    """Detection, segmentation and panoptic quality (Kirillov et al., CVPR 2019, equation 1).

    A pair whose IoU is above ``threshold`` is a true positive. DQ = TP / (TP + FP / 2 + FN / 2), SQ is the mean IoU
    of the true positives, PQ = DQ · SQ.

    Args:
        true: integer (H, W), 0 for background.
        predicted: the same shape.
        threshold: at least 0.5, so that no nucleus can have two partners; below 1.

    Returns:
        (dq, sq, pq); all 1 where neither image holds a nucleus, all 0 where there is no true positive.

    Raises:
        SettingsError: the images are not integer label images of one shape, or the threshold is out of range.
    """
    if not 0.5 <= threshold < 1:
        raise SettingsError(f"the IoU threshold of panoptic quality must be within 0.5–1, not {threshold}")
    return _quality(tabulate_overlap(true, predicted), threshold)


def dice(true: Labels, predicted: Labels) -> float:
    """Dice coefficient of the two foregrounds, instances ignored (Dice, Ecology 1945); also called Dice 1."""
    return _foreground_dice(tabulate_overlap(true, predicted))


def dice2(true: Labels, predicted: Labels) -> float:
    """Dice over all overlapping pairs: Σ 2·|t ∩ p| / Σ (|t| + |p|) (Vu et al., Frontiers 2019, ensemble Dice).

    A nucleus counts once for each partner it touches, one without a partner does not count: splits and merges weigh
    heavily, misses do not weigh at all. 1 where neither image holds a nucleus, 0 where no pair overlaps.
    """
    return _pair_dice(tabulate_overlap(true, predicted))


def _aggregate(table: Overlap, pairs: Ints) -> float:
    """Σ intersections / (Σ unions + areas of all objects that no pair holds)."""
    if table.empty:
        return 1.0
    true_left, predicted_left = table.true.areas.copy(), table.predicted.areas.copy()
    true_left[table.true_rows[pairs]] = 0
    predicted_left[table.predicted_rows[pairs]] = 0
    below = int(table.unions[pairs].sum() + true_left.sum() + predicted_left.sum())
    return int(table.shared[pairs].sum()) / below


def _quality(table: Overlap, threshold: float) -> tuple[float, float, float]:
    if table.empty:
        return 1.0, 1.0, 1.0
    hits = table.ious[table.ious > threshold]
    dq = len(hits) / ((len(table.true) + len(table.predicted)) / 2)  # TP + FP / 2 + FN / 2
    sq = float(hits.mean()) if len(hits) else 0.0
    return dq, sq, dq * sq


def _foreground_dice(table: Overlap) -> float:
    if table.empty:
        return 1.0
    return 2 * int(table.shared.sum()) / int(table.true.areas.sum() + table.predicted.areas.sum())


def _pair_dice(table: Overlap) -> float:
    if table.empty:
        return 1.0
    if not len(table.shared):
        return 0.0
    below = table.true.areas[table.true_rows].sum() + table.predicted.areas[table.predicted_rows].sum()
    return 2 * int(table.shared.sum()) / int(below)
