"""How two label images overlap: one sparse table of pairs, from which every nuclei metric follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import SettingsError

Labels = NDArray[np.integer[Any] | np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Nuclei:
    """The T objects of one label image, in ascending order of their ids.

    Attributes:
        ids: (T,), the labels as they stand in the image; never 0, not necessarily contiguous.
        areas: int64 (T,), pixels.
        boxes: int64 (T, 4), first row, first column, last row + 1, last column + 1.
    """

    ids: NDArray[Any]
    areas: Ints
    boxes: Ints

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Overlap:
    """Pairs of a true and a predicted object that share at least one pixel; K of them.

    Attributes:
        true, predicted: the objects of the two images.
        true_rows, predicted_rows: int64 (K,), which objects a pair joins; ascending by true, then by predicted.
        shared: int64 (K,), pixels in both.
    """

    true: Nuclei
    predicted: Nuclei
    true_rows: Ints
    predicted_rows: Ints
    shared: Ints

    @property
    def unions(self) -> Ints:
        """Pixels in either object of each pair, int64 (K,)."""
        both: Ints = self.true.areas[self.true_rows] + self.predicted.areas[self.predicted_rows] - self.shared
        return both

    @property
    def ious(self) -> Floats:
        """Intersection over union of each pair, float64 (K,), within (0, 1]."""
        ratio: Floats = self.shared / self.unions
        return ratio

    @property
    def empty(self) -> bool:
        """Whether neither image holds an object."""
        return not len(self.true) and not len(self.predicted)


def tabulate_overlap(true: Labels, predicted: Labels) -> Overlap:
    """Areas, bounding boxes and pairwise intersections of two label images, in one pass.

    Both images are cut along their rows into runs in which neither label changes. All that follows is over runs, of
    which there are a few dozen for each nucleus, so that time and memory hardly depend on the number of objects.

    Args:
        true: integer or bool (H, W); 0 is background, any other id an object, connected or not.
        predicted: the same shape.

    Raises:
        SettingsError: the images are not integer label images of one shape, or hold negative labels.
    """
    true, predicted = check_images(true, predicted)
    starts, lengths = _find_runs(true, predicted)
    true_values, predicted_values = true.reshape(-1)[starts], predicted.reshape(-1)[starts]
    width = max(1, true.shape[1])
    true_nuclei, true_index = _gather_nuclei(true_values, starts, lengths, width)
    predicted_nuclei, predicted_index = _gather_nuclei(predicted_values, starts, lengths, width)
    joint = (true_index >= 0) & (predicted_index >= 0)
    columns = max(1, len(predicted_nuclei))
    codes, places = np.unique(true_index[joint] * columns + predicted_index[joint], return_inverse=True)
    shared = np.bincount(places, weights=lengths[joint], minlength=len(codes)).astype(np.int64)
    return Overlap(true_nuclei, predicted_nuclei, codes // columns, codes % columns, shared)


def check_images(true: Labels, predicted: Labels) -> tuple[Labels, Labels]:
    """Both images as arrays, checked; bool masks become one object each."""
    arrays = []
    for name, image in (("true", np.asarray(true)), ("predicted", np.asarray(predicted))):
        if image.ndim != 2 or image.dtype.kind not in "iub":
            raise SettingsError(
                f"the {name} label image must be integers of shape (H, W), not {image.dtype} {image.shape}"
            )
        if image.dtype.kind == "i" and image.size and image.min() < 0:
            raise SettingsError(f"the {name} label image holds the negative label {image.min()}; use 0 for background")
        arrays.append(image.view(np.uint8) if image.dtype.kind == "b" else image)
    if arrays[0].shape != arrays[1].shape:
        raise SettingsError(
            f"the label images differ in shape: true {arrays[0].shape}, predicted {arrays[1].shape}; crop them alike"
        )
    return arrays[0], arrays[1]


def _find_runs(true: Labels, predicted: Labels) -> tuple[Ints, Ints]:
    """Where runs start in the flattened images, and their lengths; background runs are left out."""
    if not true.size:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    change = np.empty(true.shape, bool)
    change[:, 0] = True
    np.not_equal(true[:, 1:], true[:, :-1], out=change[:, 1:])
    change[:, 1:] |= predicted[:, 1:] != predicted[:, :-1]
    starts = np.flatnonzero(change)
    lengths = np.diff(starts, append=true.size)
    kept = (true.reshape(-1)[starts] != 0) | (predicted.reshape(-1)[starts] != 0)
    return starts[kept], lengths[kept]


def _gather_nuclei(values: NDArray[Any], starts: Ints, lengths: Ints, width: int) -> tuple[Nuclei, Ints]:
    """The objects of one image, and for each run the row of its object, -1 for background."""
    inside = np.flatnonzero(values)
    ids, places = np.unique(values[inside], return_inverse=True)
    index = np.full(len(values), -1, np.int64)
    index[inside] = places
    starts, lengths = starts[inside], lengths[inside]
    areas = np.bincount(places, weights=lengths, minlength=len(ids)).astype(np.int64)
    boxes = np.zeros((len(ids), 4), np.int64)
    if len(ids):
        order = np.argsort(places, kind="stable")
        firsts = np.searchsorted(places[order], np.arange(len(ids)))
        top, left = np.divmod(starts[order], width)
        boxes[:, 0] = np.minimum.reduceat(top, firsts)
        boxes[:, 1] = np.minimum.reduceat(left, firsts)
        boxes[:, 2] = np.maximum.reduceat(top, firsts) + 1
        boxes[:, 3] = np.maximum.reduceat(left + lengths[order], firsts)
    return Nuclei(ids, areas, boxes), index
