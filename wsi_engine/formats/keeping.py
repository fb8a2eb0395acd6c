"""Features that another tool made, or that were exported once, put into a store of ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from wsi_engine.cohorts.findings import list_some
from wsi_engine.encoders.base import EncoderCard
from wsi_engine.errors import FormatError, InputError, MismatchError, PartialImportError, SettingsError, WsiError
from wsi_engine.grid import TileGrid
from wsi_engine.inputs import check_slide_id
from wsi_engine.slide_record import SlideRecord
from wsi_engine.store import FeatureStore
from wsi_engine.writer import FeatureIdentity, write_features

T = TypeVar("T")

_MOST_PX = 2**40
"""Level-0 pixels from the slide's corner that no tile lies beyond."""


def keep_features(
    out: Path,
    record: SlideRecord,
    grid: TileGrid,
    card: EncoderCard,
    features: NDArray[Any],
    attrs: dict[str, Any],
    grid_name: str | None = None,
    made: dict[str, Any] | None = None,
) -> Path:
    """Write features (N, D) of one slide into ``<out>/<slide>.zarr``.

    Args:
        out: folder of the stores.
        record: the slide.
        grid: where the tiles are, in the order of the features.
        card: the encoder.
        features: float16 or float32 (N, D).
        attrs: where they come from, kept as ``imported``.
        grid_name: name of the grid; None for one made of its size and scale.
        made: ``precision``, ``exact_resample`` and ``settings`` of the grid where they are known.

    Raises:
        FormatError: features and tiles differ in number, or something in them cannot be.
        MismatchError: the store holds another slide, other tiles or other features under these names.
        StoreError: the store cannot be written or is damaged.
    """
    _check(record, grid, card, features)
    made = made or {}
    path = out / f"{record.name}.zarr"
    store = FeatureStore.create(path, record)
    name = grid_name or _name_grid(grid)
    if store.grid_settings(name) is None:
        store.write_grid(name, grid, made.get("settings", {"imported": attrs}), tissue=None)
    elif store.grid(name).digest != grid.digest:
        raise MismatchError(f"{path} already holds other tiles under the name {name}: choose another output folder")
    dtype: Literal["float16", "float32"] = "float16" if features.dtype == np.float16 else "float32"
    precision, exact = str(made.get("precision", "imported")), bool(made.get("exact_resample", False))
    write_features(store, FeatureIdentity(card, name, store.grid(name), precision, dtype, exact), features, attrs)
    return path


def import_each(items: Sequence[T], keep: Callable[[T], Path]) -> list[Path]:
    """Import slide after slide; one that cannot be imported does not stop the others.

    Args:
        items: what the slides are read from.
        keep: reads one of them, and returns its store.

    Raises:
        PartialImportError: some of several could not be imported; the message says why of the first three.
        SettingsError: a package is missing.
        WsiError: the only one could not be imported.
    """
    done: list[Path] = []
    reasons: list[str] = []
    for item in items:
        try:
            done.append(keep(item))
        except SettingsError:
            raise
        except WsiError as error:
            if len(items) == 1:
                raise
            reasons.append(str(error))
    if reasons:
        raise PartialImportError(
            f"{len(reasons)} of {len(items)} slides were not imported ({list_some(reasons, 3, '; ')}): mend or remove "
            "their files and import again",
            done,
        )
    return done


def _name_grid(grid: TileGrid) -> str:
    return f"{grid.tile_px}px_{grid.mpp:g}mpp" + (f"_stride{grid.stride_px}" if grid.stride_px != grid.tile_px else "")


def _check(record: SlideRecord, grid: TileGrid, card: EncoderCard, features: NDArray[Any]) -> None:
    """Refuse what no slide, grid or encoder can have."""
    try:
        check_slide_id(record.name, "the name of a slide in the files")
    except InputError as error:
        raise FormatError(str(error)) from error
    if len(features) != len(grid):
        raise FormatError(f"{record.name} has {len(features)} features but {len(grid)} coordinates")
    if features.dtype not in (np.float16, np.float32):
        raise FormatError(f"the features of {record.name} have type {features.dtype}: float16 or float32 is needed")
    if not features.shape[1]:
        raise FormatError(f"the features of {record.name} have no values: each tile needs at least one")
    if not card.name.strip() or card.name in (".", "..") or len(card.name) > 200 or not card.name.isprintable():
        raise FormatError(f"the files of {record.name} name the encoder {card.name[:40]!r}: pass one with --encoder")
    sizes = (*record.mpp, *map(float, record.dimensions), grid.mpp, float(grid.tile_px), *grid.tile_size_level0)
    if not all(math.isfinite(size) and 0 < size < _MOST_PX for size in sizes) or grid.stride_px < 1:
        raise FormatError(
            f"the files of {record.name} give sizes that cannot be (slide {record.dimensions} at {record.mpp}, tiles "
            f"of {grid.tile_px} px at {grid.mpp:g}, stride {grid.stride_px}): check the files"
        )
    if len(grid) and np.abs(grid.origins).max() > _MOST_PX:
        raise FormatError(f"the tiles of {record.name} lie further out than any slide reaches: check the files")
