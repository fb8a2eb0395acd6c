"""How maps become nuclei: the split along runs against plain NumPy on whole images, and sheets."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from wsi_engine.kernels import fill_holes, gaussian, h_maxima, label, remove_small, watershed
from wsi_engine.kernels.components import find_components
from wsi_engine.kernels.openings import open_labels
from wsi_engine.kernels.sorting import sort_packed
from wsi_engine.kernels.tallies import drop_small, mark_owners, renumber_labels, tally_labels
from wsi_engine.kernels.texts import format_rings
from wsi_engine.nuclei.sheets import _Sheet
from wsi_engine.nuclei.student_inference import SplitSettings, split_nuclei

Floats = NDArray[np.float32]


def split_plainly(maps: Floats, mpp: float, settings: SplitSettings, largest_hole_um2: float) -> NDArray[np.int32]:
    """The same nuclei by steps over the whole image."""
    mask = maps[0] > settings.threshold
    wide = fill_holes(mask) & ~fill_holes(mask, largest_hole_um2 / mpp**2)
    filled = fill_holes(mask)
    depth = np.where(filled, gaussian(maps[1], settings.sigma_um / mpp), np.float32(0))
    summits = h_maxima(depth, settings.rise) & filled
    whole = label(filled)
    bare = np.bincount(whole[summits], minlength=int(whole.max()) + 1) == 0
    bare[0] = False
    labels = watershed(-depth, label(summits | bare[whole]), filled)
    labels[wide] = 0
    open_labels(labels, find_components(labels > 0, 8).runs, settings.opening)
    sizes = np.bincount(labels.ravel())
    scores = np.bincount(labels.ravel(), maps[0].ravel()) / np.maximum(sizes, 1)
    kept = (scores >= settings.least_score) & (sizes >= settings.least_area_um2 / mpp**2)
    kept[0] = False
    labels = np.where(kept, np.arange(len(kept)), 0)[labels].astype(np.int32)
    return np.searchsorted(np.unique(np.append(labels, 0)), labels).astype(np.int32)


def make_maps(seed: int, shape: tuple[int, int] = (300, 260)) -> Floats:
    """Blobs that touch, some of them with lumens, some doubtful."""
    rng = np.random.default_rng(seed)
    coarse, fine = (ndimage.gaussian_filter(rng.normal(size=shape), sigma) for sigma in (6, 2.5))
    field = coarse / coarse.std() + 0.35 * fine / fine.std()
    field[100:180, 100:170] = 1.5
    field[120:160, 115:150] = -1  # a lumen
    probability = 1 / (1 + np.exp(-3 * field))
    depth = ndimage.gaussian_filter(np.maximum(field, -0.2), 1.5)
    return np.stack([probability, depth]).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("largest_hole_um2", [25.0, np.inf])
def test_the_split_is_that_of_plain_steps(seed: int, largest_hole_um2: float) -> None:
    maps, settings = make_maps(seed), SplitSettings()
    before = maps.copy()
    found = split_nuclei(maps, 0.25, settings, largest_hole_um2=largest_hole_um2)
    assert found.max() > 15
    assert np.array_equal(found, split_plainly(maps, 0.25, settings, largest_hole_um2))
    assert np.array_equal(maps, before)
    given = split_nuclei(maps, 0.25, settings, maps[0] > settings.threshold, largest_hole_um2)
    assert np.array_equal(given, found)


def test_holes_are_filled_or_emptied() -> None:
    maps, settings = make_maps(0), SplitSettings(least_score=0, opening=0)
    filled, emptied = (split_nuclei(maps, 0.25, settings, largest_hole_um2=most) for most in (np.inf, 25.0))
    assert (filled[125:155, 120:145] > 0).all()
    assert not (emptied[125:155, 120:145] > 0).any()


def test_labels_are_counted_along_runs() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 6, (50, 70)).repeat(3, axis=1).astype(np.int32)
    mask = ndimage.gaussian_filter(rng.normal(size=labels.shape), 2) > 0
    values = rng.random(labels.shape).astype(np.float32)
    found = find_components(mask, 8)
    sizes, totals = np.zeros(6, np.int64), np.zeros(6)
    tally_labels(found.runs, labels, values, sizes, totals)
    assert np.array_equal(sizes, np.bincount(labels[mask], minlength=6))
    assert np.array_equal(totals, np.bincount(labels[mask], values[mask], minlength=6))  # to the last bit
    renumbered = labels.copy()
    renumber_labels(found.runs, np.array([0, 5, 4, 3, 2, 1], np.int32), renumbered)
    assert np.array_equal(renumbered, np.where(mask, (6 - labels) % 6, labels))
    marks = np.zeros(mask.shape, bool)
    marks[10:20, 30:60] = True
    seen = np.zeros(found.count + 1, bool)
    mark_owners(found.runs, found.owner, marks, seen)
    assert np.array_equal(np.flatnonzero(seen), np.unique(ndimage.label(mask, np.ones((3, 3)))[0][mask & marks]))


def test_small_labels_are_dropped() -> None:
    rng = np.random.default_rng(2)
    mask = ndimage.gaussian_filter(rng.normal(size=(80, 90)), 1.5) > 0.1
    labels = label(mask)
    expected = remove_small(labels, 20)
    drop_small(labels, mask, 20)
    assert 0 < len(np.unique(expected)) < len(np.unique(label(mask)))
    assert np.array_equal(labels, expected)


def test_a_pixel_on_a_sheet_is_found_in_its_box() -> None:
    rng = np.random.default_rng(3)
    sizes, corners = rng.integers(1, 300, (200, 2)), rng.integers(0, 10_000, (200, 2))
    sheet = _Sheet.lay(np.concatenate([corners, corners + sizes], axis=1), 7)
    inside = sheet.places + (rng.random((200, 2)) * sizes).astype(np.int64)
    assert np.array_equal(sheet.find(inside[:, 0], inside[:, 1]), np.arange(200))
    assert np.array_equal(sheet.places - sheet.shifts, corners)
    assert (sheet.places + sizes + 7 <= [sheet.height, sheet.width]).all()


@pytest.mark.parametrize("count", [1, 7, 500, 5000])  # from 2048 on by larger digits
@pytest.mark.parametrize("span", [1, 200, 1 << 18, 1 << 32])
def test_packed_words_are_sorted_stably_by_their_upper_half(count: int, span: int) -> None:
    rng = np.random.default_rng(6)
    keys = rng.integers(0, span, count).astype(np.uint64) + np.uint64(0 if span == 1 << 32 else 12_345)
    items = np.zeros((2, count), np.uint64)
    items[0] = (keys << np.uint64(32)) | rng.permutation(count).astype(np.uint64)
    expected = items[0][np.argsort(keys, kind="stable")] - (keys.min() << np.uint64(32))
    found = items[sort_packed(items, count)]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("scale", [1, 1e3, 1e9])
@pytest.mark.parametrize("least", [0, -0.5])
def test_rings_are_written_as_json_does(scale: float, least: float) -> None:
    rng = np.random.default_rng(5)
    points = (rng.random((2000, 2)) + least) * scale
    points[:50], points[50:100] = np.round(points[:50]), np.round(points[50:100], 1)
    points[100:103] = [[-0.001, 0.004], [-0.0, 0.0], [0.005, 0.015]]
    offsets = np.concatenate([[0], np.sort(rng.choice(np.arange(1, 2000), 300, replace=False)), [2000]])
    bounds = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    rounded = np.round(points, 2)
    expected = [json.dumps([*rounded[a:b].tolist(), rounded[a].tolist()], separators=(",", ":")) for a, b in bounds]
    assert format_rings(offsets, points) == expected
    whole = np.round(points).astype(np.int64)
    expected = [json.dumps([*whole[a:b].tolist(), whole[a].tolist()], separators=(",", ":")) for a, b in bounds]
    assert format_rings(offsets, np.round(points), whole=True) == expected
    assert format_rings(np.zeros(1, np.int64), np.zeros((0, 2))) == []


@pytest.mark.parametrize("offsets", [[0, 4], [1, 3], [0, 0, 3], [0, 2], [0, 4, 3]])
def test_rings_that_are_none_are_refused(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="offsets"):
        format_rings(np.array(offsets), np.zeros((3, 2)))
    for value in (np.nan, np.inf, 1e14):
        with pytest.raises(ValueError, match="finite"):
            format_rings(np.array([0, 3]), np.full((3, 2), value))
