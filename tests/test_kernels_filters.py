"""Otsu's threshold, median blur, saturation and summed areas against SciPy, scikit-image and plain loops."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
from scipy import ndimage
from skimage import data
from skimage.filters import threshold_otsu

from wsi_engine.kernels.filters import median_blur, rgb_saturation, summed_area
from wsi_engine.kernels.otsu import otsu_threshold


def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    two_humps = np.concatenate([rng.normal(60, 10, 4000), rng.normal(180, 25, 2000)]).clip(0, 255)
    return [
        rng.integers(0, 256, (40, 57), dtype=np.uint8),
        two_humps.astype(np.uint8).reshape(60, 100),
        data.camera()[::4, ::4],
        data.immunohistochemistry()[..., 0][::3, ::3],
        np.array([[3, 3], [3, 250]], np.uint8),
    ]


@pytest.mark.parametrize("image", images())
def test_otsu_of_bytes_equals_scikit_image(image: np.ndarray) -> None:
    assert otsu_threshold(image) == threshold_otsu(image)


@pytest.mark.parametrize("bins", [2, 64, 256])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("image", images())
def test_otsu_of_floats_equals_scikit_image(image: np.ndarray, dtype: type, bins: int) -> None:
    values = (image.astype(dtype) + np.random.default_rng(1).random(image.shape).astype(dtype)) * dtype(0.01)
    assert otsu_threshold(values, bins) == pytest.approx(float(threshold_otsu(values, nbins=bins)), rel=1e-6)


@pytest.mark.parametrize("value", [np.uint8(0), np.uint8(255), np.float32(-1.5), np.float64(7)])
def test_otsu_of_one_value_is_that_value(value: np.generic) -> None:
    assert otsu_threshold(np.full((4, 5), value)) == value


def test_otsu_takes_views_and_read_only_arrays() -> None:
    image = data.camera()
    view = image[::3, ::-2]
    view.flags.writeable = False
    assert otsu_threshold(view) == threshold_otsu(view)


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (np.zeros(0, np.uint8), ValueError, "empty"),
        (np.array([1.0, np.nan]), ValueError, "NaN"),
        (np.array([1.0, np.inf]), ValueError, "infinity"),
        (np.zeros(4, np.int32), TypeError, "int32"),
        (np.array(["a"]), TypeError, "not <U1"),
    ],
)
def test_otsu_refuses_bad_values(values: np.ndarray, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        otsu_threshold(values)


def test_otsu_refuses_one_bin() -> None:
    with pytest.raises(ValueError, match="2 bins"):
        otsu_threshold(np.array([0.0, 1.0]), bins=1)


@pytest.mark.parametrize("size", [1, 3, 7, 15])
@pytest.mark.parametrize("image", [*images(), np.arange(5, dtype=np.uint8)[None], np.array([[9]], np.uint8)])
def test_median_blur_equals_scipy(image: np.ndarray, size: int) -> None:
    np.testing.assert_array_equal(median_blur(image, size), ndimage.median_filter(image, size, mode="nearest"))


def test_median_blur_of_two_values_and_of_a_view() -> None:
    image = (np.random.default_rng(2).random((33, 65)) < 0.5).astype(np.uint8) * 255
    view = image.T[::-1]
    np.testing.assert_array_equal(median_blur(view, 5), ndimage.median_filter(view, 5, mode="nearest"))


@pytest.mark.parametrize("size", [0, 4, -3])
def test_median_blur_refuses_even_sizes(size: int) -> None:
    with pytest.raises(ValueError, match="odd window size"):
        median_blur(np.zeros((4, 4), np.uint8), size)


def test_saturation_of_every_pair_of_extremes_is_rounded_to_nearest() -> None:
    high, low = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    rgb = np.stack([np.maximum(high, low), np.minimum(high, low), np.minimum(high, low)], axis=-1).astype(np.uint8)
    top = rgb.max(-1).astype(np.float64)
    exact = np.divide(255 * (top - rgb.min(-1)), top, out=np.zeros_like(top), where=top > 0)
    found = rgb_saturation(rgb)
    assert np.abs(found - exact).max() < 0.5 + 255 * 0.5 / 4096  # fixed point: half a unit in the 12th bit, times 255
    clear_of_halves = np.abs(exact % 1 - 0.5) > 0.04
    np.testing.assert_array_equal(found[clear_of_halves], np.rint(exact)[clear_of_halves])


def test_saturation_follows_the_hexcone_model() -> None:
    rgb = np.random.default_rng(3).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    for (y, x), found in np.ndenumerate(rgb_saturation(rgb)):
        assert abs(found - 255 * colorsys.rgb_to_hsv(*(rgb[y, x] / 255.0))[1]) <= 0.54


def test_summed_area_gives_the_sum_of_any_rectangle() -> None:
    rng = np.random.default_rng(4)
    for mask in (rng.random((13, 29)) < 0.4, rng.integers(0, 256, (13, 29), dtype=np.uint8)):
        table = summed_area(mask)
        assert table.shape == (14, 30)
        assert table.dtype == np.int64
        for _ in range(30):
            (y0, y1), (x0, x1) = np.sort(rng.integers(0, 14, 2)), np.sort(rng.integers(0, 30, 2))
            assert table[y1, x1] - table[y0, x1] - table[y1, x0] + table[y0, x0] == mask[y0:y1, x0:x1].sum()


@pytest.mark.parametrize("call", [lambda a: median_blur(a, 3), summed_area, rgb_saturation])
def test_filters_refuse_other_dtypes_and_shapes(call) -> None:
    with pytest.raises(TypeError, match="float64"):
        call(np.zeros((3, 3, 3)))
    with pytest.raises(ValueError, match="shape"):
        call(np.zeros((3, 3, 3, 1), np.uint8))
