"""The nuclei of one slide: outlines, places and measurements, in an order that no tiling can change."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import SettingsError
from wsi_engine.kernels.pieces import fill_polygons
from wsi_engine.nuclei.neighbours import NEIGHBOUR_UM, count_neighbours
from wsi_engine.nuclei.sheets import NucleiChunk

MEASUREMENTS = (
    "perimeter_um",
    "axis_major_um",
    "axis_minor_um",
    "eccentricity",
    "solidity",
    "haematoxylin_mean",
    "haematoxylin_sd",
    "eosin_mean",
    "eosin_sd",
    "neighbours",
)
"""Measurements of every nucleus beside its place, area and score.

Lengths are in µm; stains in optical density by the vectors of Ruifrok and Johnston; ``neighbours`` counts the nuclei
whose centroids are within 50 µm.
"""

_PERCENTILES = (5, 25, 75, 95)
_MOST_PIXELS = 1 << 31


@dataclass(frozen=True)
class InstanceRecord:
    """Where nuclei come from.

    Attributes:
        slide: its name.
        dimensions: width and height of level 0 in pixels.
        mpp: micrometres per level-0 pixel, x and y.
        method: name of the method.
        method_settings: everything that changes its results.
        fitted: what the method found in samples of the slide.
        method_mpp: micrometres per pixel of its maps, whose edges outlines follow.
        tissue_mm2: area that was looked at.
        tissue_digest: of the tissue mask; empty where all of the slide was looked at.
        cut_components: fields of touching nuclei so large that they were cut along a lattice.
    """

    slide: str
    dimensions: tuple[int, int]
    mpp: tuple[float, float]
    method: str
    method_settings: dict[str, Any]
    fitted: dict[str, Any]
    method_mpp: float
    tissue_mm2: float
    tissue_digest: str = ""
    cut_components: int = 0

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return asdict(self) | {"dimensions": list(self.dimensions), "mpp": list(self.mpp)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> InstanceRecord:
        """The record that :meth:`to_json` described."""
        width, height = value["dimensions"]
        x, y = value["mpp"]
        return cls(**{**value, "dimensions": (int(width), int(height)), "mpp": (float(x), float(y))})


@dataclass(frozen=True, eq=False)
class InstanceSet:
    """M nuclei of a slide, in raster order of their first pixels; nucleus k has the id k + 1.

    Attributes:
        offsets: int64 (M + 1,): the contour of nucleus k is ``points[offsets[k]:offsets[k + 1]]``.
        points: float32 (P, 2), x and y in level-0 pixels, the first point not repeated; outlines follow the edges of
            the method's pixels exactly, have a positive area by the shoelace formula, and never cross.
        centroid: float64 (M, 2), x and y in level-0 pixels.
        area: float32 (M,), µm².
        score: float32 (M,): mean over the nucleus of how surely the method calls a pixel nucleus.
        measurements: float32 (M,) for each name of :data:`MEASUREMENTS`.
        record: where they come from.
    """

    offsets: NDArray[np.int64]
    points: NDArray[np.float32]
    centroid: NDArray[np.float64]
    area: NDArray[np.float32]
    score: NDArray[np.float32]
    measurements: Mapping[str, NDArray[np.float32]] = field(repr=False)
    record: InstanceRecord

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __repr__(self) -> str:
        return f"<InstanceSet {self.record.slide}: {len(self)} nuclei by {self.record.method}>"

    def contour(self, k: int) -> NDArray[np.float32]:
        """Contour of nucleus ``k``: float32 (n, 2), x and y in level-0 pixels, a view."""
        return self.points[self.offsets[k] : self.offsets[k + 1]]

    def labels(
        self, shape: tuple[int, int] | None = None, region: tuple[int, int, int, int] | None = None
    ) -> NDArray[np.int32]:
        """Label image: 0 background, nucleus k as k + 1, holes filled.

        Args:
            shape: rows and columns of the image; None for one pixel per level-0 pixel.
            region: x, y, width, height in level-0 pixels that the image covers; None for the whole slide.

        Returns:
            int32 ``shape``; a pixel belongs to the nucleus that its centre lies in.

        Raises:
            SettingsError: the shape or the region is empty, or the image would have 2³¹ pixels or more.
        """
        x, y, width, height = region or (0, 0, *self.record.dimensions)
        rows, columns = shape or (height, width)
        if min(rows, columns, width, height) < 1 or rows * columns >= _MOST_PIXELS:
            raise SettingsError(
                f"a label image of {rows} × {columns} pixels cannot be made; ask for a smaller shape, or for a region"
            )
        scale = np.array([columns / width, rows / height])
        out = np.zeros((rows, columns), np.int32)
        fill_polygons(self.offsets, (self.points - np.array([x, y], np.float64)) * scale, out)
        return out

    def table(self) -> dict[str, NDArray[Any]]:
        """One column per measurement, (M,) each: id, x, y (level-0 pixels), area_um2, score and the others."""
        columns: dict[str, NDArray[Any]] = {
            "id": np.arange(1, len(self) + 1),
            "x": self.centroid[:, 0],
            "y": self.centroid[:, 1],
            "area_um2": self.area,
            "score": self.score,
        }
        return columns | {name: self.measurements[name] for name in MEASUREMENTS}

    def summary(self) -> dict[str, Any]:
        """Count, density and the distribution of every measurement, as plain JSON values."""
        columns = {name: values for name, values in self.table().items() if name not in ("id", "x", "y")}
        area = self.record.tissue_mm2
        return {
            "slide": self.record.slide,
            "method": self.record.method,
            "nuclei": len(self),
            "tissue_mm2": area,
            "nuclei_per_mm2": len(self) / area if area > 0 else None,
            "nuclear_area_share": float(self.area.sum(dtype=np.float64)) / 1e6 / area if area > 0 else None,
            "cut_components": self.record.cut_components,
            "distributions": {name: _describe(values) for name, values in columns.items()} if len(self) else {},
        }

    def to_geojson(self, path: str | os.PathLike[str]) -> None:
        """Write QuPath's GeoJSON; see :func:`~wsi_engine.nuclei.geojson.write_nuclei_geojson`."""
        from wsi_engine.nuclei.geojson import write_nuclei_geojson  # noqa: PLC0415 - it needs this class

        write_nuclei_geojson(self, path)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`table` as CSV; see :func:`~wsi_engine.nuclei.table.write_csv`."""
        from wsi_engine.nuclei.table import write_csv  # noqa: PLC0415

        write_csv(self, path)

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`table` as Parquet; see :func:`~wsi_engine.nuclei.table.write_parquet`."""
        from wsi_engine.nuclei.table import write_parquet  # noqa: PLC0415

        write_parquet(self, path)


