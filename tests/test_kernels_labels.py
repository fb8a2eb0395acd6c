"""Labelling, filling holes, removing small objects and relabelling, against SciPy, scikit-image and plain NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from skimage.morphology import remove_small_objects

from wsi_engine.kernels._threads import set_thread_count
from wsi_engine.kernels.labels import fill_holes, label, relabel, remove_small
from wsi_engine.synthetic import SlideSpec, SyntheticSlide

STRUCTURES = {4: ndimage.generate_binary_structure(2, 1), 8: np.ones((3, 3), bool)}


def rings(side: int) -> np.ndarray:
    """Squares within squares, one pixel apart."""
    y, x = np.mgrid[:side, :side]
    return np.minimum.reduce([y, x, side - 1 - y, side - 1 - x]) % 2 == 0


def spiral(side: int) -> np.ndarray:
    """One path of one pixel's width that winds inwards: the worst case for joining rows."""
    mask = np.zeros((side, side), bool)
    y, x, dy, dx = 0, 0, 0, 1
    while True:
        mask[y, x] = True
        ahead = (y + 2 * dy, x + 2 * dx)
        outside = not (0 <= y + dy < side and 0 <= x + dx < side)
        taken = all(0 <= c < side for c in ahead) and mask[ahead]
        if outside or taken:
            dy, dx = dx, -dy
            if not (0 <= y + dy < side and 0 <= x + dx < side) or mask[y + dy, x + dx] or mask[y + 2 * dy, x + 2 * dx]:
                return mask
        y, x = y + dy, x + dx


def nuclei() -> np.ndarray:
    """Nuclei with holes and specks in them."""
    slide = SyntheticSlide(SlideSpec(width=2048, height=2048, mpp=0.5, coverage=1))
    mask = slide.truth.labels(300, 500, 500, 400) > 0
    return mask ^ (np.random.default_rng(0).random(mask.shape) < 0.02)


def masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    grid = np.indices((9, 130)).sum(0) % 2 == 0
    comb = np.zeros((40, 131), bool)
    comb[:, ::2] = True
    comb[-1] = True
    return {
        "noise, thin": rng.random((57, 131)) < 0.3,
        "noise, near the threshold": rng.random((200, 150)) < 0.59,
        "noise, dense": rng.random((70, 64)) < 0.8,
        "nothing": np.zeros((20, 65), bool),
        "everything": np.ones((20, 64), bool),
        "a pixel": np.ones((1, 1), bool),
        "a pixel of none": np.zeros((1, 1), bool),
        "a row": rng.random((1, 200)) < 0.5,
        "a column": rng.random((200, 1)) < 0.5,
        "diagonals": np.eye(70, dtype=bool) | np.eye(70, dtype=bool)[::-1],
        "chequers": grid,
        "a comb": comb,
        "a comb on its head": comb[::-1],
        "rings": rings(67),
        "a spiral": spiral(63),
        "the border alone": np.pad(np.zeros((11, 62), bool), 1, constant_values=True),
        "all but the border": np.pad(np.ones((11, 62), bool), 1),
        "a view": (rng.random((90, 141)) < 0.5)[::-2, 1::3],
        "columns first": np.asfortranarray(rng.random((66, 40)) < 0.6),
        "nuclei": nuclei(),
    }


MASKS = masks()
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


@pytest.fixture
def some_threads() -> Iterator[None]:
    yield
    set_thread_count(None)


@pytest.mark.parametrize("connectivity", [4, 8])
@each_mask
def test_label_equals_scipy(mask: np.ndarray, connectivity: int) -> None:
    expected, count = ndimage.label(mask, STRUCTURES[connectivity])
    found = label(mask, connectivity)
    assert found.dtype == np.int32
    assert found.max() == count
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_any_number_but_zero_is_in_the_mask(dtype: type) -> None:
    values = np.random.default_rng(2).integers(0, 3, (30, 40)).astype(dtype)
    np.testing.assert_array_equal(label(values), ndimage.label(values, STRUCTURES[8])[0])
    np.testing.assert_array_equal(fill_holes(values), ndimage.binary_fill_holes(values))


@each_mask
def test_fill_holes_equals_scipy(mask: np.ndarray) -> None:
    before = mask.copy()
    found = fill_holes(mask)
    assert found.dtype == np.bool_
    np.testing.assert_array_equal(found, ndimage.binary_fill_holes(mask))
    np.testing.assert_array_equal(mask, before)


@pytest.mark.parametrize("max_area", [0, 1, 2.5, 40, 1e9])
@each_mask
def test_fill_holes_leaves_large_ones(mask: np.ndarray, max_area: float) -> None:
    holes, _ = ndimage.label(ndimage.binary_fill_holes(mask) & ~mask)
    small = np.bincount(holes.ravel()) <= max_area
    small[0] = False
    np.testing.assert_array_equal(fill_holes(mask, max_area), mask | small[holes])


