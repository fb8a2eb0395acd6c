"""Nuclei metrics against golden numbers, against per-object masks in plain loops, and by their properties."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

import wsi_engine as we
from wsi_engine.errors import SettingsError
from wsi_engine.metrics.matching import match_one_to_one
from wsi_engine.metrics.overlap import tabulate_overlap

SMALL = st_numpy.arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 5))
PAIRS = SMALL.flatmap(
    lambda true: st.tuples(st.just(true), st_numpy.arrays(np.int32, true.shape, elements=st.integers(0, 5)))
)


def ellipses(seed: int, side: int, step: int, shift: float = 0.0) -> np.ndarray:
    """A label image of jittered ellipses on a lattice, int32 (side, side); ``shift`` moves and drops some of them."""
    place, noise = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    out = np.zeros((side, side), np.int32)
    number = 0
    for y in range(step // 2, side, step):
        for x in range(step // 2, side, step):
            jitter, axes = place.uniform(-3, 3, 2), place.uniform(0.3, 0.55, 2) * step
            jitter, axes = jitter + shift * noise.normal(size=2), axes * (1 + 0.05 * shift * noise.normal(size=2))
            if noise.random() < 0.03 * shift:
                continue
            number += 1
            top, left = max(0, y - step), max(0, x - step)
            rows, columns = np.mgrid[top : min(side, y + step), left : min(side, x + step)]
            inside = ((rows - y - jitter[0]) / axes[0]) ** 2 + ((columns - x - jitter[1]) / axes[1]) ** 2 <= 1
            out[top : y + step, left : x + step][inside] = number
    return out


def masks(labels: np.ndarray) -> list[np.ndarray]:
    return [labels == number for number in np.unique(labels) if number]


def plain_ious(true: list[np.ndarray], predicted: list[np.ndarray]) -> np.ndarray:
    return np.array([[(t & p).sum() / (t | p).sum() for p in predicted] for t in true]).reshape(
        len(true), len(predicted)
    )


def plain_aji(true_image: np.ndarray, predicted_image: np.ndarray, one_to_one: bool = False) -> float:
    true, predicted = masks(true_image), masks(predicted_image)
    if not true and not predicted:
        return 1.0
    ious = plain_ious(true, predicted)
    if one_to_one:
        pairs = [(t, p) for t, p in zip(*linear_sum_assignment(-ious), strict=True) if ious[t, p] > 0]
    else:
        pairs = [(t, int(row.argmax())) for t, row in enumerate(ious) if len(row) and row.max() > 0]
    above = sum(int((true[t] & predicted[p]).sum()) for t, p in pairs)
    below = sum(int((true[t] | predicted[p]).sum()) for t, p in pairs)
    below += sum(int(t.sum()) for k, t in enumerate(true) if k not in {t for t, _ in pairs})
    below += sum(int(p.sum()) for k, p in enumerate(predicted) if k not in {p for _, p in pairs})
    return above / below


def plain_quality(true_image: np.ndarray, predicted_image: np.ndarray) -> tuple[float, float, float]:
    true, predicted = masks(true_image), masks(predicted_image)
    if not true and not predicted:
        return 1.0, 1.0, 1.0
    hits = [iou for row in plain_ious(true, predicted) for iou in row if iou > 0.5]
    missed, invented = len(true) - len(hits), len(predicted) - len(hits)
    dq = len(hits) / (len(hits) + missed / 2 + invented / 2)
    sq = sum(hits) / len(hits) if hits else 0.0
    return dq, sq, dq * sq


def plain_dice2(true_image: np.ndarray, predicted_image: np.ndarray) -> float:
    true, predicted = masks(true_image), masks(predicted_image)
    touching = [(t, p) for t in true for p in predicted if (t & p).any()]
    if not touching:
        return 0.0 if true or predicted else 1.0
    return sum(2 * int((t & p).sum()) for t, p in touching) / sum(int(t.sum() + p.sum()) for t, p in touching)


def plain_directed(true_image: np.ndarray, predicted_image: np.ndarray) -> float:
    true, predicted = masks(true_image), masks(predicted_image)
    if not true and not predicted:
        return 0.0
    worst = []
    for t in true:
        parts = [t & p for p in predicted if (t & p).any()]
        if parts:
            worst.append(max(cdist(np.argwhere(t), np.argwhere(part)).min(axis=1).max() for part in parts))
    return float(np.mean(worst)) if worst else math.nan


def plain_outline(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    points = np.argwhere(mask)
    steps = ((0, 1), (1, 0), (0, -1), (-1, 0))
    return np.array([q for q in points if not all(padded[q[0] + 1 + a, q[1] + 1 + b] for a, b in steps)])


def plain_symmetric(true_image: np.ndarray, predicted_image: np.ndarray, percentile: float) -> float:
    true, predicted = masks(true_image), masks(predicted_image)
    if not true and not predicted:
        return 0.0
    ious = plain_ious(true, predicted)
    found = []
    for t, p in zip(*linear_sum_assignment(-ious), strict=True):
        if ious[t, p] > 0:
            apart = cdist(plain_outline(true[t]), plain_outline(predicted[p]))
            found.append(max(np.percentile(apart.min(axis=k), percentile) for k in (0, 1)))
    return float(np.mean(found)) if found else math.nan


@pytest.mark.parametrize("name", ["a", "b"])
def test_golden_numbers(shared_data: Path, name: str) -> None:
    path = shared_data.parent / "golden" / f"nuclei_metrics_{name}.npz"
    if not path.exists():
        pytest.skip(f"needs {path}")
    golden = np.load(path)
    found = we.metrics.score_nuclei(golden["true"], golden["pred"])
    names = {"dice": "dice1", "directed_hausdorff": "ahd_directed_max"}
    for key in ("aji", "aji_plus", "dq", "sq", "pq", "dice", "dice2", "directed_hausdorff"):
        assert getattr(found, key) == pytest.approx(float(golden[names.get(key, key)]), abs=1e-6), key


@settings(max_examples=150, deadline=None, derandomize=True)
@given(PAIRS)
def test_metrics_equal_plain_loops_over_masks(images: tuple[np.ndarray, np.ndarray]) -> None:
    true, predicted = images
    metrics = we.metrics
    assert metrics.aji(true, predicted) == pytest.approx(plain_aji(true, predicted), abs=1e-12)
    assert metrics.panoptic_quality(true, predicted) == pytest.approx(plain_quality(true, predicted), abs=1e-12)
    assert metrics.dice2(true, predicted) == pytest.approx(plain_dice2(true, predicted), abs=1e-12)
    directed = metrics.directed_hausdorff(true, predicted)
    assert directed == pytest.approx(plain_directed(true, predicted), abs=1e-9, nan_ok=True)
    foreground = int((true > 0).sum() + (predicted > 0).sum())
    shared = int(((true > 0) & (predicted > 0)).sum())
    assert metrics.dice(true, predicted) == pytest.approx(2 * shared / foreground if foreground else 1.0)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(PAIRS)
def test_matching_is_one_to_one_and_as_good_as_the_dense_assignment(images: tuple[np.ndarray, np.ndarray]) -> None:
    # Of several best matchings any may be taken, so that the total IoU is compared and not the pairs.
    table = tabulate_overlap(*images)
    pairs = match_one_to_one(table)
    assert len(set(table.true_rows[pairs])) == len(set(table.predicted_rows[pairs])) == len(pairs)
    ious = plain_ious(*map(masks, images))
    rows, columns = linear_sum_assignment(-ious)
    assert table.ious[pairs].sum() == pytest.approx(ious[rows, columns].sum(), abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_matched_metrics_equal_plain_loops_on_ellipses(seed: int) -> None:
    true, predicted = ellipses(seed, 96, 16), ellipses(seed, 96, 16, shift=2.5)
    metrics = we.metrics
    assert 0.1 < metrics.aji_plus(true, predicted) <= 0.95
    assert metrics.aji_plus(true, predicted) == pytest.approx(plain_aji(true, predicted, one_to_one=True), abs=1e-12)
    for percentile in (50.0, 95.0, 100.0):
        found = metrics.symmetric_hausdorff(true, predicted, percentile)
        assert found == pytest.approx(plain_symmetric(true, predicted, percentile), abs=1e-9)


def test_all_scores_at_once_equal_one_by_one() -> None:
    true, predicted = ellipses(5, 160, 20), ellipses(5, 160, 20, shift=2)
    metrics, found = we.metrics, we.metrics.score_nuclei(true, predicted)
    assert (found.dq, found.sq, found.pq) == metrics.panoptic_quality(true, predicted)
    for name in ("aji", "aji_plus", "dice", "dice2", "directed_hausdorff"):
        assert getattr(found, name) == getattr(metrics, name)(true, predicted), name
    assert found.hausdorff_95 == metrics.symmetric_hausdorff(true, predicted)
    assert found.true_count == len(masks(true))
    assert found.predicted_count == len(masks(predicted))
    assert found.matched == round(found.dq * (found.true_count + found.predicted_count) / 2)


def test_worked_example() -> None:
    # One true nucleus of 8 pixels is split into halves; another, of 2, is missed; a third prediction is invented.
    true = np.array([[1, 1, 1, 1, 0, 2], [1, 1, 1, 1, 0, 2], [0, 0, 0, 0, 0, 0]])
    predicted = np.array([[7, 7, 9, 9, 0, 0], [7, 7, 9, 9, 0, 0], [0, 0, 0, 3, 3, 3]])
    metrics = we.metrics
    # The first half, id 7, is taken: 4 shared; 8 joined, 2 missed, 4 and 3 never taken.
    assert metrics.aji(true, predicted) == metrics.aji_plus(true, predicted) == 4 / (8 + 2 + 4 + 3)
    assert metrics.panoptic_quality(true, predicted) == (0, 0, 0)  # an IoU of exactly 0.5 is not above 0.5
    assert metrics.dice(true, predicted) == 2 * 8 / (10 + 11)
    assert metrics.dice2(true, predicted) == 2 * 8 / (2 * (8 + 4))
    assert metrics.directed_hausdorff(true, predicted) == 2


def test_one_prediction_may_serve_several_true_nuclei_only_in_plain_aji() -> None:
    true = np.array([[1, 1, 1, 2, 2, 0]])
    predicted = np.array([[4, 4, 4, 4, 4, 4]])
    assert we.metrics.aji(true, predicted) == (3 + 2) / (6 + 6)
    assert we.metrics.aji_plus(true, predicted) == 3 / (6 + 2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(PAIRS, st.integers(0, 2**32))
def test_ids_do_not_matter(images: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    """Ids of any size, gaps and types give the same scores; ascending, as the lowest id wins a tie."""
    rng = np.random.default_rng(seed)
    renamed = []
    for image, dtype in zip(images, (np.uint64, np.int64), strict=True):
        ids = np.sort(rng.choice(2**40, 6, replace=False).astype(np.uint64) * 2**20 + 1)
        ids[0] = 0
        renamed.append(ids.astype(dtype)[image])
    assert_same(we.metrics.score_nuclei(*renamed), we.metrics.score_nuclei(*images))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(PAIRS)
def test_scores_do_not_depend_on_orientation_or_memory(images: tuple[np.ndarray, np.ndarray]) -> None:
    true, predicted = images
    found = we.metrics.score_nuclei(true, predicted)
    assert_same(we.metrics.score_nuclei(true.T, predicted.T), found, but=("hausdorff_95",))
    assert_same(we.metrics.score_nuclei(true[::-1, ::-1], predicted[::-1, ::-1]), found, but=("hausdorff_95",))
    assert_same(we.metrics.score_nuclei(np.asfortranarray(true), predicted.astype(np.uint8)), found)
    for name in ("aji", "aji_plus", "dq", "sq", "pq", "dice", "dice2"):
        assert 0 <= getattr(found, name) <= 1


def assert_same(one: we.metrics.NucleiScores, two: we.metrics.NucleiScores, but: tuple[str, ...] = ()) -> None:
    for field in dataclasses.fields(one):
        if field.name not in but:
            expected = pytest.approx(getattr(two, field.name), abs=1e-12, nan_ok=True)
            assert getattr(one, field.name) == expected, field.name


@pytest.mark.parametrize("shape", [(8, 9), (0, 0), (0, 5), (5, 0)])
def test_two_images_without_nuclei_agree(shape: tuple[int, int]) -> None:
    nothing = np.zeros(shape, np.int32)
    found = we.metrics.score_nuclei(nothing, nothing)
    assert dataclasses.astuple(found) == (1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0)


def test_one_image_without_nuclei_scores_nothing() -> None:
    nothing, something = np.zeros((6, 6), np.int32), np.zeros((6, 6), np.int32)
    something[2:4, 2:4] = 3
    for images in ((nothing, something), (something, nothing)):
        found = we.metrics.score_nuclei(*images)
        assert (found.aji, found.aji_plus, found.dq, found.sq, found.pq, found.dice, found.dice2) == (0,) * 7
        assert math.isnan(found.directed_hausdorff)
        assert math.isnan(found.hausdorff_95)


def test_an_image_agrees_with_itself() -> None:
    image = ellipses(1, 120, 14)
    found = we.metrics.score_nuclei(image, image)
    count = len(masks(image))
    assert dataclasses.astuple(found) == (1, 1, 1, 1, 1, 1, 1, 0, 0, count, count, count)


def test_a_mask_is_one_object() -> None:
    image = ellipses(1, 60, 20)
    assert we.metrics.aji(image > 0, (image > 0).astype(np.uint8)) == 1
    assert we.metrics.score_nuclei(image > 0, image).true_count == 1


def test_objects_in_several_pieces_and_their_boxes() -> None:
    image = np.zeros((6, 7), np.int64)
    image[0, 1:3], image[5, 4], image[3, 0] = 12, 12, 40
    table = tabulate_overlap(image, image)
    assert table.true.ids.tolist() == [12, 40]
    assert table.true.areas.tolist() == [3, 1]
    assert table.true.boxes.tolist() == [[0, 1, 6, 5], [3, 0, 4, 1]]


@pytest.mark.parametrize(
    ("true", "predicted", "message"),
    [
        (np.zeros((4, 4), int), np.zeros((4, 5), int), r"differ in shape.*\(4, 4\).*\(4, 5\)"),
        (np.zeros((4, 4)), np.zeros((4, 4), int), "true label image must be integers.*float64"),
        (np.zeros((4, 4), int), np.zeros((4, 4, 1), int), "predicted label image must be integers"),
        (np.zeros((4, 4), int), np.full((4, 4), -1), "negative label -1"),
    ],
)
def test_bad_images_are_answered_in_a_sentence(true: np.ndarray, predicted: np.ndarray, message: str) -> None:
    for function in (we.metrics.aji, we.metrics.score_nuclei, we.metrics.directed_hausdorff):
        with pytest.raises(SettingsError, match=message):
            function(true, predicted)


def test_bad_settings_are_answered_in_a_sentence() -> None:
    image = np.zeros((3, 3), int)
    with pytest.raises(SettingsError, match="threshold of panoptic quality"):
        we.metrics.panoptic_quality(image, image, threshold=0.3)
    with pytest.raises(SettingsError, match="percentile"):
        we.metrics.symmetric_hausdorff(image, image, 0)
