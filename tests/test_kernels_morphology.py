"""Erosion, dilation, opening and closing by disks against SciPy's binary operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import ndimage
from skimage.morphology import disk

from wsi_engine.kernels import _threads
from wsi_engine.kernels.morphology import close_disk, dilate, erode, open_disk
from wsi_engine.synthetic import SlideSpec, SyntheticSlide

PAIRS = {
    "erode": (erode, ndimage.binary_erosion),
    "dilate": (dilate, ndimage.binary_dilation),
    "open": (open_disk, ndimage.binary_opening),
    "close": (close_disk, ndimage.binary_closing),
}
each_pair = pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)


def rings() -> np.ndarray:
    """Nested squares, one pixel thick, one pixel apart, up to the border."""
    y, x = np.mgrid[:45, :70]
    return np.minimum.reduce([y, x, 44 - y, 69 - x]) % 2 == 0


def masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    one = np.zeros((9, 130), bool)
    one[4, 64] = True
    borders = np.zeros((50, 128), bool)
    borders[[0, -1]], borders[:, [0, -1]], borders[10:20, 60:68] = True, True, True
    return {
        "empty": np.zeros((30, 65), bool),
        "full": np.ones((30, 64), bool),
        "one": one,
        "hole": ~one,
        "one row": rng.random((1, 200)) < 0.9,
        "one column": rng.random((200, 1)) < 0.9,
        "one pixel": np.ones((1, 1), bool),
        "diagonal": np.eye(67, 129, dtype=bool),
        "thick diagonal": ndimage.binary_dilation(np.eye(127, 63, dtype=bool)),
        "rings": rings(),
        "borders": borders,
        "sparse": rng.random((70, 191)) < 0.02,
        "half": rng.random((70, 192)) < 0.5,
        "dense": rng.random((70, 193)) < 0.98,
        "blobs": ndimage.gaussian_filter(rng.random((90, 150)), 3) > 0.5,
    }


@pytest.fixture(scope="module")
def nuclei() -> np.ndarray:
    """A mask of synthetic nuclei with a hundredth of the pixels flipped."""
    labels = SyntheticSlide(SlideSpec(width=4096, height=4096, mpp=0.5, coverage=1)).truth.labels(1500, 1500, 500, 460)
    return (labels > 0) ^ (np.random.default_rng(1).random(labels.shape) < 0.01)


@pytest.fixture
def threads() -> Iterator[Callable[[int | None], None]]:
    yield _threads.set_thread_count
    _threads.set_thread_count(None)


@each_pair
@pytest.mark.parametrize("radius", [0, 1, 2, 3, 5, 12])
@pytest.mark.parametrize("mask", masks().values(), ids=masks())
def test_equals_scipy(mask: np.ndarray, radius: int, ours: Callable, theirs: Callable) -> None:
    before = mask.copy()
    found = ours(mask, radius)
    assert found.dtype == np.bool_
    assert not np.shares_memory(found, mask)
    np.testing.assert_array_equal(found, theirs(mask, disk(radius)))
    np.testing.assert_array_equal(mask, before)


@each_pair
@settings(max_examples=60, deadline=None, derandomize=True)
@given(mask=arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=80)), radius=st.integers(0, 9))
def test_equals_scipy_on_any_mask(ours: Callable, theirs: Callable, mask: np.ndarray, radius: int) -> None:
    np.testing.assert_array_equal(ours(mask, radius), theirs(mask, disk(radius)))


@each_pair
@pytest.mark.parametrize("radius", [1, 2, 7])
def test_equals_scipy_on_nuclei(nuclei: np.ndarray, radius: int, ours: Callable, theirs: Callable) -> None:
    np.testing.assert_array_equal(ours(nuclei, radius), theirs(nuclei, disk(radius)))


def by_definition(name: str, mask: np.ndarray, radius: int) -> np.ndarray:
    """Dilation by laying the mask over itself, shifted to each place of the disk; erosion as its complement's."""
    for step in {"open": ["erode", "dilate"], "close": ["dilate", "erode"]}.get(name, [name]):
        flip = step == "erode"
        padded = np.pad(mask ^ flip, radius, constant_values=flip)
        wide = np.zeros_like(mask)
        for y, x in zip(*np.nonzero(disk(radius)), strict=True):
            wide |= padded[y : y + mask.shape[0], x : x + mask.shape[1]]
        mask = wide ^ flip
    return mask


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("radius", [31, 62, 63, 64, 65])  # packed words up to 63, distances from 64
def test_large_disks_follow_the_definition(name: str, radius: int) -> None:
    rng = np.random.default_rng(radius)
    few = np.ones((170, 199), bool)
    few[rng.integers(0, 170, 3), rng.integers(0, 199, 3)] = False
    for mask in (few, ~few, np.ones((150, 140), bool), np.zeros((5, 300), bool)):
        np.testing.assert_array_equal(PAIRS[name][0](mask, radius), by_definition(name, mask, radius))


