"""Bags: the tiles' features of many slides, loaded one bag at a time and ahead of their use."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wsi_engine.arrays import storing
from wsi_engine.errors import FeatureError, InputError, ModelError, SettingsError, StoreError
from wsi_engine.extents import check_extent
from wsi_engine.places import Place, as_place
from wsi_engine.runs import FeatureOrigin
from wsi_engine.shards import ShardLayout, find_bad_tile, parse_metadata
from wsi_engine.store import FeatureStore, features_key


class BagSource(Protocol):
    """Many bags of one dimension. Bags may be loaded from several threads at once."""

    @property
    def dim(self) -> int:
        """Numbers per tile."""
        ...

    def __len__(self) -> int: ...

    def tiles(self, place: int) -> int:
        """Number of tiles of a bag, without reading its features."""
        ...

    def load(self, place: int) -> NDArray[np.float16 | np.float32]:
        """Features (N, D) of a bag: float16 or float32, C-contiguous, finite."""
        ...


class StoredBags:
    """The features of one encoder in many stores, one bag a store, in the order given.

    Args:
        paths: the stores, or their URLs.
        encoder: whose features; None for the only encoder there is.

    Attributes:
        origin: what the features are, the same for all bags.

    Raises:
        InputError: no store is given.
        ModelError: the features of two stores are not of one encoder, weights, scale and tile size.
        StoreError: a store is not there or damaged, or its features are not there or not complete.
    """

    origin: FeatureOrigin

    def __init__(self, paths: Sequence[str | os.PathLike[str]], encoder: str | None = None) -> None:
        if not paths:
            raise InputError("there are no bags to load: no store was given")
        self._bags: list[_StoredBag] = []
        for path in map(as_place, paths):
            origin = FeatureOrigin.of(FeatureStore.open(path), encoder)
            if not self._bags:
                self.origin = origin
            try:
                self.origin.check(origin, str(path))
            except ModelError as error:
                raise ModelError(f"the bags of one model must be alike, but {error}") from error
            self._bags.append(_StoredBag.find(path, origin))

    @property
    def dim(self) -> int:
        """Numbers per tile."""
        return self.origin.dim

    def __len__(self) -> int:
        return len(self._bags)

    def tiles(self, place: int) -> int:
        """Number of tiles of a bag."""
        return self._bags[place].rows

    def load(self, place: int) -> NDArray[np.float16 | np.float32]:
        """Read the features (N, D) of a bag as they are stored, checksums and values checked.

        Raises:
            StoreError: they are damaged, or were made again since the bags were listed.
            FeatureError: a value is NaN or infinite; the message names the tile.
        """
        return self._bags[place].load()

    def __repr__(self) -> str:
        return f"<StoredBags: {len(self)} of {self.origin.encoder}>"


class ArrayBags:
    """Bags in memory.

    Args:
        bags: features (N, D) of each, floating-point or whole numbers; float16 and float32 are kept as they are,
            anything else becomes float32.

    Raises:
        InputError: there is no bag, or one is not of numbers (N, D) with the same D as the first.
        FeatureError: a value is NaN, infinite, or too large for float32; the message names bag and tile.
    """

    def __init__(self, bags: Sequence[NDArray[Any]]) -> None:
        if not len(bags):
            raise InputError("there are no bags: the list of arrays is empty")
        self._bags = [_keep_array(bag, f"bag {place}") for place, bag in enumerate(bags)]
        for place, bag in enumerate(self._bags):
            if bag.shape[1] != self.dim:
                raise InputError(f"bag {place} has {bag.shape[1]} numbers per tile and bag 0 has {self.dim}")

    @property
    def dim(self) -> int:
        """Numbers per tile."""
        return int(self._bags[0].shape[1])

    def __len__(self) -> int:
        return len(self._bags)

    def tiles(self, place: int) -> int:
        """Number of tiles of a bag."""
        return len(self._bags[place])

    def load(self, place: int) -> NDArray[np.float16 | np.float32]:
        """The features (N, D) of a bag; the array is shared, not copied."""
        return self._bags[place]


def prefetch(
    source: BagSource, places: Sequence[int], workers: int = 2, ahead: int = 4
) -> Generator[tuple[int, NDArray[np.float16 | np.float32]]]:
    """Yield places and their bags in the order given, while threads load the next ones.

    An error in a bag is raised when its turn comes. The threads end with the iteration, however it ends; where an
    exception in the loop around it may be kept (and with it the loop's variables), wrap it in
    :func:`contextlib.closing`, so that they end at once.

    Args:
        source: where the bags are.
        places: which of them; one may come several times.
        workers: loading threads, at least 1.
        ahead: bags, at least 1, that may be in memory or under way beside the one in use.

    Raises:
        SettingsError: ``workers`` or ``ahead`` is less than 1.
    """
    for name, value in (("workers", workers), ("ahead", ahead)):
        if value < 1:
            raise SettingsError(f"{name} must be at least 1, not {value}")
    return _prefetch(source, places, workers, ahead)


def _prefetch(
    source: BagSource, places: Sequence[int], workers: int, ahead: int
) -> Generator[tuple[int, NDArray[np.float16 | np.float32]]]:
    pool = ThreadPoolExecutor(min(workers, ahead), "bags")
    left = iter(places)
    under_way: deque[tuple[int, Future[NDArray[Any]]]] = deque()

    def load_ahead() -> None:
        for place in itertools.islice(left, ahead - len(under_way)):
            under_way.append((place, pool.submit(source.load, place)))

    try:
        load_ahead()
        while under_way:
            # The next bag is begun only once this one is there, for until now the caller has held the one before; and
            # nothing here keeps a bag that was handed over.
            ready = [_wait_first(under_way)]
            load_ahead()
            yield ready.pop()
    finally:
        pool.shutdown(cancel_futures=True)


def _wait_first(under_way: deque[tuple[int, Future[NDArray[Any]]]]) -> tuple[int, NDArray[Any]]:
    place, future = under_way.popleft()
    return place, future.result()


@dataclass(frozen=True)
class _StoredBag:
    """One bag on disk.

    Attributes:
        path: the store.
        encoder: whose features.
        metadata: the ``zarr.json`` of the features.
        rows: tiles.
        layout: how to read them directly; None where they are not laid out as this engine does.
    """

    path: Place
    encoder: str
    metadata: bytes
    rows: int
    layout: ShardLayout | None

    @classmethod
    def find(cls, path: Place, origin: FeatureOrigin) -> _StoredBag:
        """Look at a store's features without reading them."""
        folder = _features_folder(path, origin.encoder)
        with storing(str(path)):
            text = (folder / "zarr.json").read_bytes()
            metadata = parse_metadata(text)
            rows, dim = metadata["shape"]
            if dim != origin.dim:
                raise ValueError(f"its features have {dim} numbers per tile and their encoder gives {origin.dim}")
            layout = ShardLayout.of(folder, metadata)
            if layout is not None:
                shard = (layout.chunk_rows * layout.shard_chunks, dim)
                check_extent(folder, (rows, dim), np.dtype(layout.dtype).itemsize, shard)
            return cls(path, origin.encoder, text, rows, layout)

    def load(self) -> NDArray[Any]:
        """Read and check all features (N, D)."""
        with storing(str(self.path)):
            if (_features_folder(self.path, self.encoder) / "zarr.json").read_bytes() != self.metadata:
                raise StoreError(f"the features in {self.path} were made again while they were in use: start again")
            return self._load_by_zarr() if self.layout is None else self._load_directly(self.layout)

    def _load_by_zarr(self) -> NDArray[Any]:
        features = np.ascontiguousarray(FeatureStore.open(self.path).features(self.encoder))
        if features.dtype not in (np.float16, np.float32):
            raise StoreError(f"the features in {self.path} are {features.dtype}, not float16 or float32")
        self._check(features, 0)
        return features

    def _load_directly(self, layout: ShardLayout) -> NDArray[Any]:
        features = np.empty((layout.rows, layout.dim), layout.dtype)
        for start, values in layout.read():  # checked while the processor's cache still holds them
            self._check(values, start)
            features[start : start + len(values)] = values
        return features

    def _check(self, values: NDArray[Any], start: int) -> None:
        bad = find_bad_tile(values)
        if bad is not None:
            raise FeatureError(
                f"the features of tile {start + bad} in {self.path} are NaN or infinite: delete that store and "
                "extract again"
            )


def _features_folder(path: Place, encoder: str) -> Place:
    return path / "features" / features_key(encoder) / "values"


def _keep_array(bag: NDArray[Any], where: str) -> NDArray[Any]:
    """One bag as float16 or float32, contiguous and checked."""
    values = np.asarray(bag)
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise InputError(f"{where} is {values.dtype} {values.shape}; give numbers of shape (tiles, dimensions)")
    if values.dtype not in (np.float16, np.float32):
        with np.errstate(over="ignore"):  # what overflows is infinite then, and is found below
            values = values.astype(np.float32)
    values = np.ascontiguousarray(values)
    bad = find_bad_tile(values)
    if bad is not None:
        raise FeatureError(f"tile {bad} of {where} has values that are NaN, infinite or too large")
    return values
