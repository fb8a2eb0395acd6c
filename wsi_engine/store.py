"""One slide's Zarr group: its grid, tissue and features, and where each came from.

Layout (Zarr format 3)::

    <slide_id>.zarr        attrs schema_version, engine_version, slide
    ├── tissue/mask        bool (H, W)       attrs mpp, threshold, counts, digest
    ├── tiles/<grid>/origins   int64 (N, 2)  attrs tile_px, stride_px, mpp, tile_size_level0, counts, settings, digest
    ├── features/<encoder>/
    │   ├── values         float16 or float32 (N, D)   attrs encoder, precision, grid, grid_digest, seconds, complete
    │   └── partial        the same rows while they are being made, one chunk a batch; gone once complete
    └── attention/<run>/values  float32 (N, K)  attrs model_digest, grid, grid_digest, classes, columns, complete

A features array is absent, partial or complete. Whatever is not marked complete in its attributes is never
handed out, and the mark is written last, by replacing one small file.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import zarr
from numpy.typing import NDArray

from wsi_engine.arrays import EVERY_CHUNK, checked_codecs, create_group, open_group, storing
from wsi_engine.errors import MismatchError, StoreError
from wsi_engine.extents import read_array, read_json
from wsi_engine.grid import TileGrid, TileScale
from wsi_engine.places import Place, as_place, list_folders, list_stores
from wsi_engine.shards import find_bad_tile
from wsi_engine.slide_record import SlideRecord
from wsi_engine.tissue import FilterCount, TissueMask
from wsi_engine.version import __version__

SCHEMA_VERSION = 1


class FeatureStore:
    """One slide's results on disk. Open with :meth:`open` to read; the engine writes with :meth:`create`."""

    def __init__(self, place: Place, mode: Literal["r", "r+"] = "r") -> None:
        """Take a store that is there; :meth:`open` says what may be wrong with it."""
        _check_version(place)
        self.place = place
        self.path = str(place)
        self._mode: Literal["r", "r+"] = mode

    @cached_property
    def _group(self) -> zarr.Group:
        """The root group, opened when it is needed: attributes are read without it."""
        with storing(self.path):
            return open_group(self.place, self._mode)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a store for reading.

        Raises:
            StoreError: there is none at ``path``, it is damaged, or another version made it.
        """
        return cls(as_place(path))

    @classmethod
    def create(cls, path: str | os.PathLike[str], slide: SlideRecord) -> Self:
        """Open a store for writing, making it if there is none.

        Raises:
            MismatchError: it holds the results of another slide, or of this one at another scale.
            StoreError: it cannot be written, is damaged, or another version made it.
        """
        place = as_place(path)
        with storing(place):
            if not (place / "zarr.json").exists():
                attributes = {"schema_version": SCHEMA_VERSION, "engine_version": __version__, "slide": asdict(slide)}
                create_group(place, attributes)
        store = cls(place, "r+")
        for what in ("fingerprint", "dimensions", "mpp"):
            had, has = getattr(store.slide, what), getattr(slide, what)
            if had != has:
                raise MismatchError(
                    f"{place} was made from another slide ({what} {_short(had)}, now {_short(has)}): "
                    "choose another output folder, or delete that store"
                )
        return store

    @property
    def slide(self) -> SlideRecord:
        """The slide that this store was made from."""
        with storing(self.path):
            return SlideRecord.from_json(self._attrs("")["slide"])

    @property
    def engine_version(self) -> str:
        """Version of the engine that made the store."""
        return str(self._attrs("")["engine_version"])

    def grids(self) -> tuple[str, ...]:
        """Names of the grids, sorted."""
        return tuple(name for name in self._members("tiles") if "digest" in self._attrs(f"tiles/{name}/origins"))

    def encoders(self) -> tuple[str, ...]:
        """Names of the encoders whose features are complete, sorted."""
        return tuple(name for name in self._members("features") if self._is_complete(name))

    def grid(self, name: str | None = None) -> TileGrid:
        """A grid by name; None for the only one there is.

        Raises:
            StoreError: there is no such grid, or several and no name was given, or its data are damaged.
        """
        name = self._only("grid", self.grids(), name)
        path = f"tiles/{name}/origins"
        attrs = self._attrs(path)
        grid = TileGrid.from_json(attrs, self.read(path).astype(np.int64, copy=False))
        if grid.digest != attrs["digest"]:
            raise StoreError(f"{self.path}/{path} is damaged (its digest differs): delete the store and extract again")
        return grid

    def tile_scale(self, grid: str | None = None) -> TileScale:
        """Size and scale of a grid's tiles, without reading their places; None for the only grid there is.

        Raises:
            StoreError: there is no such grid, or several and no name was given.
        """
        name = self._only("grid", self.grids(), grid)
        with storing(self.path):
            return TileScale.from_json(self._attrs(f"tiles/{name}/origins"))

    def grid_settings(self, name: str) -> dict[str, Any] | None:
        """The settings a grid was laid with, or None where it is not (completely) there."""
        attrs = self._attrs(f"tiles/{name}/origins")
        return dict(attrs["settings"]) if "digest" in attrs else None

    def origins(self, grid: str | None = None) -> NDArray[np.int64]:
        """Level-0 x, y of the tiles, int64 (N, 2), in the order of the features' rows."""
        return self.grid(grid).origins

    def tissue(self) -> TissueMask | None:
        """The tissue that the grid was laid on, or None where every tile was kept."""
        attrs = self._attrs("tissue/mask")
        if "digest" not in attrs:
            return None
        counts = tuple(FilterCount(**count) for count in attrs["counts"])
        return TissueMask(self.read("tissue/mask").astype(bool), float(attrs["mpp"]), attrs["threshold"], counts)

    def features(self, encoder: str | None = None) -> NDArray[Any]:
        """Features (N, D) of an encoder, float16 or float32; None for the only encoder there is.

        Raises:
            StoreError: there are none, they are not complete yet, or their data are damaged.
        """
        path = f"{self._features_path(encoder)}/values"
        values = self.read(path)
        bad = find_bad_tile(values) if values.dtype in (np.float16, np.float32) else None
        if bad is not None and np.isnan(values[bad]).all():  # what Zarr makes of a file that is missing
            raise StoreError(f"{self.path}/{path} is damaged (tile {bad} is missing): delete it and extract again")
        return values

    def provenance(self, encoder: str | None = None) -> dict[str, Any]:
        """How the features were made: encoder card, precision, grid, digests, seconds per stage, engine version."""
        return self._attrs(f"{self._features_path(encoder)}/values")

    def runs(self) -> tuple[str, ...]:
        """Names of the training runs whose attention is complete, sorted."""
        there = self._members("attention")
        return tuple(run for run in there if self._attrs(f"attention/{run}/values").get("complete") is True)

    def attention(self, run: str | None = None) -> NDArray[np.float32]:
        """Attention weights float32 (N, K) that a run's heads gave the tiles; None for the only run there is.

        Raises:
            StoreError: there are none, or several and no run was named, or the data are damaged.
        """
        return self.read(f"{self._attention_path(run)}/values")

    def attention_record(self, run: str | None = None) -> dict[str, Any]:
        """Where a run's attention comes from: model, encoder, grid, classes, and what its columns stand for."""
        return self._attrs(f"{self._attention_path(run)}/values")

    def write_attention(self, run: str, values: NDArray[np.float32], record: dict[str, Any]) -> None:
        """Write a run's attention (N, K) in place of what it gave before; it counts only once it is whole.

        Raises:
            StoreError: the store was opened for reading, or cannot be written.
        """
        path = f"attention/{features_key(run)}/values"
        self._write(path, values.astype(np.float32, copy=False), record | {"complete": True}, (65_536, values.shape[1]))

    def write_grid(self, name: str, grid: TileGrid, settings: dict[str, Any], tissue: TissueMask | None) -> None:
        """Write a grid and the tissue it was laid on; each counts only once it is whole.

        Raises:
            MismatchError: the store has another tissue mask, on which other grids were laid.
            StoreError: the store cannot be written.
        """
        if tissue is not None:
            had = self._attrs("tissue/mask").get("digest", tissue.digest)
            if had != tissue.digest:
                raise MismatchError(
                    f"the tissue of {self.path} was found differently (digest {_short(had)}, now "
                    f"{_short(tissue.digest)}): choose another output folder, or delete that store"
                )
            if "digest" not in self._attrs("tissue/mask"):
                self._write("tissue/mask", tissue.mask, _tissue_attrs(tissue), (1024, 1024))
        self._write(f"tiles/{name}/origins", grid.origins, grid.to_json() | {"settings": settings}, (65_536, 2))

    def group(self, path: str) -> zarr.Group:
        """A subgroup for writing, made if it is not there.

        Raises:
            StoreError: the store was opened for reading, or cannot be written.
        """
        self._refuse_reading()
        with storing(self.path):
            return self._group.require_group(path)

    def _refuse_reading(self) -> None:
        if self._mode == "r":
            raise StoreError(f"{self.path} was opened for reading: open it with FeatureStore.create to write into it")

    def _write(self, path: str, data: NDArray[Any], attrs: dict[str, Any], chunks: tuple[int, int]) -> None:
        self._refuse_reading()
        with storing(self.path):
            shape = tuple(max(1, min(n, c)) for n, c in zip(data.shape, chunks, strict=True))
            (self.place / path / "zarr.json").unlink(missing_ok=True)  # its mark goes before its data
            array = self._group.create_array(
                path,
                shape=data.shape,
                dtype=data.dtype,
                chunks=shape,
                overwrite=True,
                compressors=checked_codecs("zstd"),
                config={"write_empty_chunks": True},
            )
            if data.size:
                array[...] = data
            array.update_attributes(attrs | {EVERY_CHUNK: True})

    def read(self, path: str) -> NDArray[Any]:
        """An array of the store, whole.

        Raises:
            StoreError: it is not there, or damaged.
        """
        with storing(self.path):
            return read_array(self._group, path, self.place / path)

    def _attrs(self, path: str) -> dict[str, Any]:
        """Attributes of a group or array; empty where there is none.

        Read as the JSON they are: Zarr takes far longer, and a cohort is asked for many.
        """
        with storing(self.path):
            try:
                node = read_json(self.place / path / "zarr.json")
            except (FileNotFoundError, NotADirectoryError):
                return {}
            return dict(node["attributes"])

    def _members(self, path: str) -> list[str]:
        """Names of what is in a group, sorted; some may be begun only."""
        with storing(self.path):
            return list_folders(self.place / path)

    def _features_path(self, encoder: str | None) -> str:
        return f"features/{self._only('encoder', self.encoders(), encoder and features_key(encoder))}"

    def _attention_path(self, run: str | None) -> str:
        return f"attention/{self._only('run', self.runs(), run and features_key(run))}"

    def _is_complete(self, encoder: str) -> bool:
        return self._attrs(f"features/{encoder}/values").get("complete") is True

    def _only(self, kind: str, there: tuple[str, ...], name: str | None) -> str:
        """The name asked for, or the only one there is; StoreError when that cannot be."""
        if name is None and len(there) == 1:
            return there[0]
        listed = ", ".join(there) or "none"
        if name is None:
            raise StoreError(f"{self.path} holds {len(there)} {kind}s ({listed}): name one")
        if name not in there:
            partial = kind == "encoder" and f"features/{name}/partial" in self._group
            state = "is not complete yet: run wsi extract again to finish it" if partial else "is not there"
            raise StoreError(f"{kind} {name} of {self.path} {state} (there: {listed})")
        return name

    def __repr__(self) -> str:
        return f"<FeatureStore {self.path}: encoders {', '.join(self.encoders()) or 'none'}>"