def _describe(values: NDArray[Any]) -> dict[str, float]:
    numbers = values.astype(np.float64)
    found = {"mean": numbers.mean(), "sd": numbers.std(), "median": np.median(numbers)}
    marks = np.percentile(numbers, _PERCENTILES)
    found |= {f"p{percent}": mark for percent, mark in zip(_PERCENTILES, marks, strict=True)}
    return {name: float(value) for name, value in found.items()}


def assemble_instances(
    chunks: Sequence[NucleiChunk], per_px: tuple[float, float], record: InstanceRecord
) -> InstanceSet:
    """Put the nuclei of a slide together, in raster order of their first pixels.

    Args:
        chunks: nuclei in pixels of the frame, in any order.
        per_px: level-0 pixels per pixel of the frame, x and y.
        record: where they come from.
    """
    first = _stack([chunk.first for chunk in chunks], (0, 2), np.int64)
    order = np.lexsort((first[:, 1], first[:, 0]))
    shapes = _stack([chunk.shapes for chunk in chunks], (0, 6), np.float32)[order]
    values = _stack([chunk.values for chunk in chunks], (0, 5), np.float32)[order]
    offsets, points = _order_contours(chunks, order, per_px)
    centroid = _stack([chunk.centroid for chunk in chunks], (0, 2), np.float64)[order] * per_px
    mpp = np.float32(record.method_mpp)
    lengths = [np.ascontiguousarray(shapes[:, k]) * mpp for k in (1, 2, 3)]
    others = [np.ascontiguousarray(column) for column in (shapes[:, 4], shapes[:, 5], *values[:, :4].T)]
    near = count_neighbours(centroid * record.mpp, NEIGHBOUR_UM).astype(np.float32)
    return InstanceSet(
        offsets=offsets,
        points=points,
        centroid=centroid,
        area=shapes[:, 0] * mpp * mpp,
        score=np.ascontiguousarray(values[:, 4]),
        measurements=dict(zip(MEASUREMENTS, [*lengths, *others, near], strict=True)),
        record=record,
    )


def _stack(parts: list[NDArray[Any]], empty: tuple[int, int], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(empty, dtype)


def _order_contours(
    chunks: Sequence[NucleiChunk], order: NDArray[np.int64], per_px: tuple[float, float]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Contours in another order, in level-0 pixels, put in their places chunk by chunk."""
    sizes = np.concatenate([np.diff(chunk.offsets) for chunk in chunks]) if chunks else np.zeros(0, np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes[order])]).astype(np.int64)
    begins = np.empty(len(sizes), np.int64)
    begins[order] = offsets[:-1]
    points = np.empty((int(offsets[-1]), 2), np.float32)
    done = 0
    for chunk in chunks:
        mine = slice(done, done + len(chunk))
        shift = np.repeat(begins[mine] - chunk.offsets[:-1], sizes[mine])
        points[shift + np.arange(len(chunk.points))] = chunk.points * np.array(per_px)
        done += len(chunk)
    return offsets, points
