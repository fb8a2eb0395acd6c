"""What many stores hold, read from their small JSON files alone: no array is opened, no Zarr group is walked.

Opening a store and its grid takes some milliseconds and reads every origin; a cohort has thousands of stores.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from wsi_engine.extents import read_json
from wsi_engine.places import Place, list_folders
from wsi_engine.runs import FeatureOrigin
from wsi_engine.store import SCHEMA_VERSION

_THREADS = 8
"""Stores looked at side by side: on a network's disk each file is a wait."""


@dataclass(frozen=True)
class StoredFeatures:
    """Complete features of one encoder: where they come from and how many tiles there are."""

    origin: FeatureOrigin
    tiles: int


@dataclass(frozen=True)
class StoreFacts:
    """What a store holds.

    Attributes:
        path: the store.
        exists: something is at that path.
        fault: why it cannot be used; empty where it can, or is not there.
        fingerprint: of the slide's content; empty where it is not known, as of an import.
        complete: complete features by the encoder's key.
        partial: keys of encoders whose features are begun.
    """

    path: Place
    exists: bool = True
    fault: str = ""
    fingerprint: str = ""
    complete: Mapping[str, StoredFeatures] = field(default_factory=dict)
    partial: tuple[str, ...] = ()


def survey_stores(paths: Sequence[Place]) -> list[StoreFacts]:
    """What each store holds, in the order given. Raises nothing: what is wrong with a store is in its facts."""
    with ThreadPoolExecutor(_THREADS, "survey") as pool:
        return list(pool.map(survey_store, paths))


def survey_store(path: Place) -> StoreFacts:
    """What one store holds."""
    try:
        if not path.is_dir():
            return StoreFacts(path, exists=False)
        attrs = read_node(path)["attributes"]
        if attrs["schema_version"] != SCHEMA_VERSION:
            return StoreFacts(
                path, fault=f"has schema version {attrs['schema_version']}, this engine uses {SCHEMA_VERSION}"
            )
        states = {key: _survey_features(path, key) for key in list_folders(path / "features")}
        return StoreFacts(
            path,
            fingerprint=str(attrs["slide"]["fingerprint"]),
            complete={key: state for key, state in states.items() if state is not None},
            partial=tuple(key for key, state in states.items() if state is None),
        )
    except FileNotFoundError as error:
        return StoreFacts(path, fault=f"lacks {os.path.relpath(error.filename, path)}")
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
        return StoreFacts(path, fault=f"is damaged ({type(error).__name__}: {error})")


def _survey_features(store: Place, key: str) -> StoredFeatures | None:
    """The features of one encoder; None where they are not complete."""
    try:
        values = read_node(store / "features" / key / "values")
    except FileNotFoundError:
        return None
    made = values["attributes"]
    if made.get("complete") is not True:
        return None
    grid = read_node(store / "tiles" / made["grid"] / "origins")["attributes"]
    card = made["encoder"]
    origin = FeatureOrigin(
        card["name"], int(card["dim"]), card["weights_digest"], made["precision"],
        float(grid["mpp"]), int(grid["tile_px"]), int(grid["stride_px"]),
    )  # fmt: skip
    return StoredFeatures(origin, int(values["shape"][0]))


def read_node(node: Place) -> dict[str, Any]:
    """What the ``zarr.json`` of a group or array says.

    Raises:
        OSError: it is not there or cannot be read.
        ValueError: it is no JSON, or no plain file.
        TypeError: it is no object.
    """
    value = read_json(node / "zarr.json")
    if not isinstance(value, dict):
        raise TypeError("zarr.json holds no object")
    return value
