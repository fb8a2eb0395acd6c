"""The chain from attention to nuclei against SciPy and scikit-image, step by step and as a whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.morphology import disk
from skimage.segmentation import watershed

from wsi_engine.kernels import nuclei_from_attention, set_thread_count
from wsi_engine.synthetic import SlideSpec, SyntheticSlide


def plain_chain(attention: NDArray[np.float32], threshold: float = 0.5) -> NDArray[np.int32]:
    mask = attention > threshold
    for radius in (2, 1):
        mask = ndimage.binary_opening(mask, disk(radius))
        mask = ndimage.binary_closing(mask, disk(radius))
    smoothed = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask).astype(np.float32), 1.0)
    peaks = peak_local_max(smoothed, footprint=disk(7), labels=mask.astype(int), exclude_border=False)
    markers = np.zeros(mask.shape, bool)
    markers[tuple(peaks.T)] = True
    return watershed(-smoothed, ndimage.label(markers, np.ones((3, 3)))[0], mask=mask).astype(np.int32)


@pytest.fixture(scope="module")
def attention() -> NDArray[np.float32]:
    slide = SyntheticSlide(SlideSpec(width=1600, height=1200, mpp=0.5, coverage=1, seed=4))
    labels = slide.truth.labels(300, 200, 600, 500)
    noise = np.random.default_rng(1).normal(0, 0.15, labels.shape)
    return np.clip(ndimage.gaussian_filter((labels > 0).astype(np.float32), 1) + noise, 0, 1).astype(np.float32)


def test_the_chain_equals_scipy_and_scikit_image(attention: NDArray[np.float32]) -> None:
    ours, theirs = nuclei_from_attention(attention), plain_chain(attention)
    assert ours.dtype == np.int32
    assert ours.max() == theirs.max() > 100
    assert (ours == theirs).mean() > 0.9999


def test_the_chain_equals_the_reference(shared_data: Path) -> None:
    golden = np.load(shared_data.parent / "golden" / "nuclei_postprocess.npz")
    labels = nuclei_from_attention(golden["mask"])
    assert np.array_equal(labels > 0, golden["labels"] > 0)
    assert labels.max() == golden["labels"].max()
    assert (labels == golden["labels"]).mean() > 0.999


def test_threads_do_not_change_labels(attention: NDArray[np.float32]) -> None:
    found = []
    for threads in (1, 3):
        set_thread_count(threads)
        found.append(nuclei_from_attention(attention))
    set_thread_count(None)
    assert np.array_equal(*found)


def test_labels_are_without_gaps_when_small_ones_go(attention: NDArray[np.float32]) -> None:
    all_of_them, large = nuclei_from_attention(attention), nuclei_from_attention(attention, min_area=60)
    sizes = np.bincount(all_of_them.ravel())[1:]
    assert (sizes < 60).any()
    assert large.max() == (sizes >= 60).sum()
    assert np.bincount(large.ravel())[1:].min() >= 60
    assert np.array_equal(large > 0, np.isin(all_of_them, 1 + np.flatnonzero(sizes >= 60)))


def test_holes_are_filled_when_asked() -> None:
    ring = np.zeros((60, 60), np.float32)
    rows, columns = np.mgrid[:60, :60]
    far = np.hypot(rows - 30, columns - 30)
    ring[(far < 20) & (far > 9)] = 1
    assert nuclei_from_attention(ring)[30, 30] == 0
    assert nuclei_from_attention(ring, fill=True)[30, 30] > 0


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_nothing_above_the_threshold_is_no_nucleus(value: float) -> None:
    assert not nuclei_from_attention(np.full((40, 30), value, np.float32)).any()


def test_the_threshold_is_in_the_values_of_the_map() -> None:
    image = np.zeros((50, 50), np.uint8)
    image[10:30, 10:30] = 100
    assert nuclei_from_attention(image, 99).max() == 1
    assert nuclei_from_attention(image, 100).max() == 0


def test_wrong_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        nuclei_from_attention(np.zeros((3, 4, 5)))
    with pytest.raises(ValueError, match="without NaN"):
        nuclei_from_attention(np.full((9, 9), np.nan))
