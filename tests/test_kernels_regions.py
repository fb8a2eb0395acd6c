"""Region measurements against scikit-image, property by property, and against plain NumPy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from skimage.draw import disk
from skimage.measure import regionprops_table
from skimage.morphology import convex_hull_image

from wsi_engine.kernels._threads import set_thread_count
from wsi_engine.kernels.regions import RegionTable, measure_regions
from wsi_engine.synthetic import SlideSpec, SyntheticSlide

NAMES = {
    "area": "area",
    "axis_major": "axis_major_length",
    "axis_minor": "axis_minor_length",
    "eccentricity": "eccentricity",
    "perimeter": "perimeter",
    "area_convex": "area_convex",
    "solidity": "solidity",
    "equivalent_diameter": "equivalent_diameter_area",
}
EXACT = {"area", "area_convex"}


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    set_thread_count(None)


def nuclei() -> np.ndarray:
    slide = SyntheticSlide(SlideSpec(width=2048, height=2048, mpp=0.5, coverage=1))
    return slide.truth.labels(700, 700, 500, 400).astype(np.int32)


def images() -> dict[str, np.ndarray]:
    """Label images of many kinds."""
    rng = np.random.default_rng(3)
    borders = np.zeros((12, 15), np.int32)
    borders[0, 3:6], borders[-1, 2:9], borders[4:8, 0], borders[2:11, -1] = 1, 2, 3, 4
    nested = np.zeros((17, 17), np.int32)
    for depth in range(8):
        nested[depth : 17 - depth, depth : 17 - depth] = depth % 3
    grown = np.kron(rng.integers(0, 6, (9, 11)), np.ones((4, 4), np.int32)).astype(np.int32)
    return {
        "nuclei": nuclei(),
        "one pixel": np.ones((1, 1), np.int32),
        "full": np.full((7, 11), 5, np.int32),
        "one row": np.array([[0, 2, 2, 0, 2, 7, 7, 7, 0]], np.int32),
        "one column": np.array([[0, 2, 2, 0, 2, 7, 7, 7, 0]], np.int32).T,
        "diagonal": np.eye(9, dtype=np.int32) * 3,
        "other diagonal": np.eye(9, 12, dtype=np.int32)[:, ::-1],
        "borders": borders,
        "nested": nested,
        "grown": grown,
        "noise": rng.integers(0, 4, (40, 33)).astype(np.int32),
        "sparse": (rng.random((31, 44)) < 0.02).astype(np.int32),
        "bytes": rng.integers(0, 3, (20, 21)).astype(np.uint8),
        "mask": rng.random((20, 21)) < 0.4,
        "large ids": grown.astype(np.int64) * 300_000_007,
    }


IMAGES = images()


def assert_equals_scikit_image(labels: np.ndarray, table: RegionTable) -> None:
    present = np.unique(labels[labels > 0])
    numbered = np.searchsorted(present, labels, side="right")  # scikit-image has no memory for large labels
    expected = regionprops_table(numbered, properties=("bbox", "centroid", "orientation", *NAMES.values()))
    np.testing.assert_array_equal(table.label, present)
    np.testing.assert_array_equal(table.bbox, np.stack([expected[f"bbox-{k}"] for k in range(4)], axis=1))
    centroid = np.stack([expected[f"centroid-{k}"] for k in range(2)], axis=1)
    np.testing.assert_allclose(table.centroid, centroid, rtol=1e-12, atol=1e-12)
    for ours, theirs in NAMES.items():
        # The short axis of a line is a root of what rounding leaves of 0, and so is 1 − eccentricity of a disk.
        rtol, atol = (0, 0) if ours in EXACT else (1e-9, 2e-6)
        np.testing.assert_allclose(getattr(table, ours), expected[theirs], rtol=rtol, atol=atol, err_msg=ours)
    gap = np.abs(table.orientation - expected["orientation"])
    gap = np.minimum(gap, np.abs(gap - np.pi))  # −π/2 and π/2 are one direction
    uneven = table.axis_major - table.axis_minor > 1e-6
    np.testing.assert_allclose(gap[uneven], 0, atol=1e-7)


@pytest.mark.parametrize("kind", IMAGES)
def test_shapes_equal_scikit_image(kind: str) -> None:
    labels = IMAGES[kind]
    before = labels.copy()
    assert_equals_scikit_image(labels, measure_regions(labels))
    np.testing.assert_array_equal(labels, before)


@settings(max_examples=40, deadline=None)
@given(st_numpy.arrays(np.int32, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 3)))
def test_shapes_of_any_labels_equal_scikit_image(labels: np.ndarray) -> None:
    assert_equals_scikit_image(labels, measure_regions(labels))


def test_shapes_of_the_golden_labels_equal_scikit_image(shared_data: Path) -> None:
    golden = shared_data.parent / "golden" / "nuclei_postprocess.npz"
    if not golden.exists():
        pytest.skip(f"needs {golden}")
    labels = np.load(golden)["labels"]
    labels = labels[: labels.shape[0] // 2, : labels.shape[1] // 2]
    assert_equals_scikit_image(labels, measure_regions(labels))


def test_convex_area_of_a_concave_region_counts_its_hull() -> None:
    labels = np.zeros((40, 50), np.int32)
    labels[5:35, 10:14] = labels[30:35, 10:44] = labels[8, 40] = 1
    table = measure_regions(labels)
    assert table.area_convex[0] == convex_hull_image(labels == 1).sum() > 1.5 * table.area[0]


def test_equal_axes_have_a_diagonal_orientation() -> None:
    labels = np.zeros((60, 60), np.int32)
    labels[disk((20, 20), 12)] = 1
    labels[40:44, 40:44] = 2
    labels[50:53, 10:13] = 3
    labels[50, 12] = labels[52, 10] = 0  # a square without two corners leans to the other two
    table = measure_regions(labels)
    np.testing.assert_array_equal(table.orientation, [-np.pi / 4, -np.pi / 4, np.pi / 4])
    np.testing.assert_array_equal(table.eccentricity[:2], 0)


@pytest.mark.parametrize("depth", [1, 3, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("kind", ["nuclei", "noise", "one pixel", "large ids"])
def test_channel_values_equal_numpy(kind: str, dtype: type, depth: int) -> None:
    labels = IMAGES[kind]
    rng = np.random.default_rng(depth)
    channels = rng.integers(0, 256, (*labels.shape, depth), dtype=np.uint8)
    if dtype is np.float32:
        channels = (channels / np.float32(7) - np.float32(20)).astype(np.float32)
    before = channels.copy()
    table = measure_regions(labels, channels)
    np.testing.assert_array_equal(channels, before)
    assert table.mean.shape == (len(table), depth)
    for k, label in enumerate(table.label):
        inside = channels[labels == label].astype(np.float64)
        np.testing.assert_allclose(table.mean[k], inside.mean(axis=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(table.std[k], inside.std(axis=0), rtol=1e-10, atol=1e-12)
        np.testing.assert_array_equal(table.min[k], inside.min(axis=0))
        np.testing.assert_array_equal(table.max[k], inside.max(axis=0))


def test_channel_values_equal_scikit_image() -> None:
    labels = IMAGES["nuclei"]
    channels = np.random.default_rng(0).integers(0, 256, (*labels.shape, 2), dtype=np.uint8)
    table = measure_regions(labels, channels)
    kinds = {"mean": "intensity_mean", "std": "intensity_std", "min": "intensity_min", "max": "intensity_max"}
    expected = regionprops_table(labels, channels, properties=tuple(kinds.values()))
    for ours, theirs in kinds.items():
        for c in range(2):
            np.testing.assert_allclose(getattr(table, ours)[:, c], expected[f"{theirs}-{c}"], rtol=1e-12, err_msg=ours)


def test_a_small_spread_about_a_large_mean_is_kept() -> None:
    labels = np.ones((64, 64), np.int32)
    values = np.float32(2**23) + np.random.default_rng(0).integers(0, 3, (64, 64)).astype(np.float32)
    table = measure_regions(labels, values)
    assert table.std[0, 0] == pytest.approx(values.astype(np.float64).std(), rel=1e-9)
    assert measure_regions(labels, np.full((64, 64), np.float32(0.1))).std[0, 0] == 0


def test_views_are_measured_as_their_copies() -> None:
    labels = nuclei()
    channels = np.random.default_rng(1).random((*labels.shape, 4)).astype(np.float32)
    view, values = labels[::-2, ::3], channels[::-2, ::3, 1:3]
    view.flags.writeable = values.flags.writeable = False
    assert_same(measure_regions(view, values), measure_regions(view.copy(), values.copy()))


def test_a_plane_is_one_channel() -> None:
    labels = IMAGES["noise"]
    plane = np.random.default_rng(2).integers(0, 256, labels.shape, dtype=np.uint8)
    assert_same(measure_regions(labels, plane), measure_regions(labels, plane[..., None]))


def assert_same(one: RegionTable, other: RegionTable) -> None:
    for field in dataclasses.fields(RegionTable):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)


@pytest.mark.parametrize("kind", ["nuclei", "noise"])
def test_the_number_of_threads_does_not_matter(kind: str, threads: None) -> None:
    labels = np.tile(IMAGES[kind], (5, 2))
    channels = np.random.default_rng(1).random((*labels.shape, 2)).astype(np.float32)
    tables = []
    for count in (1, 3):
        set_thread_count(count)
        tables.append(measure_regions(labels, channels))
    assert_same(*tables)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (6, 7)])
def test_no_labels_make_an_empty_table(shape: tuple[int, int]) -> None:
    table = measure_regions(np.zeros(shape, np.int32), np.zeros((*shape, 3), np.uint8))
    assert len(table) == 0
    assert table.bbox.shape == (0, 4)
    assert table.centroid.shape == (0, 2)
    assert table.mean.shape == table.max.shape == (0, 3)


def test_values_outside_the_labels_are_not_looked_at() -> None:
    labels = np.array([[0, 1]], np.int32)
    assert measure_regions(labels, np.array([[np.nan, 2]], np.float32)).mean[0, 0] == 2


@pytest.mark.parametrize(
    ("labels", "channels", "error", "words"),
    [
        (np.zeros((2, 2)), None, TypeError, "not float64"),
        (np.zeros(4, np.int32), None, ValueError, r"\(H, W\), not \(4,\)"),
        (np.array([[1, -2]], np.int32), None, ValueError, "-2"),
        (np.array([[1, -2]], np.int64), None, ValueError, "-2"),
        (np.array([[1, 2**31]], np.int64), None, ValueError, "2147483648"),
        (np.ones((2, 2), np.int32), np.ones((2, 2)), TypeError, "not float64"),
        (np.ones((2, 2), np.int32), np.ones((2, 3), np.uint8), ValueError, r"\(2, 3\)"),
        (np.ones((2, 2), np.int32), np.ones((2, 2, 1, 1), np.uint8), ValueError, r"\(2, 2, 1, 1\)"),
        (np.ones((1, 2), np.int32), np.array([[0, np.nan]], np.float32), ValueError, "NaN"),
        (np.ones((1, 2), np.int32), np.array([[np.inf, 0]], np.float32), ValueError, "infinity"),
    ],
)
def test_bad_input_is_refused(
    labels: np.ndarray, channels: np.ndarray | None, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        measure_regions(labels, channels)
