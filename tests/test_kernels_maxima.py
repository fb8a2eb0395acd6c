"""Local maxima against scikit-image and against the definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import ndimage
from skimage import data
from skimage.feature import peak_local_max
from skimage.morphology import disk

from wsi_engine.kernels import _threads
from wsi_engine.kernels.distance import distance_transform
from wsi_engine.kernels.maxima import local_maxima
from wsi_engine.kernels.smoothing import gaussian
from wsi_engine.synthetic import SlideSpec, SyntheticSlide


def images() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    flat_top = np.zeros((40, 70), np.float32)
    flat_top[5:30, 10:60] = 2
    borders = np.zeros((30, 40), np.float32)
    borders[[0, -1]], borders[:, [0, -1]] = 1, 1
    borders[0, 0], borders[-1, 20] = 2, 1.5
    return {
        "noise": rng.normal(0, 1, (61, 83)).astype(np.float32),
        "levels": rng.integers(0, 4, (50, 60)).astype(np.float32),
        "camera": data.camera()[::6, ::6].astype(np.float32),
        "flat top": flat_top,
        "borders": borders,
        "diagonal": np.eye(40, 60, dtype=np.float32),
        "ramp": np.add.outer(np.arange(30), np.arange(30)).astype(np.float32),
        "flat": np.full((20, 30), 0.1, np.float32),
        "row": rng.random((1, 200), np.float32),
        "column": rng.random((200, 1), np.float32),
        "negative": -rng.random((30, 30), np.float32),
    }


@pytest.fixture(scope="module")
def nuclei() -> tuple[np.ndarray, np.ndarray]:
    """Mask and smoothed distance of synthetic nuclei."""
    labels = SyntheticSlide(SlideSpec(width=4096, height=4096, mpp=0.5, coverage=1)).truth.labels(1500, 1500, 500, 460)
    return labels > 0, gaussian(distance_transform(labels > 0), 1)


@pytest.fixture
def threads() -> Iterator[Callable[[int | None], None]]:
    yield _threads.set_thread_count
    _threads.set_thread_count(None)


def by_scikit_image(image: np.ndarray, radius: int, **options: object) -> np.ndarray:
    found = np.zeros(image.shape, bool)
    found[tuple(peak_local_max(image, footprint=disk(radius), exclude_border=False, **options).T)] = True
    return found


def by_definition(image: np.ndarray, radius: int, mask: np.ndarray) -> np.ndarray:
    values = np.where(mask, image.astype(np.float64), -np.inf)
    highest = ndimage.maximum_filter(values, footprint=disk(radius), mode="constant", cval=-np.inf)
    return mask & (values == highest) & (image > image.min())


@pytest.mark.parametrize("radius", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("image", images().values(), ids=images())
def test_equals_scikit_image(image: np.ndarray, radius: int) -> None:
    before = image.copy()
    found = local_maxima(image, radius)
    assert found.dtype == np.bool_
    np.testing.assert_array_equal(found, by_scikit_image(image, radius))
    np.testing.assert_array_equal(
        local_maxima(image, radius, threshold=0.5), by_scikit_image(image, radius, threshold_abs=0.5)
    )
    np.testing.assert_array_equal(image, before)


def test_equals_scikit_image_on_nuclei(nuclei: tuple[np.ndarray, np.ndarray]) -> None:
    mask, smoothed = nuclei
    found = local_maxima(smoothed, 7)
    assert found.sum() > 100
    np.testing.assert_array_equal(found, by_scikit_image(smoothed, 7))
    np.testing.assert_array_equal(
        local_maxima(smoothed, 7, mask=mask), by_scikit_image(smoothed, 7, labels=mask.astype(int))
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(values=st.data(), shape=array_shapes(min_dims=2, max_dims=2, max_side=16), radius=st.integers(1, 9))
def test_follows_the_definition_in_any_mask(values: st.DataObject, shape: tuple[int, int], radius: int) -> None:
    image = values.draw(arrays(np.uint8, shape, elements=st.integers(0, 3)))
    mask = values.draw(arrays(np.bool_, shape))
    np.testing.assert_array_equal(local_maxima(image, radius, mask=mask), by_definition(image, radius, mask))


def test_a_plateau_that_fills_the_mask_is_found_where_scikit_image_drops_it() -> None:
    image = np.zeros((9, 9), np.float32)
    image[3:6, 3:6] = 4
    mask = image > 0
    np.testing.assert_array_equal(local_maxima(image, 7, mask=mask), mask)
    # It keeps what an opening by a cross removes from the mask: the four corners.
    np.testing.assert_array_equal(
        np.argwhere(by_scikit_image(image, 7, labels=mask.astype(int))), [[3, 3], [3, 5], [5, 3], [5, 5]]
    )


def test_pixels_outside_the_mask_do_not_count() -> None:
    image = np.zeros((5, 9), np.float32)
    image[2] = np.arange(9)
    mask = np.arange(9)[None] + np.zeros((5, 1)) < 5
    found = local_maxima(image, 3, mask=mask)
    np.testing.assert_array_equal(np.argwhere(found), [[2, 4]])
    assert not local_maxima(image, 3, mask=np.zeros_like(mask)).any()


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_dtypes_and_views(dtype: type) -> None:
    values = np.random.default_rng(1).integers(0, 9, (80, 140)).astype(dtype)
    view = values.T[::-1, ::2]
    view.flags.writeable = False
    expected = by_definition(view, 3, np.ones(view.shape, bool))
    np.testing.assert_array_equal(local_maxima(view, 3), expected)
    np.testing.assert_array_equal(local_maxima(view, 3, mask=np.ones(view.shape, np.uint8)), expected)


def test_integers_beyond_float32_and_infinity_are_told_apart() -> None:
    large = np.array([[2**30, 2**30 + 1, 2**30, 0]], np.int32)
    np.testing.assert_array_equal(local_maxima(large, 2), [[False, True, False, False]])
    endless = np.array([[-np.inf, 3, np.inf, 3, 0, 3]])
    np.testing.assert_array_equal(local_maxima(endless, 2), [[False, False, True, False, False, True]])


def test_the_number_of_threads_changes_nothing(threads: Callable[[int | None], None]) -> None:
    image = np.random.default_rng(2).integers(0, 50, (900, 90))
    image = ndimage.uniform_filter(image, 5).astype(np.uint8)
    mask = np.random.default_rng(3).random(image.shape) < 0.9
    threads(1)
    alone = local_maxima(image, 4, mask=mask)
    threads(3)
    np.testing.assert_array_equal(local_maxima(image, 4, mask=mask), alone)


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (7, 0)])
def test_empty_images_stay_empty(shape: tuple[int, int]) -> None:
    empty = np.zeros(shape, np.float32)
    assert local_maxima(empty, 3).shape == local_maxima(empty, 3, mask=empty > 0).shape == shape


def test_gives_the_golden_markers(shared_data: Path) -> None:
    golden = np.load(shared_data.parent / "golden" / "nuclei_postprocess.npz")
    mask = golden["opened_closed"]
    for smoothed in (golden["smoothed"], gaussian(distance_transform(mask), 1)):
        for found in (local_maxima(smoothed, 7), local_maxima(smoothed, 7, mask=mask)):
            np.testing.assert_array_equal(ndimage.label(found, np.ones((3, 3)))[0], golden["markers"])
    np.testing.assert_allclose(gaussian(distance_transform(mask), 1), golden["smoothed"], rtol=1e-5)


@pytest.mark.parametrize(
    ("image", "radius", "options", "error", "words"),
    [
        (np.zeros((3, 3), np.int64), 2, {}, TypeError, "not int64"),
        (np.zeros((3, 3, 3)), 2, {}, ValueError, r"shape \(H, W\), not \(3, 3, 3\)"),
        (np.array([[0, np.nan]]), 2, {}, ValueError, "without NaN"),
        (np.zeros((3, 3)), 0, {}, ValueError, "at least 1 pixel, not 0"),
        (np.zeros((3, 3)), 1.5, {}, TypeError, "float"),
        (np.zeros((3, 3)), 1, {"threshold": np.nan}, ValueError, "threshold that is not NaN"),
        (np.zeros((3, 3)), 1, {"mask": np.ones((3, 4), bool)}, ValueError, r"shape \(3, 3\), not \(3, 4\)"),
        (np.zeros((3, 3)), 1, {"mask": np.ones((3, 3))}, TypeError, "mask of bool or integers"),
    ],
)
def test_refuses(image: np.ndarray, radius: int, options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        local_maxima(image, radius, **options)
