"""Nuclei of slides: the same whatever the tiles, across seams, borders, cuts and threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from wsi_engine import errors
from wsi_engine.kernels import set_thread_count
from wsi_engine.kernels.pieces import lay_shelves
from wsi_engine.metrics import aji
from wsi_engine.nuclei.frame import FrameReader, TissueRaster, frame_slide
from wsi_engine.nuclei.instances import InstanceSet
from wsi_engine.nuclei.method import create_method
from wsi_engine.nuclei.pieces import WindowPieces, join_pieces
from wsi_engine.nuclei.seams import SeamJoiner
from wsi_engine.nuclei.segmentation import NucleiSettings, PreparedSlide, segment_nuclei
from wsi_engine.nuclei.stain import segment_by_stain
from wsi_engine.nuclei.stain_method import StainMethod
from wsi_engine.nuclei.windows import WindowMaps
from wsi_engine.slide import open_slide
from wsi_engine.synthetic import SlideSpec, SyntheticSlide
from wsi_engine.tissue import TissueMask, TissueSettings

Pixels = NDArray[np.uint8]


class Plain:
    """A method whose nuclei are the 4-connected pieces of what is darker than grey: its truth is ``scipy``'s labels."""

    name = "plain"
    mpp = 0.5
    detail = 1
    gap_px = 1

    def __init__(self, margin_px: int = 3, clean_px: int = 0, window_px: int | None = None) -> None:
        self.margin_px, self.clean_px, self.window_px = margin_px, clean_px, window_px
        self.shapes: set[tuple[int, ...]] = set()

    def fit(self, samples: Sequence[Pixels]) -> Plain:
        return self

    def foreground(self, windows: Pixels) -> NDArray[np.float32]:
        self.shapes.add(windows.shape[1:3])
        m = self.margin_px
        cut = windows[:, m : windows.shape[1] - m, m : windows.shape[2] - m, 0]
        return np.stack([128 - cut.astype(np.float32)], axis=1)

    def mask(self, maps: NDArray[np.float32]) -> NDArray[np.bool_]:
        return maps[0] > 0

    def split(self, maps: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.int32]:
        return ndimage.label(mask)[0].astype(np.int32)

    def to_json(self) -> dict[str, Any]:
        return {}


def columns(nuclei: InstanceSet) -> dict[str, NDArray[Any]]:
    return nuclei.table() | {"offsets": nuclei.offsets, "points": nuclei.points}


def assert_same(ours: InstanceSet, theirs: InstanceSet) -> None:
    for name, values in columns(theirs).items():
        assert np.array_equal(columns(ours)[name], values), name


@pytest.fixture(scope="module")
def picture() -> Pixels:
    """Dense tissue, 1500 × 1300 at 0.25 µm."""
    return SyntheticSlide(SlideSpec(width=1500, height=1300, coverage=1, seed=4)).paint(0, 0, 1500, 1300)


@pytest.fixture(scope="module")
def whole(picture: Pixels) -> InstanceSet:
    return segment_nuclei(picture, "stain", 0.25, tile_px=2048)


@pytest.mark.parametrize("tile_px", [512, 1024, 200])
def test_tiles_do_not_change_nuclei(picture: Pixels, whole: InstanceSet, tile_px: int) -> None:
    assert len(whole) > 400
    assert_same(segment_nuclei(picture, "stain", 0.25, tile_px=tile_px), whole)


@pytest.mark.parametrize("mpp", [0.2127, 0.33])
def test_tiles_do_not_change_nuclei_at_scales_that_are_no_multiple(picture: Pixels, mpp: float) -> None:
    small = picture[:700, :900]
    first, second = (segment_nuclei(small, "stain", mpp, tile_px=tile_px) for tile_px in (2048, 192))
    assert len(first) > 50
    assert_same(first, second)


def test_threads_do_not_change_nuclei(picture: Pixels, whole: InstanceSet) -> None:
    try:
        for count in (1, 3):
            set_thread_count(count)
            assert_same(segment_nuclei(picture, "stain", 0.25, tile_px=512, workers=count), whole)
    finally:
        set_thread_count(None)


def test_nuclei_are_about_those_of_the_whole_picture_at_once(picture: Pixels, whole: InstanceSet) -> None:
    once = segment_by_stain(picture)
    labels = whole.labels()
    assert ((labels > 0) == (once > 0)).mean() > 0.995
    assert abs(labels.max() - once.max()) < 0.1 * once.max()


def test_most_true_nuclei_are_found() -> None:
    slide = SyntheticSlide(SlideSpec(width=800, height=800, coverage=1, seed=6))
    found = segment_nuclei(slide.paint(0, 0, 800, 800), "stain", 0.25)
    assert aji(slide.truth.labels(0, 0, 800, 800), found.labels()) > 0.5


