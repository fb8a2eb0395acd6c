"""The watershed against scikit-image where no tie between markers is possible, and against plain Python everywhere."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from skimage import segmentation

from wsi_engine.kernels._threads import set_thread_count
from wsi_engine.kernels.watersheds import watershed
from wsi_engine.synthetic import SlideSpec, SyntheticSlide

STEPS = [(-1, 0), (0, -1), (0, 1), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]


@pytest.fixture
def some_threads() -> Iterator[None]:
    yield
    set_thread_count(None)


def by_heap(image: np.ndarray, markers: np.ndarray, mask: np.ndarray, connectivity: int = 4) -> np.ndarray:
    """The rule as it is documented: a heap of (level, age, pixel), the markers' ages in raster order."""
    out = np.where(mask, markers, 0).astype(np.int32)
    heap = [(float(image[y, x]), age, int(y), int(x)) for age, (y, x) in enumerate(np.argwhere(out))]
    age = len(heap)
    heapq.heapify(heap)
    while heap:
        level, _, y, x = heapq.heappop(heap)
        for dy, dx in STEPS[:connectivity]:
            v, u = y + dy, x + dx
            if 0 <= v < mask.shape[0] and 0 <= u < mask.shape[1] and mask[v, u] and not out[v, u]:
                out[v, u] = out[y, x]
                heapq.heappush(heap, (max(level, float(image[v, u])), age, v, u))
                age += 1
    return out


def by_scikit_image(image: np.ndarray, markers: np.ndarray, mask: np.ndarray, connectivity: int = 4) -> np.ndarray:
    found: np.ndarray = segmentation.watershed(image, markers, mask=mask, connectivity=1 if connectivity == 4 else 2)
    return found


