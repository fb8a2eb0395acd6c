"""From components to nuclei: many components at a time on a sheet, far enough apart that none knows of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels import measure_regions, trace_contours
from wsi_engine.kernels.contours import Contours
from wsi_engine.kernels.pieces import lay_shelves, paint_sheet
from wsi_engine.kernels.regions import RegionTable
from wsi_engine.kernels.runs import find_runs
from wsi_engine.kernels.stains import HE_RESIDUAL, OPTICAL_DENSITY, inverse_of_stains
from wsi_engine.kernels.tallies import sum_stains
from wsi_engine.nuclei.method import FittedMethod
from wsi_engine.nuclei.pieces import Pieces

SHEET_PX = 1 << 21
"""Pixels of the bounding boxes that are gathered before a sheet is worked on; one component may have more."""

_SHEET_WIDTH = 2048
_SHARES = np.ascontiguousarray(inverse_of_stains(HE_RESIDUAL)[:, :2].T[..., None] * OPTICAL_DENSITY)
"""What each byte of red, green and blue adds to haematoxylin and eosin: float64 (2, 3, 256)."""


@dataclass(frozen=True, eq=False)
class NucleiChunk:
    """Some nuclei, in pixels of the frame.

    Attributes:
        first: int64 (m, 2), row and column of each nucleus's first pixel in raster order.
        centroid: float64 (m, 2), x and y; the first pixel spans 0 … 1.
        shapes: float32 (m, 6): area, perimeter, long axis, short axis, eccentricity, solidity.
        values: float32 (m, 5): mean and deviation of haematoxylin and of eosin, mean of map 0.
        offsets: int64 (m + 1,), of the contours.
        points: int32 (P, 2), x and y of corners of pixels.
    """

    first: NDArray[np.int64]
    centroid: NDArray[np.float64]
    shapes: NDArray[np.float32]
    values: NDArray[np.float32]
    offsets: NDArray[np.int64]
    points: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.first)


class SheetSplitter:
    """Gathers components and splits them into nuclei, a sheet at a time."""

    def __init__(self, fitted: FittedMethod, gap_px: int) -> None:
        self._fitted, self._gap = fitted, gap_px
        self._waiting: list[Pieces] = []
        self._area = 0

    def add(self, pieces: Pieces) -> NucleiChunk | None:
        """Take components; returns nuclei when there is enough for a sheet."""
        self._waiting.append(pieces)
        heights, widths = (pieces.boxes[:, 2 + axis] - pieces.boxes[:, axis] for axis in (0, 1))
        self._area += int((heights * widths).sum())
        return self.flush() if self._area >= SHEET_PX else None

    def flush(self) -> NucleiChunk | None:
        """Split what is left; None where there is nothing."""
        if not self._waiting:
            return None
        parts, self._waiting, self._area = self._waiting, [], 0
        return split_pieces(parts, self._fitted, self._gap)


@dataclass(frozen=True)
class _Sheet:
    """Where components lie on a sheet: height and width of it, place and shift (n, 2) of each, and their order."""

    height: int
    width: int
    places: NDArray[np.int64]
    shifts: NDArray[np.int64]
    order: NDArray[np.int64]

    @classmethod
    def lay(cls, boxes: NDArray[np.int64], gap: int) -> _Sheet:
        """Lay boxes (n, 4) on shelves."""
        sizes = boxes[:, 2:] - boxes[:, :2]
        width = int(max(_SHEET_WIDTH, sizes[:, 1].max() + 2 * gap))
        places = np.empty((len(boxes), 2), np.int64)
        order = np.argsort(-sizes[:, 0], kind="stable")
        height = lay_shelves(sizes, order, width, gap, places)
        return cls(height, width, places, places - boxes[:, :2], order)

    def find(self, y: NDArray[np.int64], x: NDArray[np.int64]) -> NDArray[np.int64]:
        """The component whose box holds each pixel: the last on its shelf that begins at or before it."""
        shelves = np.unique(self.places[:, 0])
        shelf = shelves[np.searchsorted(shelves, y, "right") - 1]
        keys = self.places[self.order] @ np.array([self.width, 1])  # ascending: so they were laid
        out: NDArray[np.int64] = self.order[np.searchsorted(keys, shelf * self.width + x, "right") - 1]
        return out


def split_pieces(parts: Sequence[Pieces], fitted: FittedMethod, gap: int) -> NucleiChunk:
    """Nuclei of complete components, laid on one sheet."""
    sheet = _Sheet.lay(np.concatenate([part.boxes for part in parts]), gap)
    shifts = np.split(sheet.shifts, np.cumsum([len(part) for part in parts])[:-1])
    mask = np.zeros((sheet.height, sheet.width), np.bool_)
    fields = np.zeros((len(parts[0].maps), sheet.height, sheet.width), np.float32)
    for part, shift in zip(parts, shifts, strict=True):
        paint_sheet(part.runs, part.starts, shift, part.maps, mask, fields)
    labels = fitted.split(fields, mask)
    runs = find_runs(labels, "split_pieces")
    table, contours = measure_regions(labels, runs=runs), _outer_contours(trace_contours(labels, runs=runs))
    corner = contours.points[contours.offsets[:-1]].astype(np.int64)  # a contour begins at its first pixel
    moved = sheet.shifts[sheet.find(corner[:, 1], corner[:, 0])]
    lengths = np.diff(contours.offsets)
    return NucleiChunk(
        first=corner[:, ::-1] - moved,
        centroid=_move_centroids(table, moved),
        shapes=_shapes(table),
        values=_measure_values(labels, parts, shifts, table.label),
        offsets=contours.offsets,
        points=(contours.points - np.repeat(moved[:, ::-1], lengths, axis=0)).astype(np.int32),
    )


def _move_centroids(table: RegionTable, moved: NDArray[np.int64]) -> NDArray[np.float64]:
    """Centroids off the sheet, x and y: rounded in their new place alone, or the place on the sheet would show."""
    corner, area = table.bbox[:, :2], table.area[:, None]
    sums = np.rint((table.centroid - corner) * area)
    out: NDArray[np.float64] = (corner - moved + (sums / area + 0.5))[:, ::-1]
    return out


def _shapes(table: RegionTable) -> NDArray[np.float32]:
    columns = (table.area, table.perimeter, table.axis_major, table.axis_minor, table.eccentricity, table.solidity)
    return np.stack(columns, axis=1).astype(np.float32)


def _measure_values(
    labels: NDArray[np.int32], parts: Sequence[Pieces], shifts: Sequence[NDArray[np.int64]], ids: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Values in each nucleus, but for holes that were filled: they have no colour here."""
    sums = np.zeros((int(ids.max(initial=0)) + 1, 6))
    for part, shift in zip(parts, shifts, strict=True):
        sum_stains(labels, part.runs, part.starts, shift, part.pixels, part.maps[0], _SHARES, sums)
    count = np.maximum(sums[ids, :1], 1)
    means = sums[ids][:, (1, 3, 5)] / count
    spread = np.sqrt(np.maximum(sums[ids][:, (2, 4)] / count - means[:, :2] ** 2, 0))
    columns = (means[:, 0], spread[:, 0], means[:, 1], spread[:, 1], means[:, 2])
    return np.stack(columns, axis=1).astype(np.float32)


def _outer_contours(contours: Contours) -> Contours:
    """One ring for each label, the first of the largest ones, where a label is in several pieces."""
    if len(np.unique(contours.label)) == len(contours):
        return contours
    x, y = contours.points[:, 0], contours.points[:, 1]
    after = np.arange(1, len(x) + 1)
    after[contours.offsets[1:] - 1] = contours.offsets[:-1]
    twice = np.add.reduceat(x * y[after] - x[after] * y, contours.offsets[:-1])
    order = np.lexsort((np.arange(len(contours)), -twice, contours.label))
    chosen = np.sort(order[np.concatenate([[True], np.diff(contours.label[order]) > 0])])
    sizes = np.diff(contours.offsets)[chosen]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    places = np.repeat(contours.offsets[chosen] - offsets[:-1], sizes) + np.arange(offsets[-1])
    return Contours(contours.label[chosen], offsets, contours.points[places])
