"""Outer contours of labelled regions as polygons along the edges between pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels._threads import run_parallel, split_rows
from wsi_engine.kernels.rings import simplify_ring
from wsi_engine.kernels.runs import LabelRuns, as_labels, find_runs

# Headings 0 … 3 are east, south, west, north (y down). The four pixels around a corner are numbered so that, heading d,
# pixel d lies ahead to the right, d + 1 behind to the right, d + 2 behind to the left, d + 3 ahead to the left.
STEP_X = np.array([1, 0, -1, 0])
STEP_Y = np.array([0, 1, 0, -1])
AROUND_X = np.array([0, -1, -1, 0])
AROUND_Y = np.array([0, 0, -1, -1])

# Marks on the pixels of a ring; bits 0 … 3 say that the ring has gone round a corner of the pixel, by heading.
LEFT_SIDE = np.uint8(16)
RIGHT_SIDE = np.uint8(32)


@dataclass(frozen=True, eq=False)
class Contours:
    """M rings; ring k is ``points[offsets[k]:offsets[k + 1]]``, its first point not repeated at its end.

    Attributes:
        label: int64 (M,), ascending; a label of several pieces stands several times.
        offsets: int64 (M + 1,).
        points: float64 (P, 2): x, y.
    """

    label: NDArray[np.int64]
    offsets: NDArray[np.int64]
    points: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.label)

    def ring(self, k: int) -> NDArray[np.float64]:
        """Points of ring ``k``: float64 (n, 2), x, y, a view."""
        return self.points[self.offsets[k] : self.offsets[k + 1]]


@compiled
def _has_label(labels: NDArray[np.int32], y: int, x: int, label: int) -> bool:
    return bool(0 <= y < labels.shape[0] and 0 <= x < labels.shape[1] and labels[y, x] == label)


@compiled
def _trace_ring(
    labels: NDArray[np.int32],
    row: int,
    column: int,
    marks: NDArray[np.uint8],
    points: NDArray[np.int32],
    pinches: NDArray[np.int32],
    turned: NDArray[np.int32],
) -> int:
    """Walk round the piece whose first pixel is (row, column), the piece on the right hand; returns the corners.

    At a corner where two pixels of the label touch diagonally, the walk stays on its pixel. Coming to such a corner a
    second time, it has walked round a hole that opens only through that corner; the way round the hole is cut off. Such
    loops are nested, so a stack of the corners (``pinches``, indices of points) finds where each began.
    ``turned`` lists the marked pixels, for their corner marks to be wiped.
    """
    label = labels[row, column]
    y, x, heading = row, column, 0
    points[0, 0], points[0, 1] = x, y
    count, depth, touched = 1, 0, 0
    while True:
        x += STEP_X[heading]
        y += STEP_Y[heading]
        if x == column and y == row:
            break
        ahead = (heading + 3) & 3
        left_y, left_x = y + AROUND_Y[ahead], x + AROUND_X[ahead]
        right = _has_label(labels, y + AROUND_Y[heading], x + AROUND_X[heading], label)
        left = _has_label(labels, left_y, left_x, label)
        if right and not left:
            continue
        points[count, 0], points[count, 1] = x, y
        count += 1
        if right:
            heading = ahead
            continue
        if left:
            if marks[left_y, left_x] & np.uint8(1 << ((heading + 2) & 3)):
                depth -= 1
                while depth > 0 and (points[pinches[depth], 0] != x or points[pinches[depth], 1] != y):
                    depth -= 1
                count = pinches[depth] + 1
            else:
                behind = (heading + 1) & 3
                own_y, own_x = y + AROUND_Y[behind], x + AROUND_X[behind]
                marks[own_y, own_x] |= np.uint8(1 << heading)
                turned[touched, 0], turned[touched, 1] = own_y, own_x
                pinches[depth] = count - 1
                touched += 1
                depth += 1
        heading = (heading + 1) & 3
    for k in range(touched):
        marks[turned[k, 0], turned[k, 1]] &= LEFT_SIDE | RIGHT_SIDE
    return count


@compiled
def _mark_sides(points: NDArray[np.int32], count: int, marks: NDArray[np.uint8]) -> None:
    """Mark the pixels on the inner side of the ring's vertical edges."""
    for k in range(count):
        x, y = points[k, 0], points[k, 1]
        end = points[k + 1 if k + 1 < count else 0, 1]
        for inner in range(y, end):  # downwards: the inside is to the west
            marks[inner, x - 1] |= RIGHT_SIDE
        for inner in range(end, y):
            marks[inner, x] |= LEFT_SIDE


