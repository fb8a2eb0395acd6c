"""The area filter against plain loops and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from wsi_engine.kernels import resample_area


def area_oracle(source: np.ndarray, start: float, scale: float, n: int) -> np.ndarray:
    """Exact means along the first axis: the integral of the piecewise constant source, by interpolation."""
    integral = np.concatenate([np.zeros((1, *source.shape[1:])), np.cumsum(source.astype(float), axis=0)])
    edges = start + np.arange(n + 1) * scale
    low = np.clip(edges.astype(int), 0, len(source) - 1)
    part = (edges - low).reshape(-1, *([1] * (source.ndim - 1)))
    at_edges = integral[low] + part * (integral[low + 1] - integral[low])
    return np.diff(at_edges, axis=0) / scale


@pytest.mark.parametrize("scale", [(1.0, 1.0), (1.002, 1.002), (1.538, 1.538), (2.0, 2.0), (2.577, 3.1), (7.9, 4.0)])
@pytest.mark.parametrize("start", [(0.0, 0.0), (0.4, 0.7)])
def test_equals_the_exact_area_mean(scale: tuple[float, float], start: tuple[float, float]) -> None:
    source = np.random.default_rng(1).integers(0, 256, (90, 110, 3), np.uint8)
    width, height = int((109 - start[0]) / scale[0]), int((89 - start[1]) / scale[1])
    rows = area_oracle(source, start[1], scale[1], height)
    expected = area_oracle(rows.transpose(1, 0, 2), start[0], scale[0], width).transpose(1, 0, 2)
    got = resample_area(source, *start, *scale, width, height)
    assert got.shape == (height, width, 3)
    assert np.abs(got - expected).max() <= 0.5 + 1e-3


def test_integer_scale_is_the_mean_of_blocks() -> None:
    source = np.random.default_rng(2).integers(0, 256, (64, 96, 3), np.uint8)
    expected = np.floor(source.reshape(16, 4, 24, 4, 3).mean(axis=(1, 3)) + 0.5)
    assert np.array_equal(resample_area(source, 0, 0, 4, 4, 24, 16), expected)


def test_unit_scale_copies() -> None:
    source = np.random.default_rng(3).integers(0, 256, (20, 30, 3), np.uint8)
    assert np.array_equal(resample_area(source, 4, 3, 1, 1, 10, 12), source[3:15, 4:14])


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
@pytest.mark.parametrize("scale", [0.3, 1.0, 1.333333, 2.517, 31.7])
def test_constant_stays_constant(value: int, scale: float) -> None:
    source = np.full((100, 100, 3), value, np.uint8)
    n = int(90 / scale)
    assert (resample_area(source, 3.21, 1.7, scale, scale, n, n) == value).all()


def test_finer_than_the_source_interpolates_linearly() -> None:
    source = np.random.default_rng(4).integers(0, 256, (12, 14, 3), np.uint8)
    scale = 0.4
    got = resample_area(source, 2.0, 3.0, scale, scale, 15, 12)
    y = 3.0 + (np.arange(12) + 0.5) * scale - 0.5
    x = 2.0 + (np.arange(15) + 0.5) * scale - 0.5
    for channel in range(3):
        expected = ndimage.map_coordinates(
            source[..., channel].astype(float), np.meshgrid(y, x, indexing="ij"), order=1
        )
        assert np.abs(got[..., channel] - expected).max() <= 0.5 + 1e-3


def test_reads_non_contiguous_sources() -> None:
    source = np.random.default_rng(5).integers(0, 256, (40, 40, 3), np.uint8)[::-1, ::2]
    assert np.array_equal(
        resample_area(source, 0, 0, 2, 2, 10, 20), resample_area(np.ascontiguousarray(source), 0, 0, 2, 2, 10, 20)
    )


@pytest.mark.parametrize(
    ("source", "scale", "size"),
    [
        (np.zeros((4, 4, 3), np.float32), 1.0, 2),
        (np.zeros((4, 4), np.uint8), 1.0, 2),
        (np.zeros((0, 4, 3), np.uint8), 1.0, 2),
        (np.zeros((4, 4, 3), np.uint8), 0.0, 2),
        (np.zeros((4, 4, 3), np.uint8), float("nan"), 2),
        (np.zeros((4, 4, 3), np.uint8), 1.0, 0),
    ],
)
def test_refuses_what_it_cannot_do(source: np.ndarray, scale: float, size: int) -> None:
    with pytest.raises(ValueError, match="must"):
        resample_area(source, 0, 0, scale, scale, size, size)
