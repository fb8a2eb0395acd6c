"""The distance transform against SciPy and against the definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import ndimage

from wsi_engine.kernels import _threads
from wsi_engine.kernels.distance import LONGEST_SIDE, distance_transform
from wsi_engine.synthetic import SlideSpec, SyntheticSlide


def masks() -> dict[str, np.ndarray]:
    """Masks with at least one False pixel."""
    rng = np.random.default_rng(0)
    hole = np.ones((90, 140), bool)
    hole[80, 3] = False
    corner = np.ones((130, 70), bool)
    corner[-1, -1] = False
    dots = np.ones((200, 150), bool)
    dots[rng.integers(0, 200, 40), rng.integers(0, 150, 40)] = False
    row, column = np.ones((1, 300), bool), np.ones((300, 1), bool)
    row[0, [90, 91, 250]], column[[0, 170]] = False, False
    y, x = np.mgrid[:120, :160]
    return {
        "empty": np.zeros((8, 9), bool),
        "one": np.pad(np.ones((1, 1), bool), 5),
        "hole": hole,
        "corner": corner,
        "dots": dots,
        "row": row,
        "column": column,
        "first column": np.arange(100)[None] + np.zeros((40, 1), int) > 0,
        "last row": np.arange(100)[:, None] + np.zeros((1, 40), int) < 99,
        "diagonal": ~np.eye(140, 100, dtype=bool),
        "lattice": (y % 37 != 0) | (x % 53 != 0),
        "disks": np.hypot(y - 60, x - 80) % 30 < 22,
        "half": rng.random((60, 70)) < 0.5,
        "dense": rng.random((150, 170)) < 0.998,
        "runs of 62 to 66": x % 67 > y % 5,
        "blobs": ndimage.gaussian_filter(rng.random((120, 130)), 3) > 0.47,
        "narrow and tall": np.arange(3000)[:, None] + np.zeros((1, 3), int) > 0,
    }


@pytest.fixture
def threads() -> Iterator[Callable[[int | None], None]]:
    yield _threads.set_thread_count
    _threads.set_thread_count(None)


def squared_by_definition(mask: np.ndarray) -> np.ndarray:
    background = np.argwhere(~mask)
    at = np.argwhere(np.ones_like(mask))
    return ((at[:, None] - background[None]) ** 2).sum(-1).min(1).reshape(mask.shape)


@pytest.mark.parametrize("mask", masks().values(), ids=masks())
def test_equals_scipy(mask: np.ndarray) -> None:
    before = mask.copy()
    exact = ndimage.distance_transform_edt(mask)
    found = distance_transform(mask)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, exact.astype(np.float32))
    squares = distance_transform(mask, squared=True)
    assert squares.dtype == np.int32
    np.testing.assert_array_equal(squares, np.rint(exact**2).astype(np.int64))
    np.testing.assert_array_equal(mask, before)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(mask=arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=24)))
def test_follows_the_definition_on_any_mask(mask: np.ndarray) -> None:
    if not mask.all():
        np.testing.assert_array_equal(distance_transform(mask, squared=True), squared_by_definition(mask))


def test_the_two_ways_through_a_run_agree_with_the_definition() -> None:
    rng = np.random.default_rng(1)
    for width in (60, 63, 64, 65, 66, 90):  # runs up to 64 columns are searched, longer ones need an envelope
        mask = rng.random((40, width)) < 0.99
        mask[0, 0] = False
        np.testing.assert_array_equal(distance_transform(mask, squared=True), squared_by_definition(mask))


def test_equals_scipy_on_nuclei() -> None:
    labels = SyntheticSlide(SlideSpec(width=4096, height=4096, mpp=0.5, coverage=1)).truth.labels(1500, 1500, 500, 460)
    for mask in (labels > 0, labels == 0):
        exact = ndimage.distance_transform_edt(mask).astype(np.float32)
        np.testing.assert_array_equal(distance_transform(mask), exact)


@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (70, 1), (20, 30)])
def test_without_background_every_distance_is_infinite(shape: tuple[int, int]) -> None:
    full = np.ones(shape, bool)
    assert np.isposinf(distance_transform(full)).all()
    assert (distance_transform(full, squared=True) == np.iinfo(np.int32).max).all()


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (7, 0)])
def test_empty_arrays_stay_empty(shape: tuple[int, int]) -> None:
    assert distance_transform(np.zeros(shape, bool)).shape == shape
    assert distance_transform(np.zeros(shape, bool), squared=True).dtype == np.int32


@pytest.mark.parametrize("shape", [(2, 50_000), (50_000, 2)])
def test_squares_beyond_32_bits_and_roots_beyond_float32(shape: tuple[int, int]) -> None:
    mask = np.ones(shape, bool)
    mask[0, 0] = False
    y, x = np.indices(shape, np.int64)
    squares = distance_transform(mask, squared=True)
    assert squares.dtype == np.int64
    np.testing.assert_array_equal(squares, y * y + x * x)
    np.testing.assert_array_equal(distance_transform(mask), np.sqrt(y * y + x * x).astype(np.float32))
    assert (distance_transform(np.ones(shape, bool), squared=True) == np.iinfo(np.int64).max).all()


def test_the_longest_side_is_exact() -> None:
    mask = np.ones((2, LONGEST_SIDE), bool)
    mask[1, 0] = mask[0, -1] = False
    x = np.arange(LONGEST_SIDE)
    first, last = x**2 + np.array([[1], [0]]), (LONGEST_SIDE - 1 - x) ** 2 + np.array([[0], [1]])
    np.testing.assert_array_equal(distance_transform(mask, squared=True), np.minimum(first, last))


@pytest.mark.parametrize("squared", [False, True])
def test_the_number_of_threads_changes_nothing(squared: bool, threads: Callable[[int | None], None]) -> None:
    rng = np.random.default_rng(2)
    mask = (ndimage.gaussian_filter(rng.random((700, 900)), 5) > 0.48) & (rng.random((700, 900)) < 0.9995)
    threads(1)
    alone = distance_transform(mask, squared=squared)
    threads(3)
    np.testing.assert_array_equal(distance_transform(mask, squared=squared), alone)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_integers_and_views(dtype: type) -> None:
    values = np.random.default_rng(3).integers(-1, 9, (80, 140)).astype(dtype)
    view = values.T[::-1, ::2]
    view.flags.writeable = False
    exact = ndimage.distance_transform_edt(view != 0).astype(np.float32)
    np.testing.assert_array_equal(distance_transform(view), exact)
    np.testing.assert_array_equal(distance_transform((values != 0).T[::-1, ::2]), exact)


def test_equals_the_golden_distance(shared_data: Path) -> None:
    golden = np.load(shared_data.parent / "golden" / "nuclei_postprocess.npz")
    np.testing.assert_array_equal(distance_transform(golden["opened_closed"]), golden["distance"])


def test_refuses_bad_masks() -> None:
    with pytest.raises(TypeError, match="distance_transform takes a mask of bool or integers, not float32"):
        distance_transform(np.zeros((4, 5), np.float32))
    with pytest.raises(ValueError, match=r"shape \(H, W\), not \(4,\)"):
        distance_transform(np.zeros(4, bool))
    with pytest.raises(ValueError, match="sides of at most 1048576 pixels"):
        distance_transform(np.zeros((1, LONGEST_SIDE + 1), bool))