def scatter(shape: tuple[int, ...], count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` markers of one pixel each, in no order; fewer where two fall on one pixel."""
    markers = np.zeros(shape, np.int32)
    markers[tuple(rng.integers(0, side, count) for side in shape)] = rng.permutation(count) + 1
    return markers


def without_ties(image: np.ndarray, markers: np.ndarray) -> np.ndarray:
    """The image, whole numbers, with half and less subtracted at the markers so that no two of them are equal."""
    out = image.astype(np.float64)
    places = np.flatnonzero(markers)
    out.flat[places] -= 0.5 * np.random.default_rng(9).permutation(len(places)) / max(1, len(places))
    return out


def nuclei() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Touching nuclei of a synthetic slide: image, markers of several pixels each, mask."""
    slide = SyntheticSlide(SlideSpec(width=2048, height=2048, mpp=0.5, coverage=1))
    mask = ndimage.binary_dilation(slide.truth.labels(300, 500, 500, 400) > 0, iterations=2)
    height = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), 1)
    peaks = (ndimage.maximum_filter(height, 9) == height) & mask
    return -height, ndimage.label(peaks, np.ones((3, 3)))[0], mask


MASKS = {
    "everything": np.ones((40, 50), bool),
    "noise": np.random.default_rng(0).random((60, 70)) < 0.7,
    "sparse noise": np.random.default_rng(1).random((60, 70)) < 0.45,
    "nothing": np.zeros((12, 9), bool),
    "a pixel": np.ones((1, 1), bool),
    "a row": np.random.default_rng(2).random((1, 150)) < 0.9,
    "a column": np.random.default_rng(3).random((150, 1)) < 0.9,
    "stairs": np.eye(90, dtype=bool) | np.eye(90, k=1, dtype=bool) | np.eye(90, k=30, dtype=bool),
    "a frame": np.pad(np.zeros((60, 80), bool), 1, constant_values=True),
    "frames": np.minimum(*np.indices((40, 40))) % 2 == 0,
}
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("values", [1, 2, 9, 100_000])
@each_mask
def test_equals_scikit_image_where_markers_do_not_tie(mask: np.ndarray, values: int, connectivity: int) -> None:
    rng = np.random.default_rng(values)
    for count in (1, 5, 40):
        markers = scatter(mask.shape, count, rng)
        image = without_ties(rng.integers(-values, values, mask.shape), markers)
        expected = by_scikit_image(image, markers, mask, connectivity)
        found = watershed(image, markers, mask, connectivity=connectivity)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("values", [1, 3, 1000])
@each_mask
def test_ties_of_markers_go_by_raster_order(mask: np.ndarray, values: int, connectivity: int) -> None:
    rng = np.random.default_rng(values + 50)
    image = rng.integers(0, values, mask.shape)
    markers = rng.integers(1, 6, mask.shape) * (rng.random(mask.shape) < 0.05)
    found = watershed(image, markers, mask, connectivity=connectivity)
    np.testing.assert_array_equal(found, by_heap(image, markers, mask, connectivity))


@pytest.mark.parametrize(
    "dtype", [np.bool_, np.uint8, np.int16, np.uint32, np.int32, np.int64, np.float16, np.float32, np.float64]
)
def test_every_kind_of_number(dtype: type) -> None:
    rng = np.random.default_rng(7)
    image = (rng.integers(0, 2 if dtype is np.bool_ else 120, (45, 67))).astype(dtype)
    mask = rng.random(image.shape) < 0.8
    markers = scatter(image.shape, 30, rng)
    np.testing.assert_array_equal(watershed(image, markers, mask), by_heap(image, markers, mask))


def test_values_are_compared_exactly() -> None:
    """Neighbouring floats, numbers of every size and sign, both zeros, infinities."""
    rng = np.random.default_rng(8)
    close = np.float32(1) + rng.integers(0, 50, (40, 40)).astype(np.float32) * np.finfo(np.float32).eps
    wide = rng.choice(
        [-np.inf, -1e300, -1.0, -5e-324, -0.0, 0.0, 5e-324, 1e-300, 1.0, 1 + 2e-16, 1e300, np.inf], (40, 40)
    )
    large = 2**31 - rng.integers(0, 9, (40, 40), dtype=np.int64)
    mask = rng.random((40, 40)) < 0.8
    markers = scatter(mask.shape, 25, rng)
    for image in (close, -close, wide, large):
        np.testing.assert_array_equal(watershed(image, markers, mask), by_heap(image, markers, mask))


def test_many_values() -> None:
    rng = np.random.default_rng(10)
    image = rng.permutation(560 * 520).reshape(560, 520).astype(np.float32)
    image[:, 300:] = -image[:, 300:]
    markers = scatter(image.shape, 200, rng)
    np.testing.assert_array_equal(watershed(image, markers), segmentation.watershed(image, markers))


@pytest.mark.parametrize("connectivity", [4, 8])
def test_nuclei_equal_scikit_image_but_for_ties_of_markers(connectivity: int) -> None:
    image, markers, mask = nuclei()
    expected = by_scikit_image(image, markers, mask, connectivity)
    found = watershed(image, markers, mask, connectivity=connectivity)
    assert expected.max() > 100
    assert (found != expected).mean() < 1e-4
    np.testing.assert_array_equal(found, by_heap(image, markers, mask, connectivity))


def test_golden_file(shared_data: Path) -> None:
    """Kept as float32 the heights have a tie that they did not have as float64: scikit-image differs there as well."""
    path = shared_data.parent / "golden" / "nuclei_postprocess.npz"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    golden = np.load(path)
    mask, markers = golden["opened_closed"], golden["markers"]
    found = watershed(-golden["smoothed"], markers, mask)
    assert (found == golden["labels"]).mean() >= 0.999
    assert len(np.unique(found)) == len(np.unique(golden["labels"]))
    np.testing.assert_array_equal(found, segmentation.watershed(-golden["smoothed"], markers, mask=mask))
    smoothed = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), 1)
    np.testing.assert_array_equal(watershed(-smoothed, markers, mask), golden["labels"])


@pytest.mark.usefixtures("some_threads")
def test_threads_change_nothing() -> None:
    rng = np.random.default_rng(11)
    image, markers, mask = nuclei()
    inputs = [
        (image, markers, mask),
        (image, markers, None),
        (rng.integers(0, 4, (300, 200)), scatter((300, 200), 2000, rng), rng.random((300, 200)) < 0.6),
    ]
    for values, seeds, inside in inputs:
        set_thread_count(1)
        alone = watershed(values, seeds, inside)
        for count in (2, 3):
            set_thread_count(count)
            np.testing.assert_array_equal(watershed(values, seeds, inside), alone)


def test_components_do_not_know_of_one_another() -> None:
    image, markers, mask = nuclei()
    whole = watershed(image, markers, mask)
    pieces, count = ndimage.label(mask)
    for piece in range(1, count + 1, 7):
        own = pieces == piece
        np.testing.assert_array_equal(watershed(image, markers, own), np.where(own, whole, 0))


def test_views_and_read_only_arrays_are_taken_and_left_alone() -> None:
    rng = np.random.default_rng(12)
    image, mask = rng.random((90, 120))[::-2, ::3], (rng.random((40, 45)) < 0.8).T
    markers = np.asfortranarray(scatter(image.shape, 50, rng).astype(np.uint8))
    copies = [a.copy() for a in (image, markers, mask)]
    for array in (image, markers, mask):
        array.flags.writeable = False
    np.testing.assert_array_equal(watershed(image, markers, mask), by_heap(*copies))
    for array, copy in zip((image, markers, mask), copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_what_is_outside_of_the_mask_does_not_count() -> None:
    image = np.array([[0.0, np.nan, 2.0, 1.0]])
    markers = np.array([[0, -7, 3, 0]])
    np.testing.assert_array_equal(watershed(image, np.maximum(markers, 0), image == image), [[0, 0, 3, 3]])
    np.testing.assert_array_equal(watershed(image, markers.astype(np.int32), image == image), [[0, 0, 3, 3]])


def test_large_labels() -> None:
    markers = np.array([[2**31 - 1, 0, 0, 0, 5]])
    np.testing.assert_array_equal(watershed(np.zeros((1, 5)), markers), [[2**31 - 1] * 3 + [5, 5]])


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (7, 0)])
def test_empty_arrays_give_empty_labels(shape: tuple[int, int]) -> None:
    found = watershed(np.zeros(shape), np.zeros(shape, int), np.zeros(shape, bool))
    assert found.shape == shape
    assert found.dtype == np.int32


FLAT, SEEDS = np.zeros((3, 4)), np.ones((3, 4), np.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((FLAT.astype(complex), SEEDS), TypeError, "complex128"),
        ((FLAT, SEEDS.astype(float)), TypeError, "float64"),
        ((FLAT, SEEDS, FLAT), TypeError, "float64"),
        ((FLAT[0], SEEDS), ValueError, r"\(H, W\), not \(4,\)"),
        ((FLAT, SEEDS[:2]), ValueError, "of one shape"),
        ((FLAT, SEEDS, np.ones((4, 3), bool)), ValueError, "of one shape"),
        ((FLAT, -SEEDS), ValueError, "at least 0"),
        ((FLAT, -SEEDS.astype(np.int64)), ValueError, "-1"),
        ((FLAT + np.nan, SEEDS), ValueError, "NaN"),
        ((np.where(np.eye(3, 4) > 0, np.float32(np.nan), 1), SEEDS * 0), ValueError, "NaN"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        watershed(*arguments)


def test_a_wrong_connectivity_is_refused() -> None:
    with pytest.raises(ValueError, match="4 or 8, not 1"):
        watershed(FLAT, SEEDS, connectivity=1)
