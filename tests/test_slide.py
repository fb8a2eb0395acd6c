"""Slides: scale, its errors, and regions at an exact field of view."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from wsi_engine import open_slide
from wsi_engine.errors import ScaleError, SettingsError, SlideError
from wsi_engine.readers.base import Level, level_downsample
from wsi_engine.sampling import choose_sampling
from wsi_engine.slide import Slide, slide_name
from wsi_engine.synthetic import paint_ramp, write_marks
from wsi_engine.tiffwriter import TiffLayout, write_pyramid

MPPS = (0.194, 0.265, 0.325, 0.499)


def draw_marks(width: int, height: int, centres: np.ndarray, radius: float) -> np.ndarray:
    """Dark discs on light ground; centres in pixels (x, y), edges smooth so that centres are exact to sub-pixels."""
    y, x = np.mgrid[:height, :width] + 0.5
    image = np.full((height, width), 230.0)
    for cx, cy in centres:
        distance = np.hypot(x - cx, y - cy)
        image = np.minimum(image, 230 - 200 * np.clip(radius + 0.5 - distance, 0, 1))
    return np.repeat(np.rint(image).astype(np.uint8)[..., None], 3, axis=2)


def find_marks(image: np.ndarray) -> np.ndarray:
    """Centres of the discs, weighted by darkness, ordered by x + y."""
    weight = 230.0 - image[..., 0]
    labels, count = ndimage.label(weight > 60)
    centres = np.array(ndimage.center_of_mass(weight, ndimage.grey_dilation(labels, 3), range(1, count + 1)))[:, ::-1]
    return centres[np.argsort(centres.sum(axis=1))] + 0.5


@pytest.mark.parametrize("mpp", MPPS)
def test_distances_between_marks_are_exact(mpp: float, tmp_path: Path) -> None:
    marks_um = np.array([[60.0, 50.0], [300.0, 80.0], [120.0, 290.0], [310.0, 300.0]])
    side = round(400 / mpp)
    image = draw_marks(side, side, marks_um / mpp, radius=4 / mpp)
    path = tmp_path / "marks.svs"
    write_pyramid(
        path, side, side, lambda x, y, w, h: image[y : y + h, x : x + w], mpp=mpp, layout=TiffLayout(compression="none")
    )
    for source in (path, image):
        with open_slide(source, mpp=None if isinstance(source, Path) else mpp) as slide:
            assert slide.mpp == pytest.approx((mpp, mpp))
            region = slide.read_region(0, 0, 790, 790, mpp=0.5)
        found = find_marks(region) * 0.5
        expected = marks_um[np.argsort(marks_um.sum(axis=1))]
        assert len(found) == 4
        for i in range(4):
            for j in range(i):
                true = np.hypot(*(expected[i] - expected[j]))
                assert np.hypot(*(found[i] - found[j])) == pytest.approx(true, rel=0.01)
        assert np.abs(found - expected).max() < 0.25  # and they lie where they were drawn, to half an output pixel


@pytest.mark.parametrize("mpp", MPPS)
def test_no_seams_between_tiles(mpp: float) -> None:
    """Of a constant picture every pixel stays; of a ramp, neighbours across tiles differ as within them."""
    width, height = 3000, 900
    constant = np.full((height, width, 3), (201, 103, 57), np.uint8)
    ramp = paint_ramp(width, height)(0, 0, width, height)
    step = 0.5 / mpp
    with open_slide(constant, mpp=mpp) as slide:
        for column in range(4):
            tile = slide.read_region(round(column * 256 * step), 0, 256, 256, mpp=0.5)
            assert (tile == (201, 103, 57)).all()
    with open_slide(ramp, mpp=mpp) as slide:
        tiles = [slide.read_region(round(column * 256 * step), 40, 256, 64, mpp=0.5) for column in range(4)]
    row = np.concatenate(tiles, axis=1)[:, :, 0].astype(int)
    position = (np.arange(row.shape[1]) + 0.5) * step
    expected = np.interp(position, np.arange(width) + 0.5, ramp[0, :, 0])
    # origins are whole level-0 pixels, so a tile may sit half of one off; a ramp of 1/12 grey a pixel shows less than 1
    assert np.abs(row - expected).max() <= 1.0 + 0.5 * np.abs(np.diff(ramp[0, :, 0].astype(int))).max()


def test_reads_level0_pixels_as_they_are(tissue_image: np.ndarray) -> None:
    with open_slide(tissue_image) as slide:
        assert np.array_equal(slide.read_region(100, 50, 300, 200), tissue_image[50:250, 100:400])
        outside = slide.read_region(1500, 1100, 200, 200)
    assert np.array_equal(outside[:100, :100], tissue_image[1100:, 1500:])
    assert (outside[100:] == 255).all()
    assert (outside[:, 100:] == 255).all()


def test_overview_equals_the_mean_of_blocks(tissue_image: np.ndarray) -> None:
    with open_slide(tissue_image, mpp=0.5) as slide:
        overview = slide.read_overview(4.0)
    expected = np.floor(tissue_image.reshape(150, 8, 200, 8, 3).mean(axis=(1, 3)) + 0.5)
    assert np.array_equal(overview, expected)


def test_overview_is_the_same_block_by_block(tissue_image: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(tissue_image, mpp=0.5) as slide:
        whole = slide.read_overview(2.0)
        monkeypatch.setattr("wsi_engine.slide._OVERVIEW_BLOCK", 200)
        with ThreadPoolExecutor(3) as pool:
            assert np.array_equal(slide.read_overview(2.0, pool), whole)


def test_missing_scale_names_the_flag(tissue_image: np.ndarray) -> None:
    with open_slide(tissue_image) as slide:
        with pytest.raises(ScaleError, match="--slide-mpp"):
            slide.read_region(0, 0, 10, 10, mpp=0.5)
        assert slide.mpp_source is None


@pytest.mark.parametrize("claimed", [(0.01, 0.01), (120.0, 120.0), (0.25, 0.29)])
def test_unbelievable_scale_is_refused_unless_overridden(claimed: tuple[float, float], tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    per_cm = tuple(1e4 / value for value in claimed)
    import tifffile

    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), resolution=per_cm, resolutionunit="CENTIMETER")
    with open_slide(path) as slide, pytest.raises(ScaleError, match="--slide-mpp"):
        _ = slide.mpp
    with open_slide(path, mpp=claimed) as slide:
        assert slide.mpp == claimed
        assert slide.mpp_source == "override"


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_impossible_numbers(mpp: float, tissue_image: np.ndarray) -> None:
    with pytest.raises(SettingsError):
        open_slide(tissue_image, mpp=mpp)
    with open_slide(tissue_image, mpp=0.5) as slide:
        with pytest.raises(SettingsError):
            slide.read_region(0, 0, 10, 10, mpp=mpp)
        with pytest.raises(SettingsError):
            slide.read_region(0, 0, 0, 10)


def test_chooses_the_coarsest_level_that_is_fine_enough() -> None:
    levels = [Level(4000, 4000, 1.0), Level(1000, 1000, 4.0), Level(250, 250, 16.0)]
    assert choose_sampling(levels, (0.25, 0.25), 0.25).level == 0
    assert choose_sampling(levels, (0.25, 0.25), 0.5).level == 0
    assert choose_sampling(levels, (0.25, 0.25), 1.0).level == 1
    assert choose_sampling(levels, (0.2525, 0.2525), 1.0).level == 1  # 1 % too coarse: still that level
    assert choose_sampling(levels, (0.25, 0.25), 8.0).level == 2
    sampling = choose_sampling(levels, (0.25, 0.25), 2.0)
    assert (sampling.level, sampling.scale) == (1, (2.0, 2.0))


def test_boxes_hold_what_the_tiles_need() -> None:
    levels = [Level(4000, 4000, 1.0)]
    sampling = choose_sampling(levels, (0.325, 0.325), 0.5)
    origins = np.array([[0, 0], [394, 788]])
    boxes = sampling.boxes(origins, 256, 256)
    assert boxes.tolist() == [[0, 0, 394, 394], [394, 788, 394, 394]]  # 256 · 0.5 / 0.325 = 393.8


def test_level_downsample_knows_rounded_sizes() -> None:
    assert level_downsample((46_000, 32_914), (11_500, 8228)) == 4.0
    assert level_downsample((2220, 2967), (2220, 2967)) == 1.0
    assert level_downsample((1000, 1000), (640, 640)) == pytest.approx(1.5625)


def test_fingerprint_follows_content_not_name(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(image).save(tmp_path / name)
    image[0, 0] ^= 1
    Image.fromarray(image).save(tmp_path / "c.png")

    def fingerprint(name: str) -> str:
        with open_slide(tmp_path / name) as slide:
            return slide.fingerprint

    assert fingerprint("a.png") == fingerprint("b.png") != fingerprint("c.png")


def test_fingerprint_of_large_files_samples_all_over(tmp_path: Path) -> None:
    from wsi_engine.fingerprint import fingerprint_source

    content = bytearray(np.random.default_rng(1).integers(0, 256, 5_000_000, np.uint8).tobytes())
    path = tmp_path / "large"
    prints = set()
    for place in (None, 0, 2_500_000, 4_999_999):
        changed = bytearray(content)
        if place is not None:
            changed[place] ^= 255
        path.write_bytes(changed)
        prints.add(fingerprint_source(path))
    assert len(prints) in (3, 4)  # the middle byte may fall between two samples
    path.write_bytes(content[:-1])
    assert fingerprint_source(path) not in prints


def test_names() -> None:
    assert slide_name("/a/b.c/slide.one.svs") == "slide.one"
    assert slide_name("s3://bucket/folder/slide.svs?version=2") == "slide"


def test_closed_slides_do_not_read(tmp_path: Path, tissue_image: np.ndarray) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(tissue_image[:50, :50]).save(path)
    slide = open_slide(path)
    assert isinstance(slide, Slide)
    slide.close()
    with pytest.raises(SlideError):
        slide.read_region(0, 0, 10, 10)


def test_real_slide_reads_the_same_by_two_readers(shared_data: Path) -> None:
    path = shared_data / "slides" / "CMU-1-Small-Region.svs"
    with open_slide(path, reader="turbo") as turbo, open_slide(path, reader="openslide") as openslide:
        assert turbo.dimensions == openslide.dimensions == (2220, 2967)
        assert turbo.mpp == pytest.approx(openslide.mpp, rel=1e-6)
        for mpp in (None, 0.5, 0.7, 2.0):
            one, other = (s.read_region(300, 400, 400, 300, mpp=mpp).astype(int) for s in (turbo, openslide))
            assert np.abs(one - other).max() <= 2


def test_real_slide_without_scale(shared_data: Path) -> None:
    with open_slide(shared_data / "slides" / "TCGA-CR-7395-jpeg2000-no-mpp.svs") as slide:
        with pytest.raises(ScaleError, match="--slide-mpp"):
            slide.read_region(0, 0, 10, 10, mpp=0.5)
        assert slide.read_region(2000, 1500, 100, 80).shape == (80, 100, 3)


def test_a_reader_shrinks_by_itself_only_where_that_is_as_fine() -> None:
    levels = (Level(8000, 8000, 1.0), Level(2000, 2000, 4.0))
    for mpp, level, reduce in (
        (0.25, 0, 1),
        (0.49, 0, 1),
        (0.5, 0, 2),
        (0.7, 0, 2),
        (1.0, 1, 1),
        (3.0, 1, 2),
        (9.0, 1, 8),
    ):
        sampling = choose_sampling(levels, (0.25, 0.25), mpp, (1, 2, 4, 8))
        assert (sampling.level, sampling.reduce) == (level, reduce)
        assert sampling.size_level0 == pytest.approx((mpp / 0.25, mpp / 0.25))
    assert choose_sampling(levels, (0.25, 0.25), 0.5).reduce == 1


@pytest.mark.parametrize("mpp", [0.5, 0.62, 1.1])
def test_shrinking_while_decoding_keeps_the_field_of_view(tmp_path: Path, mpp: float) -> None:
    positions = [(60.0, 70.0), (300.5, 81.0), (190.0, 255.0)]
    write_marks(tmp_path / "marks.svs", 0.25, positions, layout=TiffLayout(quality=95, levels=1))
    with open_slide(tmp_path / "marks.svs", reader="turbo") as slide:
        assert slide.sampling(mpp).reduce > 1
        size = [int(n * 0.25 / mpp) for n in slide.dimensions]
        fast, exact = (slide.read_region(0, 0, *size, mpp=mpp, exact=exact) for exact in (False, True))
    for picture in (fast, exact):
        dark = 235.0 - picture[..., 0]
        dark[dark < 40] = 0
        regions, count = ndimage.label(dark > 0)
        found = np.array(ndimage.center_of_mass(dark, regions, range(1, count + 1)))[:, ::-1] + 0.5
        found = found[np.lexsort((found[:, 1],))] * mpp
        assert found == pytest.approx(np.array(sorted(positions, key=lambda p: p[1])), abs=0.1 * mpp)