def stored_precision(folder: Place, encoder: str) -> str | None:
    """The precision of an encoder's features in the first store of a folder that has any, complete or not; else None.

    A cohort is not to mix precisions unasked, so a run goes on in the one that was begun with.
    """
    for store in list_stores(folder):
        for state in ("values", "partial"):
            try:
                attrs = read_json(store / "features" / features_key(encoder) / state / "zarr.json")
                return str(attrs["attributes"]["precision"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
    return None


def features_key(name: str) -> str:
    """The name that an encoder's features, or a run's attention, have in a store: ``timm:a/b`` becomes ``timm_a_b``."""
    return re.sub(r"[^A-Za-z0-9._+-]", "_", name)


def _check_version(place: Place) -> None:
    """Refuse what is no store that this version of the engine can use."""
    path = str(place)
    with storing(place):
        try:
            group = read_json(place / "zarr.json")
        except (FileNotFoundError, NotADirectoryError):
            if not place.exists():
                raise StoreError(f"there is no store at {path}") from None
            raise StoreError(f"{path} is not a store of this engine: it has no Zarr group") from None
        if not isinstance(group, dict) or group.get("zarr_format") != 3:
            raise ValueError("its zarr.json describes no group of Zarr 3")
        version = dict(group.get("attributes") or {}).get("schema_version")
    if version is None:
        raise StoreError(f"{path} is not a store of this engine: its attributes name no schema version")
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{path} has schema version {version}; this version of the engine uses {SCHEMA_VERSION}: "
            "choose another output folder, or use the version that made it"
        )


def _tissue_attrs(tissue: TissueMask) -> dict[str, Any]:
    return {
        "mpp": tissue.mpp,
        "threshold": tissue.threshold,
        "counts": [asdict(count) for count in tissue.counts],
        "digest": tissue.digest,
    }


def _short(value: object) -> str:
    """A value for an error message; of a digest the first digits."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 20 else str(value)