@compiled
def _trace_loop(
    labels: NDArray[np.int32],
    spans: NDArray[np.int32],
    starts: NDArray[np.int64],
    first: int,
    stop: int,
    tolerance: float,
    marks: NDArray[np.uint8],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Rings of the labels numbered first … stop − 1: numbers of the labels, points of each ring, all points (P, 2)."""
    begin, end = starts[first], starts[stop]
    longest = np.int64(0)
    for k in range(first, stop):
        longest = max(longest, starts[k + 1] - starts[k])
    # Each run has two vertical sides, and a ring turns only at their ends.
    points = np.empty((4 * (end - begin), 2), np.int32)
    pinches, turned = np.empty(4 * longest, np.int32), np.empty((4 * longest, 2), np.int32)
    owner, sizes = np.empty(end - begin, np.int64), np.empty(end - begin, np.int64)
    rings, at = 0, 0
    for k in range(first, stop):
        row, inside = np.int32(-1), False
        for r in range(starts[k], starts[k + 1]):
            y, x = spans[r, 0], spans[r, 1]
            if y != row:
                row, inside = y, False
            # A run whose left side is on no ring, met outside of all rings of its label, begins a new piece.
            if not inside and not marks[y, x] & LEFT_SIDE:
                ring = points[at:]
                count = _trace_ring(labels, y, x, marks, ring, pinches, turned)
                _mark_sides(ring, count, marks)
                if tolerance > 0:
                    count = simplify_ring(ring, count, tolerance)
                owner[rings], sizes[rings] = k, count
                rings += 1
                at += count
            inside = not marks[y, spans[r, 2] - 1] & RIGHT_SIDE
    return owner[:rings], sizes[:rings], points[:at]


def trace_contours(
    labels: NDArray[Any],
    *,
    offset: tuple[float, float] = (0, 0),
    scale: float = 1.0,
    simplify: float = 0.0,
    runs: LabelRuns | None = None,
) -> Contours:
    """Outer contours of every label but 0, as polygons along the edges between pixels.

    Pixel (row r, column c) covers x from c to c + 1 and y from r to r + 1, so coordinates are those of pixel corners.
    A label has one ring for each of its pieces connected through pixel sides (4-connected), in raster order of their
    first pixels; pixels that touch only at a corner are two pieces. Filling the rings gives the label's pixels back,
    with the holes of each piece filled; a hole is what is not connected to the outside of the piece through pixel
    sides. Pieces inside a hole of another piece of the same label have no ring of their own, since filling covers them.
    So every ring is a valid polygon, which neither crosses nor touches itself, and those of a label do not overlap.

    Rings have a positive area by the shoelace formula on (x, y): counter-clockwise where y goes up, as GeoJSON asks of
    exterior rings, and clockwise as seen on a picture, where y goes down. Collinear points are left out always.

    Args:
        labels: bool or integer (H, W), at least 0; 0 is background. May be empty.
        offset: x, y of the upper left corner of ``labels`` in the output, in output units (level-0 pixels).
        scale: output units per pixel of ``labels``.
        simplify: points may be dropped where the outline moves by no more than this, in pixels of ``labels``
            (Douglas-Peucker); 0 keeps the exact outline. A ring that would cross or touch itself, or vanish, is
            simplified less. Neighbouring rings may then overlap a little.
        runs: those of ``labels``, where they are known; None finds them.

    Returns:
        ``Contours``, rings in ascending order of labels.

    Raises:
        TypeError: ``labels`` is not bool or integer.
        ValueError: ``labels`` is not (H, W), a label is negative or above 2³¹ − 1, ``offset`` is not two finite
            numbers, ``scale`` is not finite and above 0, or ``simplify`` not finite and at least 0.

    Complexity: O(H·W + length of the outlines) without simplification. Groups of labels are shared by threads; the
    result does not depend on how many.

    Source: crack following after A. Rosenfeld and A. Kak, "Digital Picture Processing", Academic Press 1982, ch. 11;
    GeoJSON: RFC 7946, section 3.1.6.
    """
    labels = as_labels(labels, "trace_contours")
    corner = np.asarray(offset, dtype=np.float64)
    if corner.shape != (2,) or not np.isfinite(corner).all():
        raise ValueError(f"trace_contours takes an offset of two finite numbers, x and y, not {offset}")
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"trace_contours takes a finite scale above 0, not {scale}")
    if not (np.isfinite(simplify) and simplify >= 0):
        raise ValueError(f"trace_contours takes a finite tolerance of at least 0 to simplify by, not {simplify}")
    found = find_runs(labels, "trace_contours") if runs is None else runs
    if not len(found.label):
        return Contours(np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros((0, 2)))
    owners, sizes, points = _trace_groups(labels, found, float(simplify))
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return Contours(found.label[owners], offsets, points * float(scale) + corner)


def _trace_groups(
    labels: NDArray[np.int32], found: LabelRuns, tolerance: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Rings of all labels: number of the label and points of each ring, and all points."""
    marks = np.zeros(labels.shape, np.uint8)  # each label writes on its own pixels only
    groups = split_rows(len(found.label))
    parts = run_parallel(_trace_loop, [(labels, found.runs, found.starts, a, b, tolerance, marks) for a, b in groups])
    owners, sizes, points = zip(*parts, strict=True)
    return np.concatenate(owners), np.concatenate(sizes), np.concatenate(points)
