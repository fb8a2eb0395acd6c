"""What AnnData and SpatialData have no place of their own for: a JSON record, so that nothing is lost on the way back.

The record says which slide, grid, encoder and arithmetic features come from, and what the columns of attention are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.encoders.base import EncoderCard
from wsi_engine.formats.keeping import keep_features
from wsi_engine.grid import TileGrid
from wsi_engine.slide_record import SlideRecord
from wsi_engine.store import FeatureStore, features_key
from wsi_engine.version import __version__

RECORD_VERSION = 1


@dataclass(frozen=True, eq=False)
class TiledFeatures:
    """The features of one encoder on one slide, with the attention that runs gave its tiles.

    Attributes:
        slide: the slide.
        grid: the N tiles.
        grid_name: its name in the store.
        features: float16 or float32 (N, D).
        provenance: how they were made, as the store keeps it, with ``grid_settings``.
        attention: float32 (N, K) by run.
        records: of each run, where its attention comes from.
    """

    slide: SlideRecord
    grid: TileGrid
    grid_name: str
    features: NDArray[Any]
    provenance: Mapping[str, Any]
    attention: Mapping[str, NDArray[np.float32]]
    records: Mapping[str, Mapping[str, Any]]

    @classmethod
    def gather(cls, store: FeatureStore, encoder: str | None = None) -> TiledFeatures:
        """Everything a store holds of one encoder's tiles.

        Raises:
            StoreError: the store has no (complete) features of that encoder, or is damaged.
        """
        provenance = dict(store.provenance(encoder))
        name = provenance["grid"]
        grid = store.grid(name)
        provenance["grid_settings"] = store.grid_settings(name) or {}
        records = {run: store.attention_record(run) for run in store.runs()}
        mine = {run: record for run, record in records.items() if record.get("grid_digest") == grid.digest}
        maps = {run: store.attention(run) for run in mine}
        return cls(store.slide, grid, name, store.features(encoder), provenance, maps, mine)

    @property
    def encoder(self) -> str:
        """Name of the encoder."""
        return str(self.provenance["encoder"]["name"])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the D numbers of a tile: the encoder's own, else their places."""
        own = tuple(self.provenance["encoder"].get("feature_names") or ())
        count = self.features.shape[1]
        return own if len(set(own)) == count else tuple(map(str, range(count)))

    def columns(self) -> dict[str, NDArray[Any]]:
        """A column for each tile's place (level-0 x, y of its corner, int64) and each map of attention (float32)."""
        found: dict[str, NDArray[Any]] = {
            "tile_id": np.arange(len(self.grid)),
            "x": np.ascontiguousarray(self.grid.origins[:, 0]),
            "y": np.ascontiguousarray(self.grid.origins[:, 1]),
        }
        for run in self.attention:
            for place, column in enumerate(self._attention_columns(run)):
                found[column] = np.ascontiguousarray(self.attention[run][:, place])
        return found

    def centres(self) -> NDArray[np.float64]:
        """Centres of the tiles (N, 2) in level-0 pixels."""
        return self.grid.origins + np.asarray(self.grid.tile_size_level0) / 2

    def record(self) -> str:
        """The record, as JSON."""
        kept = {key: value for key, value in self.provenance.items() if key != "complete"}
        return json.dumps(
            {
                "version": RECORD_VERSION,
                "engine_version": __version__,
                "slide": asdict(self.slide),
                "grid_name": self.grid_name,
                "grid": self.grid.to_json(),
                "provenance": kept,
                "attention": {
                    run: {"columns": self._attention_columns(run), "record": record}
                    for run, record in self.records.items()
                },
            }
        )

    def _attention_columns(self, run: str) -> list[str]:
        count = self.attention[run].shape[1]
        names = [str(name) for name in self.records[run].get("columns", [])]
        if count == 1:
            return [f"attention_{run}"]
        names = [features_key(name) for name in names]
        return [f"attention_{run}_{name}" for name in (names if len(set(names)) == count else range(count))]


def keep_recorded(
    text: str, features: NDArray[Any], columns: Mapping[str, NDArray[Any]], out: Path, origin: str
) -> Path:
    """Put features that were exported with a record into a store again.

    Args:
        text: the record.
        features: (N, D).
        columns: of the tiles, at least ``x`` and ``y``; rows may have been left out, or put in another order.
        out: folder of the stores.
        origin: the format they come from.

    Raises:
        ValueError, LookupError, TypeError: the record is damaged.
        WsiError: what :func:`~wsi_engine.formats.keeping.keep_features` raises.
    """
    value = json.loads(text)
    if value["version"] != RECORD_VERSION:
        raise ValueError(f"its record has version {value['version']} and this engine reads {RECORD_VERSION}")
    made = dict(value["provenance"])
    slide = SlideRecord.from_json(value["slide"])
    origins = np.stack([columns["x"], columns["y"]], axis=1).astype(np.int64)
    grid = TileGrid.from_json(value["grid"], origins)
    card = _restore_card(made["encoder"])
    attrs = dict(made.get("imported") or {"format": origin})
    settings = {"settings": made.get("grid_settings", {})}
    path = keep_features(out, slide, grid, card, features, attrs, _plain_name(value["grid_name"]), made | settings)
    store = FeatureStore.create(path, slide)
    for run, kept in dict(value.get("attention", {})).items():
        maps = [columns[name] for name in kept["columns"] if name in columns]
        if maps and len(maps) == len(kept["columns"]):
            record = dict(kept["record"]) | {"grid_digest": grid.digest}
            store.write_attention(_plain_name(run), np.stack(maps, axis=1).astype(np.float32), record)
    return path


def needed_columns(text: str) -> list[str]:
    """Columns that the record names: places, and maps of attention."""
    value = json.loads(text)
    kept: Sequence[Mapping[str, Any]] = list(dict(value.get("attention", {})).values())
    return ["x", "y", *(str(name) for one in kept for name in one["columns"])]


def _restore_card(value: Mapping[str, Any]) -> EncoderCard:
    """The card that ``EncoderCard.to_json`` described: lists become tuples again."""
    known = {field.name for field in fields(EncoderCard)}
    kept: dict[str, Any] = {
        name: tuple(part) if isinstance(part, list) else part for name, part in value.items() if name in known
    }
    kept["options"] = tuple((str(name), part) for name, part in kept.get("options", ()))
    card = EncoderCard(**kept)
    if not isinstance(card.name, str) or not isinstance(card.dim, int):
        raise TypeError("its record names no encoder")
    return card


def _plain_name(name: Any) -> str:
    text = str(name)
    if features_key(text) != text or text.startswith(".") or not text or len(text) > 200:
        raise ValueError(f"its record holds the name {text[:40]!r}")
    return text
