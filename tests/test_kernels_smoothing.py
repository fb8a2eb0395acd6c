"""Gaussian blur and windowed thresholds against SciPy and scikit-image."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import ndimage
from skimage import data
from skimage.filters import threshold_local

from wsi_engine.kernels import _threads
from wsi_engine.kernels.smoothing import gaussian, local_threshold


def images() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    dot = np.zeros((40, 60), np.float32)
    dot[0, 59] = 1
    return {
        "noise": rng.normal(0, 1, (61, 83)).astype(np.float32),
        "camera": data.camera()[::4, ::4].astype(np.float32),
        "far from zero": (rng.random((30, 30)) + 1000).astype(np.float32),
        "large and small": (10.0 ** rng.integers(-20, 20, (50, 41))).astype(np.float32),
        "dot in a corner": dot,
        "flat": np.full((20, 30), 0.1, np.float32),
        "one pixel": np.full((1, 1), 7, np.float32),
        "row": rng.random((1, 200), np.float32),
        "column": rng.random((200, 1), np.float32),
        "two rows": rng.random((2, 37), np.float32),
    }


each_image = pytest.mark.parametrize("image", images().values(), ids=images())


@pytest.fixture
def threads() -> Iterator[Callable[[int | None], None]]:
    yield _threads.set_thread_count
    _threads.set_thread_count(None)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Within 1e-6 of the value, or, where positive and negative cancel, of the greatest value."""
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected[expected < 0]).max(initial=0))


@pytest.mark.parametrize(("sigma", "truncate"), [(0.1, 4), (0.4, 4), (0.5, 3), (1, 4), (2.3, 4), (1.5, 2), (9, 4)])
@each_image
def test_gaussian_equals_scipy(image: np.ndarray, sigma: float, truncate: float) -> None:
    before = image.copy()
    found = gaussian(image, sigma, truncate=truncate)
    assert_close(found, ndimage.gaussian_filter(image, sigma, truncate=truncate, mode="reflect"))
    assert not np.shares_memory(found, image)
    np.testing.assert_array_equal(image, before)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    image=arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=12)),
    sigma=st.sampled_from([0.3, 0.8, 1.0, 3.0, 5.5]),
    half=st.integers(0, 20),
)
def test_windows_larger_than_the_image_are_mirrored_again_and_again(image: np.ndarray, sigma: float, half: int) -> None:
    image = image.astype(np.float32)
    assert_close(gaussian(image, sigma), ndimage.gaussian_filter(image, sigma, mode="reflect"))
    found = local_threshold(image, 2 * half + 1, method="mean")
    np.testing.assert_allclose(found, ndimage.uniform_filter(image, 2 * half + 1, mode="reflect"), rtol=1e-6)


def test_the_border_is_its_mirror_image() -> None:
    image = np.random.default_rng(1).random((20, 30), np.float32)
    wide = gaussian(np.pad(image, 25, mode="symmetric"), 3)
    np.testing.assert_array_equal(gaussian(image, 3), wide[25:-25, 25:-25])


@pytest.mark.parametrize("method", ["gaussian", "mean"])
@pytest.mark.parametrize(("window", "offset"), [(1, 0.0), (3, 0.5), (7, -2.25), (31, 0.0)])
@each_image
def test_local_threshold_equals_scikit_image(image: np.ndarray, window: int, offset: float, method: str) -> None:
    found = local_threshold(image, window, method=method, offset=offset)
    expected = threshold_local(image, window, method=method, offset=offset)
    # The running sums of a mean carry the rounding of the greatest value that has passed through.
    scale = np.abs(image).max() if method == "mean" else np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * scale if image.min() < 1e-10 else 0)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int16, np.int32, np.float64])
@pytest.mark.parametrize("method", ["gaussian", "mean"])
def test_other_dtypes_and_views(dtype: type, method: str) -> None:
    values = np.random.default_rng(2).integers(0, 250, (70, 90)).astype(dtype)
    view = values.T[::-1, ::2]
    view.flags.writeable = False
    if dtype == np.bool_:  # scikit-image takes no bool for images here
        expected = threshold_local(view.astype(float), 15, method=method, offset=3)
    else:
        expected = threshold_local(view, 15, method=method, offset=3)
    np.testing.assert_allclose(local_threshold(view, 15, method=method, offset=3), expected, rtol=1e-5, atol=1e-5)
    blurred = ndimage.gaussian_filter(view.astype(np.float64), 1.3)
    np.testing.assert_allclose(gaussian(view, 1.3), blurred, rtol=1e-6)


def test_the_number_of_threads_changes_nothing(threads: Callable[[int | None], None]) -> None:
    image = np.random.default_rng(3).normal(5, 2, (700, 90)).astype(np.float32)
    calls = [
        lambda: gaussian(image, 2),
        lambda: local_threshold(image, 25),
        lambda: local_threshold(image, 25, method="mean"),
    ]
    threads(1)
    alone = [call() for call in calls]
    threads(3)
    for call, expected in zip(calls, alone, strict=True):
        np.testing.assert_array_equal(call(), expected)
    np.testing.assert_allclose(alone[2], threshold_local(image, 25, method="mean"), rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (7, 0)])
def test_empty_images_stay_empty(shape: tuple[int, int]) -> None:
    empty = np.zeros(shape, np.float32)
    for found in (gaussian(empty, 1), local_threshold(empty, 3), local_threshold(empty, 3, method="mean")):
        assert found.shape == shape
        assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("image", "sigma", "truncate", "error", "words"),
    [
        (np.zeros((3, 3), complex), 1, 4, TypeError, "not complex128"),
        (np.zeros((3, 3), np.int64), 1, 4, TypeError, "integers of up to 32 bits, float32 or float64, not int64"),
        (np.zeros(3), 1, 4, ValueError, r"shape \(H, W\), not \(3,\)"),
        (np.array([[0, np.nan]]), 1, 4, ValueError, "without NaN"),
        (np.array([[0, -np.inf]]), 1, 4, ValueError, "holds infinity"),
        (np.array([[1e39]]), 1, 4, ValueError, "that float32 can hold"),
        (np.zeros((3, 3)), -1, 4, ValueError, "sigma of 0 pixels or more, not -1"),
        (np.zeros((3, 3)), np.nan, 4, ValueError, "sigma of 0 pixels or more, not nan"),
        (np.zeros((3, 3)), 1, 0, ValueError, "truncate above 0, not 0"),
        (np.zeros((3, 3)), 1e9, 4, ValueError, "at most 1048576"),
    ],
)
def test_gaussian_refuses(image: np.ndarray, sigma: float, truncate: float, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        gaussian(image, sigma, truncate=truncate)


@pytest.mark.parametrize(
    ("window", "options", "error", "words"),
    [
        (4, {}, ValueError, "odd window from 1 to 1048576 pixels, not 4"),
        (-3, {}, ValueError, "not -3"),
        (3.0, {}, TypeError, "whole pixels, not 3.0"),
        (3, {"method": "median"}, ValueError, "not 'median'"),
        (3, {"offset": np.inf}, ValueError, "finite offset, not inf"),
    ],
)
def test_local_threshold_refuses(window: int, options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        local_threshold(np.zeros((5, 5), np.float32), window, **options)
