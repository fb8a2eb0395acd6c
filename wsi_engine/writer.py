"""Writing one encoder's features of one slide so that a kill at any instant loses at most the batches in flight.

While a slide is being encoded every batch is one chunk, that is one file, of the array ``partial``; a chunk appears
whole or not at all. When all are there they are gathered into ``values``, and one replaced file marks it complete.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray

from wsi_engine.arrays import create_rows, storing
from wsi_engine.encoders.base import EncoderCard
from wsi_engine.errors import BusyError, FeatureError, MismatchError, StoreError
from wsi_engine.grid import TileGrid
from wsi_engine.places import list_files
from wsi_engine.store import FeatureStore, features_key
from wsi_engine.version import __version__

_IDENTITY = ("grid", "grid_digest", "precision", "dtype", "exact_resample")

_CARD_IDENTITY = (
    "architecture",
    "weights_digest",
    "input_px",
    "resize_px",
    "dim",
    "pooling",
    "mean",
    "std",
    "interpolation",
)
"""Fields of a card that change the features; the others only describe."""

_SLOW_SECONDS = 1.0
"""A batch that takes this long to write is looked after: the process may have stood still and lost its lease."""


@dataclass(frozen=True)
class FeatureIdentity:
    """What features are made from: two arrays with one identity are interchangeable."""

    card: EncoderCard
    grid_name: str
    grid: TileGrid
    precision: str
    dtype: Literal["float16", "float32"]
    exact_resample: bool = False

    def to_json(self) -> dict[str, Any]:
        """The attributes that a features array carries from its first batch."""
        return {
            "encoder": self.card.to_json(),
            "grid": self.grid_name,
            "grid_digest": self.grid.digest,
            "precision": self.precision,
            "dtype": self.dtype,
            "exact_resample": self.exact_resample,
            "engine_version": __version__,
        }

    def differences(self, attrs: dict[str, Any]) -> list[str]:
        """How stored attributes differ from this identity, one phrase each."""
        mine = self.to_json()
        pairs = [(name, attrs.get(name), mine[name]) for name in _IDENTITY]
        card = attrs.get("encoder", {})
        pairs += [(f"encoder {name}", card.get(name), mine["encoder"][name]) for name in _CARD_IDENTITY]
        return [f"{name} {_brief(had)}, now {_brief(has)}" for name, had, has in pairs if _plain(had) != _plain(has)]


class FeatureWriter:
    """Writes the features of one encoder into a store, batch by batch, and finishes them.

    The caller holds the slide's lease. ``batch_size`` is the one wanted; a run that was begun with another
    keeps that one (:attr:`batch_size`), since its rows were computed in batches of that shape. ``check`` is called
    before anything is written, and raises where the lease was lost.

    Raises:
        MismatchError: the store holds features of this name made from something else.
        StoreError: the store cannot be written.
    """

    def __init__(
        self, store: FeatureStore, identity: FeatureIdentity, batch_size: int, check: Callable[[], None] = lambda: None
    ) -> None:
        self._store = store
        self._check_lease = check
        self._identity = identity
        self._rows = len(identity.grid)
        self._waiting: dict[int, tuple[NDArray[Any], int]] = {}
        self._group = store.group(f"features/{features_key(identity.card.name)}")
        self.complete = self._check("values", complete_only=True)
        self.batch_size = batch_size
        if self.complete:
            self._drop_partial()
        elif self._rows and self._check("partial"):
            self.batch_size = self._partial.chunks[0]

    def begin(self) -> None:
        """Make the array that batches are written into, where there is none: several writers must find the same."""
        _ = self._partial

    def missing_rows(self, within: range | None = None) -> NDArray[np.int64]:
        """Rows that are not stored yet, ascending: whole batches, a torn one among them.

        ``within`` limits the look to some rows, cut at batches; it may go beyond the last row.
        """
        first, end = (0, self._rows) if within is None else (within.start, min(within.stop, self._rows))
        if self.complete:
            return np.empty(0, np.int64)
        if not self._check("partial"):
            return np.arange(first, end)
        batches = [np.arange(start, self._stop(start)) for start in range(first, end, self.batch_size)]
        return np.concatenate([np.empty(0, np.int64), *(rows for rows in batches if not self._has(rows))])

    def add(self, rows: NDArray[np.int64], features: NDArray[np.float32]) -> None:
        """Take the features (n, D) of some rows; a batch is stored as soon as all of its rows are here.

        Rows may come in any portions, each row once.

        Raises:
            FeatureError: a value is NaN, infinite, or beyond the stored type; the message names the tile.
            StoreError: the disk refuses.
        """
        numbers = rows // self.batch_size
        for number in np.unique(numbers):
            which = numbers == number
            start = int(number) * self.batch_size
            stored = self._convert(features[which], rows[which])
            waiting, missing = self._waiting.pop(start, (None, self._stop(start) - start))
            if waiting is None:
                waiting = np.empty((missing, stored.shape[1]), self._identity.dtype)
            waiting[rows[which] - start] = stored
            if missing > len(stored):
                self._waiting[start] = waiting, missing - len(stored)
                continue
            looked = time.monotonic()
            self._make_sure()
            with storing(self._store.path):
                self._partial[start : start + len(waiting)] = waiting
            if time.monotonic() - looked >= _SLOW_SECONDS:
                self._make_sure()

    def _stop(self, start: int) -> int:
        """End of the batch that begins at a row."""
        return min(start + self.batch_size, self._rows)

    def finish(self, seconds: dict[str, float]) -> None:
        """Gather all batches into ``values`` and mark it complete. ``seconds`` per stage are kept with it.

        Raises:
            StoreError: a batch is missing or torn, or the disk refuses.
        """

        def gather(start: int, stop: int) -> NDArray[Any]:
            rows = np.asarray(self._partial[start:stop])
            if np.isnan(rows).any():
                raise StoreError(f"batches of {self._store.path} are missing: run wsi extract again")
            return rows

        self._keep(gather, {"seconds": seconds})

    def keep(self, features: NDArray[Any], attrs: dict[str, Any]) -> None:
        """Store all rows at once and mark them complete, for features that need not be computed."""
        self._keep(lambda start, stop: features[start:stop], attrs)

    def _keep(self, rows: Callable[[int, int], NDArray[Any]], attrs: dict[str, Any]) -> None:
        """Write ``values`` a shard at a time, mark it complete last, and drop ``partial``."""
        self._make_sure()
        with storing(self._store.path):
            if self._check("values", complete_only=True):  # by another, if this process stood still just now
                self._settle()
                return
            values = create_rows(self._group, "values", self._rows, self._identity.card.dim, self._identity.dtype)
            step = values.shards[0] if values.shards else self._rows
            for start in range(0, self._rows, step):
                stop = min(start + step, self._rows)
                values[start:stop] = rows(start, stop)
            self._make_sure()
            there = list_files(self._store.place / values.path)
            if sum(name.startswith("c/") for name in there) < -(-self._rows // max(1, step)):
                raise StoreError(
                    f"features of {self._store.path} went missing while they were written, perhaps by a process that "
                    "had stood still: run wsi extract again"
                )
            values.update_attributes(self._identity.to_json() | attrs | {"complete": True})
        self._settle()

    def _settle(self) -> None:
        """``values`` is complete: nothing else is needed."""
        self.complete = True
        self._drop_partial()

    def _make_sure(self) -> None:
        """Make sure that the lease is still held; where it is not, take back what was written just as it was lost."""
        try:
            self._check_lease()
        except BusyError:
            with suppress(StoreError):
                if self._check("values", complete_only=True):  # no batch counts any more
                    self._drop_partial()
            raise

    @cached_property
    def _partial(self) -> zarr.Array[Any]:
        """The array of the run that is under way, or a new one."""
        identity = self._identity
        with storing(self._store.path):
            if self._check("partial"):
                array = self._group["partial"]
                assert isinstance(array, zarr.Array)
                return array
            array = create_rows(self._group, "partial", self._rows, identity.card.dim, identity.dtype, self.batch_size)
            array.update_attributes(identity.to_json())
            return array

    def _check(self, name: str, *, complete_only: bool = False) -> bool:
        """Whether an array is there and begun (or complete); MismatchError when it was made from something else."""
        with storing(self._store.path):
            attrs = dict(self._group[name].attrs) if name in self._group else {}
        if "grid_digest" not in attrs or (complete_only and attrs.get("complete") is not True):
            return False
        differences = self._identity.differences(attrs)
        if differences:
            raise MismatchError(
                f"{self._store.path} already holds {self._identity.card.name} features made differently "
                f"({'; '.join(differences)}): choose another output folder, or delete that store"
            )
        return True

    def _has(self, rows: NDArray[np.int64]) -> bool:
        try:
            with storing(self._store.path):
                stored = np.asarray(self._partial[int(rows[0]) : int(rows[-1]) + 1])
        except StoreError:  # a torn or rotten chunk is made again
            return False
        return not np.isnan(stored).any()

    def _convert(self, features: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[Any]:
        """Features in the stored type, after a look for what it cannot hold."""
        with np.errstate(over="ignore"):
            stored = features.astype(self._identity.dtype)
        bad = ~np.isfinite(stored).all(axis=1)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            x, y = self._identity.grid.origins[rows[row]]
            finite = np.isfinite(features[row]).all()
            what = "values beyond float16" if finite else "NaN or infinite values"
            cure = "use --dtype float32" if finite else "check the encoder's weights and precision"
            raise FeatureError(
                f"{self._identity.card.name} gave {what} for tile {rows[row]} at level-0 ({x}, {y}) of "
                f"{self._store.slide.name}: {cure}"
            )
        return stored

    def _drop_partial(self) -> None:
        with storing(self._store.path):
            if (self._store.place / self._group.path / "partial").is_dir():  # or what a kill left of it
                del self._group["partial"]


def write_features(
    store: FeatureStore, identity: FeatureIdentity, values: NDArray[Any], origin: dict[str, Any]
) -> None:
    """Write features (N, D) that exist already, such as another tool's, as a complete array.

    ``origin`` says where they came from and is kept in the attributes as ``imported``.

    Raises:
        MismatchError: the store holds features of this name made from something else.
        StoreError: the store cannot be written.
    """
    writer = FeatureWriter(store, identity, max(1, len(values)))
    if not writer.complete:
        writer.keep(values, {"imported": origin})


def _plain(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    return list(value) if isinstance(value, tuple) else value


def _brief(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 20 else str(value)
