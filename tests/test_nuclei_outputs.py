"""What leaves the engine: GeoJSON for QuPath, tables, pictures."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import tracemalloc
import uuid
from pathlib import Path

import numpy as np
import pytest
from support_nuclei import make_chunk, make_nuclei, make_record

from wsi_engine import errors, open_slide
from wsi_engine.nuclei.instances import assemble_instances
from wsi_engine.nuclei.overlay import FRAME, OUTLINE, draw_nuclei, find_crowded
from wsi_engine.nuclei.segmentation import segment_nuclei
from wsi_engine.synthetic import SlideSpec, SyntheticSlide


def test_geojson_is_what_qupath_reads(tmp_path: Path) -> None:
    picture = SyntheticSlide(SlideSpec(width=400, height=300, coverage=1, seed=4)).paint(0, 0, 400, 300)
    nuclei = segment_nuclei(picture, "stain", 0.2127)  # outlines between level-0 pixels
    path = tmp_path / "nuclei.geojson"
    nuclei.to_geojson(path)
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert found["type"] == "FeatureCollection"
    assert len(found["features"]) == len(nuclei) > 20
    assert len({uuid.UUID(feature["id"]) for feature in found["features"]}) == len(nuclei)
    table = nuclei.table()
    for k, feature in enumerate(found["features"]):
        assert set(feature) == {"type", "id", "geometry", "properties"}
        assert (feature["type"], feature["geometry"]["type"]) == ("Feature", "Polygon")
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1]
        assert np.allclose(ring[:-1], nuclei.contour(k), atol=0.006)
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        assert properties["classification"]["name"] == "nucleus"
        assert all(isinstance(part, int) for part in properties["classification"]["color"])
        measured = properties["measurements"]
        assert list(measured) == [name for name in table if name not in ("id", "x", "y")]
        assert all(measured[name] == pytest.approx(table[name][k], rel=1e-4, abs=1e-9) for name in measured)
    again = tmp_path / "again.geojson"
    nuclei.to_geojson(again)
    assert again.read_bytes() == path.read_bytes()


def test_geojson_keeps_large_coordinates(tmp_path: Path) -> None:
    nuclei = make_nuclei(3)
    far = assemble_instances([], (1.0, 1.0), nuclei.record)
    moved = type(far)(
        nuclei.offsets, nuclei.points + np.float32(123_456.25), nuclei.centroid, nuclei.area, nuclei.score,
        nuclei.measurements, nuclei.record,
    )  # fmt: skip
    moved.to_geojson(tmp_path / "far.geojson")
    features = json.loads((tmp_path / "far.geojson").read_text())["features"]
    assert features[0]["geometry"]["coordinates"][0][0] == [123_457.25, 123_457.25]


def test_geojson_of_many_nuclei(tmp_path: Path) -> None:
    make_nuclei(100_000, across=300).to_geojson(tmp_path / "many.geojson")
    text = (tmp_path / "many.geojson").read_text()
    features = json.loads(text)["features"]
    assert len({feature["id"] for feature in features}) == 100_000
    assert text.count("\n") == 100_002  # one on each line


def test_geojson_is_written_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsi_engine.nuclei.geojson._AT_A_TIME", 100)
    peaks, path = [], tmp_path / "stream.geojson"
    for count in (300, 5_000):
        nuclei = make_nuclei(count)
        tracemalloc.start()
        nuclei.to_geojson(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 8 * 5_000  # the ids of the table alone
    assert peaks[1] < path.stat().st_size / 4


def test_geojson_of_no_nuclei(tmp_path: Path) -> None:
    nothing = assemble_instances([], (1.0, 1.0), make_nuclei(1).record)
    nothing.to_geojson(tmp_path / "none.geojson")
    assert json.loads((tmp_path / "none.geojson").read_text()) == {"type": "FeatureCollection", "features": []}


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    nuclei = make_nuclei(50)
    (tmp_path / "kept.geojson").write_text("old")
    (tmp_path / "kept.csv").mkdir()
    broken = type(nuclei)(
        nuclei.offsets, nuclei.points[:20], nuclei.centroid, nuclei.area, nuclei.score,
        nuclei.measurements, nuclei.record,
    )  # fmt: skip
    with pytest.raises((ValueError, IndexError)):
        broken.to_geojson(tmp_path / "kept.geojson")
    assert (tmp_path / "kept.geojson").read_text() == "old"
    with pytest.raises(errors.StoreError, match="cannot write the table"):
        nuclei.to_csv(tmp_path / "kept.csv")
    with pytest.raises(errors.StoreError, match="cannot write the nuclei"):
        nuclei.to_geojson(tmp_path / "nowhere" / "x.geojson")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.csv", "kept.geojson"]


def test_csv_holds_the_table(tmp_path: Path) -> None:
    nuclei = make_nuclei(25)
    nuclei.to_csv(tmp_path / "nuclei.csv")
    with open(tmp_path / "nuclei.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    table = nuclei.table()
    assert list(rows[0]) == list(table)
    assert [row["id"] for row in rows] == [str(k) for k in range(1, 26)]
    for name, values in table.items():
        assert [float(row[name]) for row in rows] == pytest.approx(values.tolist(), rel=1e-5)


def test_parquet_without_pyarrow_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def refuse(name: str) -> object:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr("wsi_engine.nuclei.table.importlib.import_module", refuse)
    with pytest.raises(errors.SettingsError, match="pip install pyarrow, or write CSV"):
        make_nuclei(2).to_parquet(tmp_path / "nuclei.parquet")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow")
def test_parquet_holds_the_table(tmp_path: Path) -> None:
    parquet = importlib.import_module("pyarrow.parquet")
    nuclei = make_nuclei(25)
    nuclei.to_parquet(tmp_path / "nuclei.parquet")
    found = parquet.read_table(tmp_path / "nuclei.parquet")
    for name, values in nuclei.table().items():
        assert np.array_equal(found[name].to_numpy(), values), name


def test_the_picture_shows_nuclei_and_the_crowded_place() -> None:
    picture = SyntheticSlide(SlideSpec(width=1200, height=700, coverage=1, seed=4)).paint(0, 0, 1200, 700)
    nuclei = segment_nuclei(picture, "stain", 0.25, tile_px=512)
    with open_slide(picture, 0.25) as slide:
        fine, coarse = draw_nuclei(slide, nuclei), draw_nuclei(slide, nuclei, 100)
        empty = draw_nuclei(slide, assemble_instances([], (1.0, 1.0), nuclei.record), 100)
    assert fine.dtype == np.uint8
    assert fine.shape == (700, 1200 + 12 + 800, 3)
    labels = nuclei.labels()
    edge = (labels > 0) & (np.roll(labels, 1, axis=1) != labels)
    green = (fine[:, :1200] == OUTLINE).all(axis=2)
    assert green[edge].mean() > 0.7
    assert green[(labels == 0) & ~edge].mean() < 0.1
    assert (fine[:, 1212:] == OUTLINE).all(axis=2).sum() > 1000
    assert (coarse == FRAME).all(axis=2).any()
    assert empty.shape == (59, 100, 3)
    with open_slide(picture, 0.25) as slide, pytest.raises(errors.SettingsError, match="at least 16"):
        draw_nuclei(slide, nuclei, 8)


def test_the_most_crowded_place_is_found() -> None:
    corners = np.stack(np.mgrid[:60, :40], axis=-1).reshape(-1, 2) * 20
    crowd = np.array([620, 410]) + np.stack(np.mgrid[:9, :9], axis=-1).reshape(-1, 2) * 6
    nuclei = assemble_instances([make_chunk(corners), make_chunk(crowd)], (1.0, 1.0), make_record(1200, 800))
    assert find_crowded(nuclei, (100.0, 60.0)) == (650, 470)  # around the cell from 600 to 800 and 400 to 600
    assert find_crowded(nuclei, (1000.0, 900.0)) == (200, 0)  # within the slide