@pytest.mark.parametrize("radius", [100, 10**6, 10**12])
@pytest.mark.parametrize("shape", [(20, 30), (1, 90), (90, 1)])
def test_a_disk_larger_than_the_mask(radius: int, shape: tuple[int, int]) -> None:
    mask = np.zeros(shape, bool)
    mask[0, -1] = True
    assert dilate(mask, radius).all()
    assert not dilate(np.zeros(shape, bool), radius).any()
    assert not erode(np.ones(shape, bool), radius).any()
    assert not open_disk(np.ones(shape, bool), radius).any()
    assert not close_disk(mask, radius).any()


@each_pair
@pytest.mark.parametrize("radius", [1, 2, 9, 63, 70])
def test_the_number_of_threads_changes_nothing(radius: int, ours: Callable, theirs: Callable, threads) -> None:
    smooth = ndimage.gaussian_filter(np.random.default_rng(2).random((1700, 90)), 2 + radius / 5)
    mask = smooth > np.median(smooth)  # of several bands, with detail of the disk's size across their edges
    threads(1)
    alone = ours(mask, radius)
    threads(3)
    np.testing.assert_array_equal(ours(mask, radius), alone)
    if radius < 10:
        np.testing.assert_array_equal(alone, theirs(mask, disk(radius)))


@each_pair
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint16, np.int64])
def test_integers_and_views(dtype: type, ours: Callable, theirs: Callable) -> None:
    values = np.random.default_rng(3).integers(-1, 3, (80, 140)).astype(dtype)
    view = values.T[::-1, ::2]
    view.flags.writeable = False
    np.testing.assert_array_equal(ours(view, 2), theirs(view != 0, disk(2)))
    mask = (values != 0)[::2, 5:-3]
    np.testing.assert_array_equal(ours(mask, np.int32(1)), theirs(mask, disk(1)))


@each_pair
@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (7, 0)])
@pytest.mark.parametrize("radius", [0, 2, 80])
def test_empty_arrays_stay_empty(shape: tuple[int, int], radius: int, ours: Callable, theirs: Callable) -> None:
    assert ours(np.zeros(shape, bool), radius).shape == shape


def test_the_outside_is_false() -> None:
    full = np.ones((12, 100), bool)
    inner = np.zeros_like(full)
    inner[2:-2, 2:-2] = True
    np.testing.assert_array_equal(erode(full, 2), inner)
    np.testing.assert_array_equal(close_disk(full, 2), inner)


def test_equals_the_golden_chain(shared_data: Path) -> None:
    golden = np.load(shared_data.parent / "golden" / "nuclei_postprocess.npz")
    mask = golden["mask"]
    for radius in (2, 1):
        mask = close_disk(open_disk(mask, radius), radius)
    np.testing.assert_array_equal(mask, golden["opened_closed"])


@pytest.mark.parametrize("call", [erode, dilate, open_disk, close_disk])
def test_refuses_bad_arguments(call: Callable) -> None:
    mask = np.zeros((4, 5), bool)
    with pytest.raises(TypeError, match=f"{call.__name__} takes a mask of bool or integers, not float32"):
        call(np.zeros((4, 5), np.float32), 1)
    with pytest.raises(ValueError, match=r"shape \(H, W\), not \(4, 5, 1\)"):
        call(mask[..., None], 1)
    with pytest.raises(TypeError, match=r"whole pixels, not 1\.5"):
        call(mask, 1.5)
    with pytest.raises(ValueError, match="at least 0, not -1"):
        call(mask, -1)
