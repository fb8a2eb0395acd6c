"""A writer that stood still between its look at the lease and its write, while another took over and completed all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wsi_engine import FeatureStore, TileGrid
from wsi_engine.encoders.base import EncoderCard
from wsi_engine.errors import BusyError, StoreError
from wsi_engine.slide_record import SlideRecord
from wsi_engine.writer import FeatureIdentity, FeatureWriter

RECORD = SlideRecord("a", "f" * 64, (4000, 3000), (0.25, 0.25), "aperio MPP", "aperio", "turbo")
CARD = EncoderCard("net", "timm", "resnet", 224, 3, "mean", "open", weights="random:0", weights_digest="d" * 64)
ROWS = np.arange(10)
FEATURES = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)


class Stall:
    """The look at a lease, after which the process stands still once: meanwhile another completes the features."""

    def __init__(self) -> None:
        self.meanwhile: Callable[[], None] | None = None
        self.lost = False

    def __call__(self) -> None:
        if self.lost:
            raise BusyError("a was taken over by process 1 on far")
        if self.meanwhile:
            self.meanwhile()
            self.lost = True


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    grid = TileGrid(np.stack([ROWS * 512, ROWS * 0], axis=1).astype(np.int64), 256, 256, 0.5, (512.0, 512.0), 12)
    made = FeatureStore.create(tmp_path / "a.zarr", RECORD)
    made.write_grid("g", grid, {"mpp": 0.5}, None)
    return made


def make_writer(store: FeatureStore, check: Callable[[], None] = lambda: None) -> FeatureWriter:
    return FeatureWriter(store, FeatureIdentity(CARD, "g", store.grid("g"), "fp32", "float32"), 4, check)


def test_complete_features_are_not_made_again(store: FeatureStore) -> None:
    stall = Stall()
    late = make_writer(store, stall)
    late.add(ROWS, FEATURES)
    stall.meanwhile = lambda: make_writer(store).finish({"encode": 7.0})
    late.finish({"encode": 1.0})
    assert late.complete
    np.testing.assert_array_equal(store.features("net"), FEATURES)
    assert store.provenance("net")["seconds"] == {"encode": 7.0}


@pytest.mark.parametrize("noticed", ["at once", "at the next batch"])
def test_a_batch_that_came_too_late_is_taken_back(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, noticed: str
) -> None:
    monkeypatch.setattr("wsi_engine.writer._SLOW_SECONDS", 0.0 if noticed == "at once" else 3600.0)
    stall = Stall()
    late = make_writer(store, stall)
    late.begin()
    make_writer(store).add(ROWS, FEATURES)
    stall.meanwhile = lambda: make_writer(store).finish({})
    partial = Path(store.path) / "features/net/partial"
    if noticed == "at the next batch":
        late.add(ROWS[:4], FEATURES[:4])
        assert partial.exists()
    with pytest.raises(BusyError, match="taken over"):
        late.add(ROWS[4:8], FEATURES[4:8])
    assert not partial.exists()
    np.testing.assert_array_equal(store.features("net"), FEATURES)


def test_a_lost_lease_costs_no_batch_of_the_other(store: FeatureStore) -> None:
    """What the other has not completed yet is left alone."""
    stall = Stall()
    late = make_writer(store, stall)
    late.add(ROWS[:4], FEATURES[:4])
    stall.lost = True
    with pytest.raises(BusyError):
        late.finish({})
    assert make_writer(store).missing_rows().tolist() == [4, 5, 6, 7, 8, 9]


def test_a_shard_that_another_deleted_is_missed(store: FeatureStore) -> None:
    """One that wakes up while this one writes makes the array anew: what was written before is gone."""
    first = make_writer(store)
    first.add(ROWS, FEATURES)

    def wake() -> None:
        for shard in (Path(store.path) / "features" / "net" / "values" / "c").rglob("*"):
            if shard.is_file():
                shard.unlink()

    looks = iter([False, True])
    late = make_writer(store, lambda: wake() if next(looks) else None)
    with pytest.raises(StoreError, match="went missing while they were written"):
        late.finish({"encode": 1.0})
    assert store.encoders() == ()
    make_writer(store).finish({"encode": 1.0})
    np.testing.assert_array_equal(store.features("net"), FEATURES)
