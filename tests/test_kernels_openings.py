"""Labels opened by a disk in proportion to each, against SciPy label by label."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from wsi_engine.kernels import label
from wsi_engine.kernels.components import find_components
from wsi_engine.kernels.openings import LARGEST_BOX, open_labels

Labels = NDArray[np.int32]


def open_each(labels: Labels, share: float) -> Labels:
    """The same by distance transforms of one label after the other."""
    out = np.zeros_like(labels)
    for number in np.unique(labels[labels > 0]):
        body = np.pad(labels == number, 1)
        depth = np.rint(ndimage.distance_transform_edt(body) ** 2)
        radius = min(share**2 * depth.max(), depth.max() - 1)  # squared, as the distances
        if radius >= 1:
            parts, _ = ndimage.label(depth > radius)
            core = parts == parts.ravel()[np.argmax(depth)]
            body &= np.rint(ndimage.distance_transform_edt(~core) ** 2) <= radius
        out[body[1:-1, 1:-1]] = number
    return out


def make_labels(seed: int, shape: tuple[int, int] = (160, 190)) -> Labels:
    """Lumps of many sizes, with tails, necks and holes, some of them touching."""
    rng = np.random.default_rng(seed)
    coarse, fine = (ndimage.gaussian_filter(rng.normal(size=shape), sigma) for sigma in (6, 1.5))
    labels = label(coarse / coarse.std() + 0.6 * fine / fine.std() > 0.3)
    cut = ndimage.gaussian_filter(rng.normal(size=shape), 9) > 0
    return np.where(cut & (labels > 0), labels + int(labels.max()), labels).astype(np.int32)


def open_copy(labels: Labels, share: float) -> Labels:
    out = labels.copy()
    open_labels(out, find_components(labels > 0, 8).runs, share)
    return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.2, 0.4, 0.7, 0.95, 1.0])
def test_labels_are_opened_as_by_scipy(seed: int, share: float) -> None:
    labels = make_labels(seed)
    opened = open_copy(labels, share)
    assert np.array_equal(opened, open_each(labels, share))
    assert set(np.unique(opened)) == set(np.unique(labels))  # none vanishes
    assert (opened != labels).any()
    assert np.array_equal(opened[opened > 0], labels[opened > 0])


def test_tails_go_and_disks_stay() -> None:
    y, x = np.mgrid[:60, :60]
    disk = (np.hypot(y - 25, x - 25) <= 12).astype(np.int32)
    with_tail = disk.copy()
    with_tail[24:27, 30:58] = 1
    assert (open_copy(disk, 0.4) != disk).sum() <= 4  # the tips of its raster
    opened = open_copy(with_tail, 0.4)
    assert not opened[:, 42:].any()
    assert (opened != disk).sum() < 15  # a little of where the tail began is left
    small = np.zeros((9, 9), np.int32)
    small[3:6, 2:8] = 1
    assert np.array_equal(open_copy(small, 0.4), small)  # its disk would be below a pixel


def test_a_label_stays_in_one_piece() -> None:
    y, x = np.mgrid[:40, :80]
    lobes = (np.hypot(y - 20, x - 18) <= 12) | (np.hypot(y - 20, x - 58) <= 14)
    lobes |= (abs(y - 20) <= 2) & (abs(x - 40) < 20)
    opened = open_copy(lobes.astype(np.int32), 0.4)
    assert opened[20, 58]  # in the deeper lobe
    assert not opened[20, 18]
    assert ndimage.label(opened)[1] == 1


def test_the_border_counts_as_outside() -> None:
    full = np.ones((30, 41), np.int32)
    assert np.array_equal(open_copy(full, 0.5), open_each(full, 0.5))
    assert not open_copy(full, 0.5)[0, 0]
    assert not open_copy(np.zeros((4, 5), np.int32), 0.5).any()


def test_labels_of_large_boxes_are_left_alone() -> None:
    labels = np.zeros((60, LARGEST_BOX + 40), np.int32)
    labels[5:25, 10 : LARGEST_BOX + 11] = 1  # a column too many
    labels[30:50, 10 : LARGEST_BOX + 10] = 2
    opened = open_copy(labels, 0.5)
    assert np.array_equal(opened == 1, labels == 1)
    assert not np.array_equal(opened == 2, labels == 2)
    assert np.array_equal(opened == 2, open_each(labels, 0.5) == 2)


def test_absent_labels_take_no_room() -> None:
    labels = np.zeros((3000, 3000), np.int32)
    labels[10:20, 10:20] = 5  # 1 … 4 are absent
    tracemalloc.start()
    opened = open_copy(labels, 0.5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(opened, open_each(labels, 0.5))
    assert peak < 2.5 * labels.nbytes  # the copy and the mask