@pytest.mark.parametrize("min_area", [0, 1, 2, 5.5, 30, 10**9])
@each_mask
def test_remove_small_from_a_mask(mask: np.ndarray, min_area: float) -> None:
    objects, _ = ndimage.label(mask, STRUCTURES[8])
    expected = mask & (np.bincount(objects.ravel()) >= min_area)[objects]
    found = remove_small(mask, min_area)
    assert found.dtype == np.bool_
    np.testing.assert_array_equal(found, expected)


def test_remove_small_equals_scikit_image() -> None:
    mask = MASKS["nuclei"]
    np.testing.assert_array_equal(remove_small(mask, 30), remove_small_objects(mask, max_size=29, connectivity=2))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint32])
@pytest.mark.parametrize("spread", [1, 7])
def test_remove_small_from_labels_counts_all_pieces(dtype: type, spread: int) -> None:
    labels = (np.random.default_rng(3).integers(0, 30, (31, 40)) * spread).astype(dtype)
    areas = np.bincount(labels.ravel().astype(int))
    found = remove_small(labels, 42)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, np.where(areas[labels] >= 42, labels, 0))
    assert 0 < len(np.unique(found)) - 1 < 29


def test_labels_beyond_the_number_of_pixels() -> None:
    labels = np.array([[2**31 - 1, 0, 9_000_000], [9_000_000, 5, 2**31 - 1], [4, 2**31 - 1, 0]])
    np.testing.assert_array_equal(relabel(labels), [[1, 0, 2], [2, 3, 1], [4, 1, 0]])
    np.testing.assert_array_equal(remove_small(labels, 2), np.where(labels > 5, labels, 0))
    np.testing.assert_array_equal(relabel(np.array([[2**31 - 1]])), [[1]])
    np.testing.assert_array_equal(remove_small(np.array([[2**31 - 1]]), 1), [[2**31 - 1]])


@pytest.mark.parametrize("spread", [1, 1000])
def test_relabel_numbers_in_raster_order(spread: int) -> None:
    labels = np.random.default_rng(4).permutation(60)[np.arange(600).reshape(20, 30) // 10] * spread
    view = labels[::-1, ::2]
    expected = np.zeros(view.shape, int)
    for number, value in enumerate((v for v in dict.fromkeys(view.ravel().tolist()) if v), 1):
        expected[view == value] = number
    found = relabel(view)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(relabel(found), found)


def test_labels_are_already_in_raster_order() -> None:
    labels = label(MASKS["nuclei"])
    np.testing.assert_array_equal(relabel(labels), labels)


@pytest.mark.usefixtures("some_threads")
@pytest.mark.parametrize("name", ["noise, near the threshold", "nuclei", "noise, thin"])
def test_threads_change_nothing(name: str) -> None:
    mask = np.tile(MASKS[name], (3, 1))
    results = []
    for count in (1, 2, 3):
        set_thread_count(count)
        results.append((label(mask, 4), label(mask), fill_holes(mask), fill_holes(mask, 3), remove_small(mask, 9)))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_empty_arrays_give_empty_results(shape: tuple[int, int]) -> None:
    for found in (
        label(np.zeros(shape, bool)),
        fill_holes(np.zeros(shape, bool)),
        remove_small(np.zeros(shape, bool), 3),
        remove_small(np.zeros(shape, np.int32), 3),
        relabel(np.zeros(shape, np.uint8)),
    ):
        assert found.shape == shape


@pytest.mark.parametrize("call", [label, fill_holes, relabel, lambda a: remove_small(a, 2)])
def test_wrong_arrays_are_refused(call) -> None:
    with pytest.raises(TypeError, match="not float32"):
        call(np.zeros((3, 3), np.float32))
    with pytest.raises(ValueError, match=r"\(H, W\), not \(3,\)"):
        call(np.zeros(3, np.int32))


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match="4 or 8, not 6"):
        label(np.zeros((3, 3), bool), 6)
    with pytest.raises(ValueError, match="at least 0 pixels, not -1"):
        fill_holes(np.zeros((3, 3), bool), -1)
    for area in (-1, float("nan")):
        with pytest.raises(ValueError, match="at least 0 pixels"):
            remove_small(np.zeros((3, 3), bool), area)
    for dtype in (np.int32, np.int64):
        for call in (relabel, lambda a: remove_small(a, 2)):
            with pytest.raises(ValueError, match="-4"):
                call(np.array([[1, -4]], dtype))


def test_the_golden_mask(shared_data: Path) -> None:
    golden = shared_data.parent / "golden" / "nuclei_postprocess.npz"
    if not golden.is_file():
        pytest.skip(f"needs {golden}")
    mask = np.load(golden)["opened_closed"]
    for connectivity, structure in STRUCTURES.items():
        np.testing.assert_array_equal(label(mask, connectivity), ndimage.label(mask, structure)[0])
