"""Extraction when something fails: one bad slide stops no other, and nothing half done counts."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from support_extraction import MeanEncoder, data_files, options

from wsi_engine import FeatureStore, Slide, extract
from wsi_engine.errors import EncoderError, InputError, SlideError
from wsi_engine.failures import read_failures
from wsi_engine.sampling import Sampling


def test_one_bad_slide_does_not_stop_the_rest(picture: Path, tmp_path: Path) -> None:
    (picture.parent / "broken.svs").write_bytes(b"II*\0" + bytes(500))
    (picture.parent / "zz.png").write_bytes(picture.read_bytes())
    report = extract(picture.parent, tmp_path / "out", MeanEncoder(), **options())  # type: ignore[arg-type]
    assert [result.status for result in report.results] == ["failed", "done", "done"]
    assert [result.slide_id for result in report.failed] == ["broken"]
    assert "broken.svs" in report.failed[0].message
    assert not (tmp_path / "out" / "broken.zarr").exists()
    (failure,) = read_failures(tmp_path / "out")
    assert (failure.slide_id, failure.job, failure.why) == ("broken", "features/mean", report.failed[0].message)
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == ["picture.zarr", "zz.zarr"]
    # and once the slide is done, nothing says that it failed
    (picture.parent / "broken.svs").unlink()
    (picture.parent / "broken.png").write_bytes(picture.read_bytes())
    extract(picture.parent, tmp_path / "out", MeanEncoder(), **options())  # type: ignore[arg-type]
    assert sorted(os.listdir(tmp_path / "out")) == ["broken.zarr", "picture.zarr", "zz.zarr"]


def test_a_slide_that_cannot_be_read_leaves_nothing(picture: Path, tmp_path: Path) -> None:
    report = extract(picture, tmp_path / "out", MeanEncoder(), **options(slide_mpp=30))  # type: ignore[arg-type]
    assert "too coarse" in report.failed[0].message
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.endswith(".failed.json")] == []


def test_an_error_of_the_encoder_leaves_nothing_complete(picture: Path, tmp_path: Path) -> None:
    class Failing(MeanEncoder):
        def encode(self, pixels: np.ndarray) -> np.ndarray:
            values = super().encode(pixels)
            values[3, 1] = np.nan
            return values

    report = extract(picture, tmp_path / "out", Failing(), **options())  # type: ignore[arg-type]
    assert report.results[0].status == "failed"
    assert "tile 3 at level-0" in report.results[0].message
    assert FeatureStore.open(tmp_path / "out" / "picture.zarr").encoders() == ()
    report = extract(picture, tmp_path / "out", MeanEncoder(), **options())  # type: ignore[arg-type]
    assert report.results[0].status == "done"


def test_an_output_that_cannot_be_written(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="output folder"):
        extract(picture, tmp_path / "file", MeanEncoder(), **options())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="output folder"):
        extract(picture, "/proc/nowhere", MeanEncoder(), **options())  # type: ignore[arg-type]


def test_a_full_disk_is_one_sentence(picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zarr

    plain = zarr.Array.__setitem__
    calls = []

    def full(self: zarr.Array, key: object, value: object) -> None:  # type: ignore[type-arg]
        calls.append(key)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        plain(self, key, value)  # type: ignore[arg-type]

    monkeypatch.setattr(zarr.Array, "__setitem__", full)
    report = extract(picture, tmp_path / "out", MeanEncoder(), **options())  # type: ignore[arg-type]
    assert report.results[0].status == "failed"
    assert "No space left on device" in report.results[0].message
    monkeypatch.undo()
    assert FeatureStore.open(tmp_path / "out" / "picture.zarr").encoders() == ()
    report = extract(picture, tmp_path / "out", MeanEncoder(), **options())  # type: ignore[arg-type]
    assert report.results[0].status == "done"


def test_a_slide_that_breaks_half_way_stops_no_other(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b", "c"):
        (picture.parent / f"{name}.png").write_bytes(picture.read_bytes())
    plain = Slide.read_sampled
    reads = []

    def failing(
        self: Slide, sampling: Sampling, x: int, y: int, width: int, height: int, *out: np.ndarray
    ) -> np.ndarray:
        if self.name == "c" and (width, height) == (64, 64):
            reads.append((x, y))
            if len(reads) > 70:
                raise SlideError("c.png ends early")
        return plain(self, sampling, x, y, width, height, *out)

    with monkeypatch.context() as patch:
        patch.setattr(Slide, "read_sampled", failing)
        report = extract(picture.parent, tmp_path / "out", MeanEncoder(), **options())  # type: ignore[arg-type]
    assert {result.slide_id: result.status for result in report.results} == {
        "b": "done",
        "c": "failed",
        "picture": "done",
    }
    assert "ends early" in report.failed[0].message
    assert [failure.slide_id for failure in read_failures(tmp_path / "out")] == ["c"]
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == ["b.zarr", "c.zarr", "picture.zarr"]
    assert not list((tmp_path / "out").glob(".*lease*"))
    again = extract(picture.parent, tmp_path / "out", MeanEncoder(), **options())  # type: ignore[arg-type]
    assert [result.status for result in again.results] == ["already complete", "done", "already complete"]
    assert not read_failures(tmp_path / "out")
    assert data_files(tmp_path / "out" / "c.zarr") == data_files(tmp_path / "out" / "b.zarr")


def test_an_encoder_that_fails_fails_every_slide(picture: Path, tmp_path: Path) -> None:
    class Failing(MeanEncoder):
        def encode(self, pixels: np.ndarray) -> np.ndarray:
            raise EncoderError("the device is full")

    (picture.parent / "b.png").write_bytes(picture.read_bytes())
    report = extract(picture.parent, tmp_path / "out", Failing(), **options())  # type: ignore[arg-type]
    assert [result.message for result in report.failed] == ["the device is full"] * 2
    assert not list((tmp_path / "out").glob("*lease*"))


def test_other_errors_are_not_hidden(picture: Path, tmp_path: Path) -> None:
    class Broken(MeanEncoder):
        def encode(self, pixels: np.ndarray) -> np.ndarray:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        extract(picture, tmp_path / "out", Broken(), **options())  # type: ignore[arg-type]
    assert not list((tmp_path / "out").glob("*lease*"))
    assert not [t for t in threading.enumerate() if t.name.startswith(("tiles", "prepare", "writer", "lease"))]
