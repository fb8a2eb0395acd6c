"""Grey reconstruction and h-maxima against scikit-image."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import ndimage
from skimage import data
from skimage.morphology import h_maxima as h_maxima_by_scikit_image
from skimage.morphology import reconstruction

from wsi_engine.kernels import _threads
from wsi_engine.kernels.distance import distance_transform
from wsi_engine.kernels.reconstruction import reconstruct
from wsi_engine.kernels.smoothing import gaussian
from wsi_engine.kernels.summits import h_maxima
from wsi_engine.synthetic import SlideSpec, SyntheticSlide

FOOTPRINTS = {4: ndimage.generate_binary_structure(2, 1), 8: np.ones((3, 3), bool)}


def spiral(size: int) -> np.ndarray:
    """A one-pixel way inwards that no sweep along rows follows."""
    way = np.zeros((size, size), bool)
    y, x, dy, dx = 0, 0, 0, 1
    way[0, 0] = True
    for turn in range(size):
        for _ in range(size - 1 - 2 * ((turn - 1) // 2) if turn > 1 else size - 1):
            y, x = y + dy, x + dx
            way[y, x] = True
        dy, dx = dx, -dy
    return way


def images() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    rings = np.minimum.reduce([*np.mgrid[:41, :50], 40 - np.mgrid[:41, :50][0], 49 - np.mgrid[:41, :50][1]]) % 2
    return {
        "noise": rng.integers(0, 256, (61, 83)),
        "levels": rng.integers(0, 4, (50, 60)),
        "camera": data.camera()[::4, ::4].astype(int),
        "smooth": ndimage.gaussian_filter(rng.random((90, 70)), 3) * 2000 // 1,
        "spiral": spiral(45) * 9 + rng.integers(0, 3, (45, 45)),
        "rings": rings * 7,
        "diagonal": np.eye(40, 60) * 9,
        "ramp": np.add.outer(np.arange(30), np.arange(30)),
        "flat": np.full((20, 30), 5),
        "row": rng.integers(0, 20, (1, 200)),
        "column": rng.integers(0, 20, (200, 1)),
        "one pixel": np.full((1, 1), 3),
    }


each_image = pytest.mark.parametrize("image", images().values(), ids=images())
each_connectivity = pytest.mark.parametrize("connectivity", [4, 8])
small = array_shapes(min_dims=2, max_dims=2, max_side=14)


@pytest.fixture(scope="module")
def smoothed() -> np.ndarray:
    """Smoothed distance of synthetic nuclei."""
    labels = SyntheticSlide(SlideSpec(width=4096, height=4096, mpp=0.5, coverage=1)).truth.labels(1500, 1500, 400, 360)
    return gaussian(distance_transform(labels > 0), 1)


@pytest.fixture
def threads() -> Iterator[Callable[[int | None], None]]:
    yield _threads.set_thread_count
    _threads.set_thread_count(None)


def seeds(mask: np.ndarray) -> list[np.ndarray]:
    """Seeds below a mask: lowered, a few points, nothing, the mask itself."""
    rng = np.random.default_rng(1)
    points = np.where(rng.random(mask.shape) < 0.02, mask, mask.min())
    return [mask - 3, points, np.full_like(mask, mask.min() - 1), mask.copy()]


@each_connectivity
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@each_image
def test_reconstruction_equals_scikit_image(image: np.ndarray, dtype: type, connectivity: int) -> None:
    mask = image.astype(dtype)
    for seed in seeds(mask):
        before = seed.copy(), mask.copy()
        found = reconstruct(seed, mask, connectivity=connectivity)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, reconstruction(seed, mask, footprint=FOOTPRINTS[connectivity]))
        found = reconstruct(-seed, -mask, method="erosion", connectivity=connectivity)
        assert found.dtype == dtype
        expected = reconstruction(-seed, -mask, method="erosion", footprint=FOOTPRINTS[connectivity])
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(before, (seed, mask))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(values=st.data(), shape=small, connectivity=st.sampled_from([4, 8]), highest=st.sampled_from([1, 3, 255]))
def test_reconstruction_of_any_pair(
    values: st.DataObject, shape: tuple[int, int], connectivity: int, highest: int
) -> None:
    mask = values.draw(arrays(np.uint8, shape, elements=st.integers(0, highest)))
    seed = np.minimum(values.draw(arrays(np.uint8, shape, elements=st.integers(0, highest))), mask)
    expected = reconstruction(seed, mask, footprint=FOOTPRINTS[connectivity])
    np.testing.assert_array_equal(reconstruct(seed, mask, connectivity=connectivity), expected)


def test_reconstruction_of_bools_keeps_the_seeded_components() -> None:
    mask = np.random.default_rng(2).random((60, 80)) < 0.5
    seed = mask & (np.random.default_rng(3).random(mask.shape) < 0.01)
    for connectivity, footprint in FOOTPRINTS.items():
        labels = ndimage.label(mask, footprint)[0]
        found = reconstruct(seed, mask, connectivity=connectivity)
        assert found.dtype == np.bool_
        np.testing.assert_array_equal(found, np.isin(labels, labels[seed]))


def test_reconstruction_by_erosion_fills_holes() -> None:
    mask = np.random.default_rng(2).random((60, 80)) < 0.5
    seed = np.ones_like(mask)
    seed[[0, -1]], seed[:, [0, -1]] = mask[[0, -1]], mask[:, [0, -1]]
    found = reconstruct(seed, mask, method="erosion", connectivity=4)
    np.testing.assert_array_equal(found, ndimage.binary_fill_holes(mask))
    assert (found & ~mask).any()


def test_reconstruction_takes_mixed_dtypes_views_and_infinity() -> None:
    rng = np.random.default_rng(4)
    mask = rng.integers(100, 2**30, (50, 70)).astype(np.int32).T[::-1, ::2]
    seed = rng.integers(0, 100, (50, 70)).astype(np.uint8).T[::-1, ::2]
    mask.flags.writeable = seed.flags.writeable = False
    found = reconstruct(seed, mask)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, reconstruction(seed, mask))
    endless = np.where(rng.random((30, 30)) < 0.9, np.inf, 5).astype(np.float32)
    start = np.full_like(endless, -np.inf)
    start[3, 3] = 5
    np.testing.assert_array_equal(reconstruct(start, endless), np.full_like(endless, 5))


@pytest.mark.parametrize("h", [1, 2, 3, 40, 1000])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, np.float64])
@each_image
def test_h_maxima_equal_scikit_image(image: np.ndarray, dtype: type, h: int) -> None:
    image = image.astype(dtype)
    if dtype == np.uint8 and h > 255:
        h = 255
    before = image.copy()
    found = h_maxima(image, h)
    assert found.dtype == np.bool_
    np.testing.assert_array_equal(found, h_maxima_by_scikit_image(image, dtype(h)))
    np.testing.assert_array_equal(image, before)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(values=st.data(), shape=small, h=st.integers(1, 6), highest=st.sampled_from([1, 3, 9]))
def test_h_maxima_of_any_image(values: st.DataObject, shape: tuple[int, int], h: int, highest: int) -> None:
    image = values.draw(arrays(np.int32, shape, elements=st.integers(-highest, highest)))
    np.testing.assert_array_equal(h_maxima(image, h), h_maxima_by_scikit_image(image, h))
    np.testing.assert_array_equal(h_maxima(image / 4, h / 4), h_maxima_by_scikit_image(image / 4, h / 4))


@pytest.mark.parametrize("h", [0.25, 1.0, 3.0])
def test_h_maxima_of_nuclei_differ_from_scikit_image_by_its_tolerance_alone(smoothed: np.ndarray, h: float) -> None:
    found, theirs = h_maxima(smoothed, h), h_maxima_by_scikit_image(smoothed, h) > 0
    assert found.sum() > 50
    assert not (found & ~theirs).any()
    # Pixels that only scikit-image marks lie beside a summit, and at most its tolerance below it.
    summit = ndimage.maximum_filter(np.where(found, smoothed, 0), size=3)
    extra = theirs & ~found
    assert (summit[extra] > smoothed[extra]).all()
    np.testing.assert_allclose(smoothed[extra], summit[extra], rtol=3e-6)


@pytest.mark.parametrize("h", [0.3, 1.0])
def test_h_maxima_follow_the_definition_by_reconstruction(smoothed: np.ndarray, h: float) -> None:
    image = np.rint(smoothed.astype(np.float64) * 1024)
    lowered = image - round(h * 1024)
    expected = reconstruct(lowered, image) == lowered
    np.testing.assert_array_equal(h_maxima(image / 1024, round(h * 1024) / 1024), expected)


@pytest.mark.parametrize("h", [0.3, 1.0])
def test_h_maxima_below_a_threshold_are_left_out(smoothed: np.ndarray, h: float) -> None:
    everywhere, high = h_maxima(smoothed, h), float(np.float32(np.median(smoothed[h_maxima(smoothed, h)])))
    expected = everywhere & (smoothed >= high)
    assert 0 < expected.sum() < everywhere.sum()
    np.testing.assert_array_equal(h_maxima(smoothed, h, threshold=high), expected)
    with pytest.raises(ValueError, match="threshold"):
        h_maxima(smoothed, h, threshold=float("nan"))


def test_h_maxima_take_views_and_any_number_of_threads(threads: Callable[[int | None], None]) -> None:
    values = np.random.default_rng(5).integers(0, 200, (160, 900)).astype(np.uint8)
    view = values.T[::-1, ::2]
    view.flags.writeable = False
    expected = h_maxima_by_scikit_image(view, 60)
    for count in (1, 3):
        threads(count)
        np.testing.assert_array_equal(h_maxima(view, 60), expected)


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (7, 0)])
def test_empty_images_stay_empty(shape: tuple[int, int]) -> None:
    empty = np.zeros(shape, np.uint8)
    assert reconstruct(empty, empty).shape == h_maxima(empty, 1).shape == shape
    assert reconstruct(empty, empty).dtype == np.uint8


@pytest.mark.parametrize(
    ("seed", "mask", "options", "error", "words"),
    [
        (np.zeros((3, 3), complex), np.zeros((3, 3)), {}, TypeError, "not complex128"),
        (np.zeros((3, 3)), np.zeros((3, 3), np.int64), {}, TypeError, "not int64"),
        (np.zeros((3, 3)), np.zeros((3, 4)), {}, ValueError, r"one shape, not \(3, 3\) and \(3, 4\)"),
        (np.zeros(3), np.zeros(3), {}, ValueError, r"shape \(H, W\)"),
        (np.full((2, 2), np.nan), np.zeros((2, 2)), {}, ValueError, "without NaN"),
        (np.ones((2, 2)), np.zeros((2, 2)), {}, ValueError, "by dilation takes a seed that is nowhere above"),
        (np.zeros((2, 2)), np.ones((2, 2)), {"method": "erosion"}, ValueError, "erosion takes a seed .* nowhere below"),
        (np.zeros((2, 2)), np.ones((2, 2)), {"method": "opening"}, ValueError, "not 'opening'"),
        (np.zeros((2, 2)), np.ones((2, 2)), {"connectivity": 6}, ValueError, "4 or 8, not 6"),
    ],
)
def test_reconstruct_refuses(
    seed: np.ndarray, mask: np.ndarray, options: dict, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        reconstruct(seed, mask, **options)


@pytest.mark.parametrize(
    ("image", "h", "error", "words"),
    [
        (np.zeros((3, 3), np.int64), 1, TypeError, "not int64"),
        (np.zeros(3), 1, ValueError, r"shape \(H, W\), not \(3,\)"),
        (np.array([[0, np.nan]]), 1, ValueError, "without NaN"),
        (np.array([[0, np.inf]]), 1, ValueError, "holds infinity"),
        (np.zeros((3, 3)), 0, ValueError, "h above 0, not 0"),
        (np.zeros((3, 3)), -1.5, ValueError, "h above 0, not -1.5"),
        (np.zeros((3, 3)), np.nan, ValueError, "h above 0, not nan"),
    ],
)
def test_h_maxima_refuse(image: np.ndarray, h: float, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        h_maxima(image, h)