def blobs(shape: tuple[int, int], seed: int, share: float = 0.55) -> NDArray[np.bool_]:
    """Blobs of all sizes, many across any seam, some at the border."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 5)
    return np.asarray(noise > np.quantile(noise, share))


def as_picture(mask: NDArray[np.bool_]) -> Pixels:
    return np.repeat(np.where(mask, 100, 200).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("tile_px", [64, 128, 300])
def test_nuclei_are_the_components_of_the_picture(tile_px: int) -> None:
    mask = blobs((410, 530), 1)
    found = segment_nuclei(as_picture(mask), Plain(), 0.5, tile_px=tile_px)
    truth, count = ndimage.label(mask)
    assert len(found) == count
    sizes = np.bincount(truth.ravel())[1:]
    assert np.array_equal(found.area, (sizes * 0.25).astype(np.float32))
    assert np.allclose(
        found.centroid[:, ::-1], np.array(ndimage.center_of_mass(mask, truth, range(1, count + 1))) + 0.5
    )
    filled = [ndimage.binary_fill_holes(truth == k) for k in range(1, count + 1)]
    assert all((found.labels() > 0)[one].all() for one in filled)
    assert np.array_equal(found.labels() > 0, np.any(filled, axis=0))


def test_components_join_across_corners() -> None:
    mask = np.zeros((128, 128), bool)
    mask[60:64, 60:64] = mask[64:68, 64:68] = True  # they touch at the corner of four tiles alone
    mask[60:64, 100:110], mask[64:70, 110:112] = True, True
    pieces = [(0, 0), (0, 64), (64, 0), (64, 64)]
    joiner = SeamJoiner({(y // 64, x // 64) for y, x in pieces}, 64)
    done = []
    for y, x in pieces:
        part = np.ascontiguousarray(mask[y : y + 64, x : x + 64])
        window = WindowMaps((y // 64, x // 64), x, y, part, part[None].astype(np.float32), as_picture(part))
        done += joiner.add(window)
    assert sorted(tuple(one.boxes[0].tolist()) for one in done) == [(60, 60, 68, 68), (60, 100, 70, 112)]
    whole = WindowPieces(mask, mask[None].astype(np.float32), as_picture(mask), 0, 0).all()
    assert len(whole) == 2
    cut = {(row, column) for part in done for row, first, stop in part.runs.tolist() for column in range(first, stop)}
    assert cut == set(map(tuple, np.argwhere(mask).tolist()))


def test_parts_come_together_in_raster_order_with_their_values() -> None:
    rng = np.random.default_rng(4)
    mask = blobs((60, 80), 4)
    pixels, maps = rng.integers(0, 256, (30, 40, 3)).astype(np.uint8), rng.random((2, 60, 80)).astype(np.float32)
    parts = [
        WindowPieces(
            np.ascontiguousarray(mask[:, x : x + 40]), maps[:, :, x : x + 40], pixels[:, x // 2 : x // 2 + 20], x, 0, 2
        ).all()
        for x in (40, 0)
    ]
    joined = join_pieces(parts)
    rows, columns = np.nonzero(mask)  # in raster order, as the pixels of all runs must be
    places = [(row, column) for row, first, stop in joined.runs.tolist() for column in range(first, stop)]
    assert places == list(zip(rows.tolist(), columns.tolist(), strict=True))
    assert np.array_equal(joined.pixels, pixels[rows // 2, columns // 2])
    assert np.array_equal(joined.maps, maps[:, rows, columns])
    each = WindowPieces(mask, maps, pixels, 0, 0, 2).take_each(np.array([0, 2]))
    together = WindowPieces(mask, maps, pixels, 0, 0, 2).take(np.array([0, 2]))
    for name in ("runs", "pixels"):
        assert np.array_equal(np.concatenate([getattr(one, name) for one in each]), getattr(together, name))
    assert np.array_equal(np.concatenate([one.maps for one in each], axis=1), together.maps)
    assert np.array_equal(np.concatenate([one.boxes for one in each]), together.boxes)


def test_a_component_across_all_tiles_is_whole() -> None:
    mask = np.zeros((400, 400), bool)
    mask[::8] = mask[:, 0] = True  # a comb that every tile has a part of
    found = segment_nuclei(as_picture(mask), Plain(), 0.5, tile_px=64)
    assert len(found) == 1
    assert found.area[0] == mask.sum() * 0.25


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_large_fields_are_cut_the_same_whatever_the_tiles(share: float, caplog: pytest.LogCaptureFixture) -> None:
    picture = as_picture(blobs((1100, 1300), 2, share))
    found = []
    for tile_px in (128, 512, 2048):
        with open_slide(picture, 0.5) as slide:
            found.append(PreparedSlide(slide, Plain(), NucleiSettings(tile_px, None, largest_px=300_000)).segment())
    assert found[0].record.cut_components > 0
    assert "cut along a lattice" in caplog.text
    assert len({one.record.cut_components for one in found}) == 1
    for one in found[1:]:
        assert_same(one, found[0])
    assert found[0].area.sum() == (picture[..., 0] < 128).sum() * 0.25  # nothing is lost or counted twice


def test_tissue_decides_pixel_by_pixel(picture: Pixels) -> None:
    rows, columns = np.mgrid[:41, :47]
    tissue = TissueMask(np.asarray(np.hypot(rows - 20, columns - 22) < 14), 8.0)
    found = [segment_nuclei(picture, "stain", 0.25, tile_px=tile_px, tissue=tissue) for tile_px in (256, 1024)]
    assert_same(*found)
    assert len(found[0]) > 50
    with open_slide(picture, 0.25) as slide:
        inside = TissueRaster(frame_slide(slide, 0.25), slide.mpp, tissue).of(0, 0, 1500, 1300)
    assert inside is not None
    assert not (found[0].labels()[~inside] > 0).any()
    assert found[0].record.tissue_mm2 == pytest.approx(tissue.area_mm2)
    assert inside.sum() * 0.25**2 / 1e6 > tissue.area_mm2  # a pixel of the raster beyond


def test_windows_of_a_method_keep_their_shape() -> None:
    picture = as_picture(blobs((300, 410), 3))
    method = Plain(window_px=128, clean_px=5)
    found = [segment_nuclei(picture, method, 0.5, tile_px=tile_px) for tile_px in (128, 200, 256)]
    assert method.shapes == {(128 + 2 * 8, 128 + 2 * 8)}
    assert_same(*found[:2])
    assert_same(*found[1:])
    assert_same(found[0], segment_nuclei(picture, Plain(), 0.5))


class Fine(Plain):
    """The same with maps of twice the resolution."""

    detail = 2

    def foreground(self, windows: Pixels) -> NDArray[np.float32]:
        return super().foreground(windows).repeat(2, axis=2).repeat(2, axis=3)


def test_maps_may_be_finer_than_the_pixels() -> None:
    picture = as_picture(blobs((300, 410), 3))
    coarse = segment_nuclei(picture, Plain(), 0.5)
    tissue = TissueMask(np.ones((10, 13), bool), 8.0)  # part of the picture
    for tile_px, where in ((64, None), (300, None), (128, tissue)):
        fine = segment_nuclei(picture, Fine(clean_px=4), 0.5, tile_px=tile_px, tissue=where)
        plain = coarse if where is None else segment_nuclei(picture, Plain(), 0.5, tissue=where)
        assert fine.record.method_mpp == 0.25
        assert np.array_equal(fine.labels(), plain.labels())
        assert np.array_equal(fine.area, plain.area)
        assert np.allclose(fine.centroid, plain.centroid)
        assert np.allclose(fine.measurements["haematoxylin_mean"], plain.measurements["haematoxylin_mean"])


def test_few_nuclei_on_much_tissue_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    mask = np.zeros((1200, 1200), bool)
    mask[100:120, 100:120] = True
    segment_nuclei(as_picture(mask), Plain(), 0.5, tissue=None)
    assert "only 3 nuclei per mm² of tissue: see whether 0.5 µm per pixel is right" in caplog.text
    caplog.clear()
    segment_nuclei(as_picture(mask[:200, :200]), Plain(), 0.5)
    assert not caplog.text


def test_pixels_do_not_depend_on_the_window(picture: Pixels) -> None:
    with open_slide(picture, 0.2127) as slide:
        reader = FrameReader(slide, frame_slide(slide, 0.5))
        frame = reader.frame
        whole = reader.read(0, 0, frame.width, frame.height)
        assert whole.shape == (int(1300 * 0.2127 / 0.5), int(1500 * 0.2127 / 0.5), 3)
        for x, y, width, height in ((0, 0, 40, 50), (101, 77, 300, 201), (frame.width - 9, frame.height - 7, 9, 7)):
            assert np.array_equal(reader.read(x, y, width, height), whole[y : y + height, x : x + width])
        near = slide.read_region(0, 0, frame.width, frame.height, 0.5)
    assert np.abs(near.astype(int) - whole).max() <= 1


def test_boxes_on_a_sheet_keep_their_distance() -> None:
    sizes = np.random.default_rng(5).integers(1, 60, (300, 2))
    places = np.empty((300, 2), np.int64)
    height = lay_shelves(sizes, np.argsort(-sizes[:, 0], kind="stable"), 400, 7, places)
    taken = np.zeros((height, 400), int)
    for (y, x), (h, w) in zip(places.tolist(), sizes.tolist(), strict=True):
        assert min(y, x) >= 7
        assert y + h + 7 <= height
        assert x + w + 7 <= 400
        taken[y - 3 : y + h + 3, x - 3 : x + w + 3] += 1
    assert taken.max() == 1


def test_no_tissue_is_no_nucleus(caplog: pytest.LogCaptureFixture) -> None:
    glass = np.full((900, 1200, 3), 243, np.uint8)
    found = segment_nuclei(glass, "stain", 0.25, tissue="otsu")
    assert len(found) == 0
    assert "no tissue" in caplog.text
    assert found.summary()["nuclei_per_mm2"] is None
    assert len(segment_nuclei(glass, "stain", 0.25)) == 0  # looked at whole, and flat


def test_strands_that_are_too_thin_for_a_tile_are_looked_at() -> None:
    strand = np.full((700, 3000, 3), 243, np.uint8)
    strand[304:352] = (225, 150, 185)  # 24 µm of eosin
    y, x = np.mgrid[:700, :3000]
    strand[np.hypot(y - 328, (x - 30) % 60 - 30) < 9] = (90, 60, 140)
    found = segment_nuclei(strand, "stain", 0.5)
    assert len(found) >= 48
    assert len(segment_nuclei(strand, "stain", 0.5, tissue=TissueSettings())) == 0


def test_bad_pictures_are_refused_in_one_sentence(picture: Pixels) -> None:
    with pytest.raises(errors.ScaleError, match="--slide-mpp"):
        segment_nuclei(picture, "stain")
    with pytest.raises(errors.ScaleError, match="nuclei are told up to"):
        segment_nuclei(picture, "stain", 2.0)
    with pytest.raises(errors.ScaleError, match="finer than any slide scanner"):
        segment_nuclei(picture, "stain", 0.025)
    with pytest.raises(errors.SettingsError, match="nuclei are told from 32 on"):
        segment_nuclei(picture[:20], "stain", 0.25)
    with pytest.raises(errors.SettingsError, match="there is no method 'none'"):
        segment_nuclei(picture, "none", 0.25)
    with pytest.raises(errors.SettingsError, match="no weights"):
        create_method("stain", "weights.safetensors")
    with pytest.raises(errors.SettingsError, match="within 64–8192"):
        segment_nuclei(picture, "stain", 0.25, tile_px=10)
    with pytest.raises(errors.SettingsError, match="tissue must be"):
        segment_nuclei(picture, "stain", 0.25, tissue="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("tissue", [None, "otsu"])
def test_fluorescence_is_refused(tissue: Any) -> None:
    rng = np.random.default_rng(0)
    dark = rng.integers(0, 20, (700, 700, 3)).astype(np.uint8)
    spots = blobs((700, 700), 7, 0.9)
    dark[spots, 2] = 200
    with pytest.raises(errors.SlideError, match="--allow-dark"):
        segment_nuclei(dark, "stain", 0.25, tissue=tissue)
    segment_nuclei(dark, "stain", 0.25, tissue=tissue, allow_dark=True)


def test_pictures_smaller_than_the_margin_work(picture: Pixels) -> None:
    small = picture[:60, :70]
    assert StainMethod().margin_px > 70
    assert_same(*(segment_nuclei(small, "stain", 0.25, tile_px=tile_px) for tile_px in (64, 512)))


def test_errors_of_the_method_stop_all_threads(picture: Pixels) -> None:
    class Broken(Plain):
        def split(self, maps: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.int32]:
            raise errors.ModelError("broken")

    class Unread(Plain):
        def foreground(self, windows: Pixels) -> NDArray[np.float32]:
            raise errors.ModelError("unread")

    for method, words in ((Broken(), "broken"), (Unread(), "unread")):
        with pytest.raises(errors.ModelError, match=words):
            segment_nuclei(picture, method, 0.25, tile_px=128)
    assert not [one for one in threading.enumerate() if one.name.startswith("nuclei")]


def test_a_real_slide_is_the_same_whatever_the_tiles(shared_data: Path) -> None:
    tissue = np.zeros((186, 139), bool)
    tissue[60:110, 50:100] = True
    with open_slide(shared_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        found = [segment_nuclei(slide, "stain", tile_px=t, tissue=TissueMask(tissue, 8.0)) for t in (512, 1024)]
    assert len(found[0]) > 500
    assert_same(*found)


def test_a_real_fluorescent_slide_is_refused(shared_data: Path) -> None:
    with pytest.raises(errors.SlideError, match="--allow-dark"):
        segment_nuclei(shared_data / "slides" / "fluorescence-DAPI.ndpi", "stain")
