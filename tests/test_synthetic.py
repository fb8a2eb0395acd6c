"""Synthetic slides: the same from any side, with truth that agrees with the pixels."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from skimage.color import separate_stains
from skimage.data import immunohistochemistry
from skimage.measure import label, regionprops

import wsi_engine as we
from wsi_engine.errors import SettingsError
from wsi_engine.synthetic import (
    KINDS,
    RUIFROK_JOHNSTON,
    Ellipse,
    SlideSpec,
    Stains,
    SyntheticSlide,
    paint_constant,
    paint_ihc,
    paint_ramp,
    write_ihc_slide,
    write_marks,
    write_slide,
)
from wsi_engine.tiffwriter import TiffLayout

SPEC = SlideSpec(width=3000, height=2200, seed=5, tumours=1)
WHOLE = (0, 0, SPEC.width, SPEC.height)
LOSSLESS = TiffLayout(compression="lzw")


@pytest.fixture(scope="module")
def slide() -> SyntheticSlide:
    return SyntheticSlide(SPEC)


@pytest.fixture(scope="module")
def pixels(slide: SyntheticSlide) -> np.ndarray:
    return slide.paint(*WHOLE)


@pytest.fixture(scope="module")
def labels(slide: SyntheticSlide) -> np.ndarray:
    return slide.truth.labels(*WHOLE)


def test_every_rectangle_shows_the_same_slide(slide: SyntheticSlide, pixels: np.ndarray, labels: np.ndarray) -> None:
    for x, y, width, height in [(0, 0, 1, 1), (1371, 901, 257, 119), (1490, 1000, 64, 300), (2936, 2137, 64, 63)]:
        window = np.s_[y : y + height, x : x + width]
        assert np.array_equal(slide.paint(x, y, width, height), pixels[window])
        assert np.array_equal(slide.truth.labels(x, y, width, height), labels[window])
        assert np.array_equal(slide.truth.tissue(x, y, width, height), slide.truth.tissue(*WHOLE)[window])
        assert np.array_equal(slide.truth.tumour(x, y, width, height), slide.truth.tumour(*WHOLE)[window])


def test_the_seed_decides(pixels: np.ndarray) -> None:
    box = 1300, 900, 200, 200
    assert np.array_equal(SyntheticSlide(SPEC).paint(*box), pixels[900:1100, 1300:1500])
    other = SyntheticSlide(SlideSpec(width=3000, height=2200, seed=6, tumours=1)).paint(*box)
    assert not np.array_equal(other, pixels[900:1100, 1300:1500])


def test_nuclei_are_whole_and_their_table_agrees(slide: SyntheticSlide, labels: np.ndarray) -> None:
    table = slide.truth.nuclei(*WHOLE)
    assert len(table) > 1000
    assert len(np.unique(table.id)) == len(table)
    found = {region.label: region for region in regionprops(labels)}
    listed = dict(zip(table.id.tolist(), range(len(table)), strict=True))
    assert set(found) - set(listed) == set()
    assert len(found) > 0.95 * len(listed), "some may lie under others, few"
    whole = [n for n, r in found.items() if min(r.bbox[:2]) > 0 and r.bbox[2] < SPEC.height and r.bbox[3] < SPEC.width]
    offsets, ratios = [], []
    for number in whole:
        row, region = listed[number], found[number]
        offsets.append(np.hypot(region.centroid[1] + 0.5 - table.x[row], region.centroid[0] + 0.5 - table.y[row]))
        ratios.append(region.area * SPEC.mpp**2 / (np.pi * table.radius[row] ** 2))
    assert np.median(offsets) < 1.0
    assert 0.9 < np.median(ratios) < 1.1
    pieces = sum(label(region.image, connectivity=2).max() > 1 for region in found.values())
    assert pieces < 0.02 * len(found), "nuclei are of one piece, but for those that another one covers"


def test_nuclei_are_blue_and_stroma_is_pink(slide: SyntheticSlide, pixels: np.ndarray, labels: np.ndarray) -> None:
    vectors = np.array([RUIFROK_JOHNSTON.haematoxylin, RUIFROK_JOHNSTON.eosin])
    basis = np.vstack([vectors, np.cross(*vectors)])
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    haematoxylin = separate_stains(pixels, np.linalg.inv(basis))[..., 0]
    tissue = slide.truth.tissue(*WHOLE)
    inside, outside = haematoxylin[labels > 0], haematoxylin[tissue & (labels == 0)]
    assert np.median(inside) > 3 * np.median(outside)
    assert np.percentile(inside, 10) > np.percentile(outside, 75)
    red, green, _ = np.median(pixels[tissue & (labels == 0)], axis=0)
    assert red > green + 20


def test_background_is_white_and_the_tissue_as_large_as_asked(slide: SyntheticSlide, pixels: np.ndarray) -> None:
    tissue = slide.truth.tissue(*WHOLE)
    assert 0.45 < tissue.mean() < 0.75
    glass = ~ndimage.binary_dilation(tissue, iterations=40)  # cells may stand out from the edge by 10 µm
    assert glass.mean() > 0.1
    assert pixels[glass].min() > 200
    assert pixels[glass].std() < 4


def test_tumour_nuclei_are_larger_denser_and_less_regular(slide: SyntheticSlide, labels: np.ndarray) -> None:
    tumour, tissue = slide.truth.tumour(*WHOLE), slide.truth.tissue(*WHOLE)
    assert 0.02 < tumour.mean() < 0.5
    assert not (tumour & ~tissue).any()
    table = slide.truth.nuclei(*WHOLE)
    is_tumour = table.kind == KINDS.index("tumour")
    within = tumour[table.y.astype(int), table.x.astype(int)]
    assert within[is_tumour].mean() > 0.95
    assert set(np.unique(table.kind)) == set(range(len(KINDS)))
    assert np.median(table.radius[is_tumour]) > 1.2 * np.median(table.radius[~is_tumour])
    assert table.radius[is_tumour].std() > table.radius[table.kind == KINDS.index("lymphocyte")].std()
    covered = (labels > 0)[tumour].mean(), (labels > 0)[tissue & ~tumour].mean()
    assert covered[0] > 1.3 * covered[1]


def test_tumours_stand_where_they_are_asked_for() -> None:
    ellipse = Ellipse(700, 1200, 300, 200)
    spec = SlideSpec(width=2000, height=2000, mpp=1.0, coverage=1, tumours=0, tumour_ellipses=(ellipse,))
    tumour = SyntheticSlide(spec).truth.tumour(0, 0, 2000, 2000)
    rows, columns = np.nonzero(tumour)
    assert columns.mean() == pytest.approx(700, abs=25)
    assert rows.mean() == pytest.approx(1200, abs=25)
    assert tumour.sum() == pytest.approx(np.pi * 300 * 200, rel=0.15)


def test_pen_and_blur_are_where_the_truth_says() -> None:
    clean = SyntheticSlide(SlideSpec(width=1600, height=1200, seed=2))
    spoiled = SyntheticSlide(SlideSpec(width=1600, height=1200, seed=2, pen_marks=1, blur_regions=1))
    box = 0, 0, 1600, 1200
    pen, blur = spoiled.truth.pen(*box), spoiled.truth.blur(*box)
    assert 0.005 < pen.mean() < 0.2
    assert 0.01 < blur.mean() < 0.2
    before, after = clean.paint(*box).astype(int), spoiled.paint(*box).astype(int)
    assert np.abs(before - after).max(axis=2)[pen].mean() > 60
    sharp = np.abs(np.diff(before.mean(axis=2), axis=1))[:, :][blur[:, 1:] & ~pen[:, 1:]].mean()
    soft = np.abs(np.diff(after.mean(axis=2), axis=1))[blur[:, 1:] & ~pen[:, 1:]].mean()
    assert soft < 0.7 * sharp


def test_a_written_slide_is_the_painted_one(tmp_path: Path, pixels: np.ndarray) -> None:
    truth = write_slide(tmp_path / "a.svs", SPEC, LOSSLESS)
    with we.open_slide(tmp_path / "a.svs") as slide:
        assert slide.dimensions == (SPEC.width, SPEC.height)
        assert slide.mpp == (SPEC.mpp, SPEC.mpp)
        window = slide.read_region(1300, 900, 300, 200, mpp=SPEC.mpp)
    assert np.array_equal(window, pixels[900:1100, 1300:1600])
    assert truth.spec == SPEC


def test_an_empty_slide_has_no_tissue(tmp_path: Path) -> None:
    slide = SyntheticSlide(SlideSpec(width=400, height=300, coverage=0))
    assert not slide.truth.tissue(0, 0, 400, 300).any()
    assert len(slide.truth.nuclei(0, 0, 400, 300)) == 0
    assert slide.paint(0, 0, 400, 300).min() > 200


def test_huge_slides_are_drawn_a_piece_at_a_time() -> None:
    spec = SlideSpec(width=100_000, height=100_000, coverage=1)
    slide = SyntheticSlide(spec)
    assert slide.paint(61_000, 83_000, 256, 256).std() > 10
    assert slide.truth.labels(61_000, 83_000, 256, 256).max() > 0


def test_marks_lie_where_they_were_asked_for(tmp_path: Path) -> None:
    positions = [(30.0, 40.0), (100.0, 62.5), (155.3, 120.7)]
    write_marks(tmp_path / "marks.svs", 0.325, positions)
    with we.open_slide(tmp_path / "marks.svs") as slide:
        assert slide.dimensions == (601, 495)
        grey = 235 - slide.read_region(0, 0, *slide.dimensions, mpp=0.325)[..., 0].astype(float)
    for (x, y), region in zip(
        positions, sorted(regionprops(label(grey > 100)), key=lambda r: r.centroid[1]), strict=True
    ):
        assert (region.centroid[1] + 0.5) * 0.325 == pytest.approx(x, abs=0.05)
        assert (region.centroid[0] + 0.5) * 0.325 == pytest.approx(y, abs=0.05)


def test_ramps_rise_evenly() -> None:
    paint = paint_ramp(1000, 500)
    whole = paint(0, 0, 1000, 500)
    assert np.array_equal(paint(300, 200, 100, 50), whole[200:250, 300:400])
    assert np.array_equal(whole[7, :, 0], np.rint(255 * (np.arange(1000) + 0.5) / 1000))
    assert np.array_equal(whole[:, 7, 1], np.rint(255 * (np.arange(500) + 0.5) / 500))
    assert (paint_constant((9, 8, 7))(5, 5, 4, 3) == (9, 8, 7)).all()


def test_the_grown_picture_has_no_seams_and_no_invented_colours() -> None:
    paint = paint_ihc(3000, 2000, seed=3)
    grown = paint(0, 0, 3000, 2000)
    picture = immunohistochemistry()
    assert np.array_equal(paint(700, 900, 300, 200), grown[900:1100, 700:1000])
    steps = np.abs(np.diff(picture.astype(int), axis=1)).mean(axis=(0, 2))
    assert np.abs(np.diff(grown.astype(int), axis=1)).mean(axis=(0, 2)).max() < 1.2 * steps.max()
    assert {tuple(c) for c in grown[::7, ::7].reshape(-1, 3)} <= {tuple(c) for c in picture.reshape(-1, 3)}
    halves = [grown[:, k * 500 : (k + 1) * 500] for k in range(6)]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(halves, 2))


def test_a_grown_slide_opens(tmp_path: Path) -> None:
    write_ihc_slide(tmp_path / "ihc.svs", 1300, 900, mpp=0.4, layout=LOSSLESS, seed=1)
    with we.open_slide(tmp_path / "ihc.svs") as slide:
        assert slide.mpp == (0.4, 0.4)
        assert np.array_equal(slide.read_region(600, 300, 128, 64, mpp=0.4), paint_ihc(1300, 900, 1)(600, 300, 128, 64))


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 0}, {"mpp": 0}, {"mpp": float("nan")}, {"seed": -1}, {"seed": 2**31}, {"coverage": 1.1},
        {"nuclei_density": -0.1}, {"gland_density": 2}, {"pieces": 0}, {"tumours": -1},
        {"pen_marks": -1}, {"grain": -1},
    ],
)  # fmt: skip
def test_wrong_specs_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match="give"):
        SlideSpec(**{"width": 100, "height": 100} | wrong)


def test_more_nuclei_than_labels_are_refused() -> None:
    with pytest.raises(SettingsError, match="32-bit labels"):
        SlideSpec(width=3_000_000, height=3_000_000)


def test_wrong_outlines_stains_and_rectangles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="semi-axes"):
        Ellipse(1, 1, 0, 1)
    with pytest.raises(SettingsError, match="haematoxylin"):
        Stains((0, 0, 0), (1, 1, 1))
    with pytest.raises(SettingsError, match="holds nothing"):
        SyntheticSlide(SPEC).paint(0, 0, 0, 5)
    with pytest.raises(SettingsError, match="one position"):
        write_marks(tmp_path / "a.svs", 0.5, [])
    with pytest.raises(SettingsError, match="smaller than a pixel"):
        write_marks(tmp_path / "a.svs", 5, [(3, 3)], radius_um=2)
