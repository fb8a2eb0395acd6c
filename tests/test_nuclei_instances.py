"""Sets of nuclei: their order, measurements against scikit-image, labels, summaries, and what a store keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from skimage.draw import polygon
from skimage.measure import regionprops
from support_nuclei import make_chunk, make_nuclei, make_record

from wsi_engine import FeatureStore, errors, open_slide
from wsi_engine.kernels import trace_contours, unmix_stains
from wsi_engine.kernels.pieces import fill_polygons
from wsi_engine.nuclei.instances import MEASUREMENTS, InstanceRecord, InstanceSet, assemble_instances
from wsi_engine.nuclei.keeping import check_nuclei, read_nuclei, stored_nuclei, write_nuclei
from wsi_engine.nuclei.neighbours import count_neighbours
from wsi_engine.nuclei.segmentation import segment_nuclei
from wsi_engine.slide_record import SlideRecord
from wsi_engine.synthetic import SlideSpec, SyntheticSlide


@pytest.fixture(scope="module")
def picture() -> NDArray[np.uint8]:
    return SyntheticSlide(SlideSpec(width=500, height=400, coverage=1, seed=4)).paint(0, 0, 500, 400)


@pytest.fixture(scope="module")
def nuclei(picture: NDArray[np.uint8]) -> InstanceSet:
    return segment_nuclei(picture, "stain", 0.25)


def test_order_is_that_of_first_pixels_whatever_the_chunks() -> None:
    corners = np.random.default_rng(0).permutation(np.stack(np.mgrid[:20, :30], axis=-1).reshape(-1, 2) * 7)
    whole = assemble_instances([make_chunk(corners)], (2.0, 2.0), make_record())
    parts = [make_chunk(corners[300:]), make_chunk(corners[:11]), make_chunk(corners[11:300])]
    again = assemble_instances(parts, (2.0, 2.0), make_record())
    for name, values in whole.table().items():
        assert np.array_equal(values, again.table()[name]), name
    assert np.array_equal(whole.points, again.points)
    first = np.array([whole.contour(k)[0] for k in range(len(whole))]) / 2
    assert np.array_equal(first, np.array(sorted(corners.tolist(), key=lambda c: (c[1], c[0]))))


def test_measurements_are_those_of_scikit_image(picture: NDArray[np.uint8], nuclei: InstanceSet) -> None:
    labels = nuclei.labels()
    stains = unmix_stains(picture)
    table = nuclei.table()
    props = regionprops(labels, intensity_image=stains)
    assert len(props) == len(nuclei) > 40
    whole = [k for k, p in enumerate(props) if np.isclose(p.area * 0.0625, table["area_um2"][k])]
    assert len(whole) > 0.9 * len(props)  # a few have large holes, which labels fill
    for k in whole:
        p = props[k]
        assert table["x"][k] == pytest.approx(p.centroid[1] + 0.5)
        assert table["y"][k] == pytest.approx(p.centroid[0] + 0.5)
        assert table["perimeter_um"][k] == pytest.approx(p.perimeter * 0.25, rel=1e-5)
        assert table["axis_major_um"][k] == pytest.approx(p.axis_major_length * 0.25, rel=1e-5)
        assert table["axis_minor_um"][k] == pytest.approx(p.axis_minor_length * 0.25, rel=1e-5)
        assert table["eccentricity"][k] == pytest.approx(p.eccentricity, rel=1e-4)
        assert table["solidity"][k] == pytest.approx(p.solidity, rel=1e-5)
        inside = stains[labels == k + 1]
        assert table["haematoxylin_mean"][k] == pytest.approx(inside[:, 0].mean(), abs=0.05)
        assert table["eosin_mean"][k] == pytest.approx(inside[:, 1].mean(), abs=0.05)
        assert table["haematoxylin_sd"][k] == pytest.approx(inside[:, 0].std(), abs=0.05)
        assert table["eosin_sd"][k] == pytest.approx(inside[:, 1].std(), abs=0.05)
    assert (nuclei.score > 0).all()
    assert set(nuclei.measurements) == set(MEASUREMENTS)


def test_neighbours_are_counted() -> None:
    places = np.random.default_rng(2).uniform(0, 400, (500, 2))
    far = np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1))
    assert np.array_equal(count_neighbours(places, 50), (far <= 50).sum(axis=1) - 1)
    assert count_neighbours(np.zeros((0, 2)), 50).shape == (0,)


def test_labels_are_the_pixels_of_the_outlines() -> None:
    truth = ndimage.label(np.random.default_rng(1).random((90, 120)) > 0.4)[0].astype(np.int32)
    filled = np.zeros_like(truth)
    for k in range(1, truth.max() + 1):
        filled[ndimage.binary_fill_holes(truth == k)] = k  # in order: what lies in a hole comes after its ring
    contours = trace_contours(truth)
    assert len(contours) == truth.max()
    out = np.zeros_like(truth)
    fill_polygons(contours.offsets, contours.points, out)
    assert np.array_equal(out, filled)


def test_polygons_that_are_slanted_are_filled_as_scikit_image_does() -> None:
    points = np.array([[3.3, 1.2], [30.7, 8.9], [22.1, 27.6], [11.2, 14.8], [2.4, 29.3]])
    out = np.zeros((32, 32), np.int32)
    fill_polygons(np.array([0, 5]), points, out)
    expected = np.zeros_like(out)
    expected[polygon(points[:, 1] - 0.5, points[:, 0] - 0.5, out.shape)] = 1
    assert np.array_equal(out, expected)


def test_labels_at_other_sizes_and_of_regions(nuclei: InstanceSet) -> None:
    labels = nuclei.labels()
    assert labels.shape == (400, 500)
    assert np.array_equal(np.unique(labels), np.arange(len(nuclei) + 1))
    assert np.array_equal(nuclei.labels((1200, 1500))[1::3, 1::3], labels)
    assert np.array_equal(nuclei.labels(region=(101, 52, 200, 300)), labels[52:352, 101:301])
    with pytest.raises(errors.SettingsError, match="cannot be made"):
        nuclei.labels((0, 10))
    with pytest.raises(errors.SettingsError, match="cannot be made"):
        nuclei.labels((100_000, 100_000))


def test_the_summary_counts() -> None:
    nuclei = make_nuclei(500)
    summary = nuclei.summary()
    assert summary["nuclei"] == 500
    assert summary["nuclei_per_mm2"] == pytest.approx(500 / (602 * 38 * 0.25e-6))
    assert summary["distributions"]["area_um2"] == pytest.approx(
        {"mean": 4, "sd": 0, "median": 4, "p5": 4, "p25": 4, "p75": 4, "p95": 4}
    )
    near = nuclei.table()["neighbours"]
    assert summary["distributions"]["neighbours"]["mean"] == pytest.approx(near.mean())
    json.dumps(summary, allow_nan=False)


def test_no_nuclei_at_all() -> None:
    nothing = assemble_instances([], (1.0, 1.0), make_record())
    assert len(nothing) == 0
    assert nothing.labels((5, 6)).tolist() == [[0] * 6] * 5
    assert nothing.summary()["distributions"] == {}
    assert all(len(values) == 0 for values in nothing.table().values())


@pytest.fixture
def store(picture: NDArray[np.uint8], tmp_path: Path) -> FeatureStore:
    with open_slide(picture, 0.25) as slide:
        return FeatureStore.create(tmp_path / "array.zarr", SlideRecord.of(slide, "array"))


@pytest.mark.parametrize("some", [True, False])
def test_a_store_gives_back_what_it_was_given(store: FeatureStore, nuclei: InstanceSet, some: bool) -> None:
    kept = nuclei if some else assemble_instances([], (1.0, 1.0), nuclei.record)
    assert not check_nuclei(store, kept.record)
    write_nuclei(store, kept)
    again = FeatureStore.open(store.path)
    assert stored_nuclei(again) == ("stain",)
    found = read_nuclei(again)
    assert check_nuclei(again, kept.record)
    assert found.record == InstanceRecord.from_json(json.loads(json.dumps(kept.record.to_json())))
    for name, values in kept.table().items():
        assert np.array_equal(found.table()[name], values), name
        assert found.table()[name].dtype == values.dtype
    assert np.array_equal(found.points, kept.points)
    assert np.array_equal(found.offsets, kept.offsets)
    assert again.encoders() == ()


def test_nuclei_that_are_not_complete_do_not_count(store: FeatureStore, nuclei: InstanceSet) -> None:
    write_nuclei(store, nuclei)
    with pytest.raises(errors.StoreError, match="stop"):
        write_nuclei(store, replace(nuclei, score=_Stopping()))  # type: ignore[arg-type]
    assert stored_nuclei(FeatureStore.open(store.path)) == ()
    with pytest.raises(errors.StoreError, match="0 methods"):
        read_nuclei(FeatureStore.open(store.path))
    write_nuclei(store, nuclei)
    assert stored_nuclei(store) == ("stain",)


class _Stopping:
    """An array that cannot be read."""

    shape, dtype = (7,), np.dtype(np.float32)

    def __len__(self) -> int:
        raise ValueError("stop")


def test_other_settings_or_tissue_are_not_mixed(store: FeatureStore, nuclei: InstanceSet) -> None:
    write_nuclei(store, nuclei)
    for changed in (
        replace(nuclei.record, tissue_digest="other"),
        replace(nuclei.record, method_settings={"window": 3}),
    ):
        with pytest.raises(errors.MismatchError, match="found differently"):
            check_nuclei(store, changed)
    assert not check_nuclei(store, replace(nuclei.record, method="other"))
    with pytest.raises(errors.StoreError, match="other is not among them"):
        read_nuclei(store, "other")
