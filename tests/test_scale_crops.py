"""Crops that scale attention learns from: where they lie, their batches, their colours, and what is refused."""

from __future__ import annotations

import dataclasses
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.color import rgb2lab
from support_scale import TINY, paint_tissue, write_pictures

from wsi_engine.errors import InputError, ScaleError
from wsi_engine.kernels import estimate_stains
from wsi_engine.kernels.stains import HE_RESIDUAL, complete_stains
from wsi_engine.models.scale_attention import SCALES_MPP
from wsi_engine.nuclei import samples
from wsi_engine.nuclei.samples import (
    CropSampler,
    CropSource,
    is_annotation,
    list_pictures,
    open_picture,
    open_sampler,
)
from wsi_engine.nuclei.scale_batches import CropBatch, CropFeed
from wsi_engine.nuclei.scale_stains import jitter_stains, match_look, mean_look, measure_look, remix_stains
from wsi_engine.nuclei.scale_targets import find_least_density, paint_stain_target
from wsi_engine.slide import Slide, open_slide
from wsi_engine.synthetic import MACENKO, SlideSpec, SyntheticSlide


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("tissue"))


def test_batches_hold_as_many_crops_at_each_scale() -> None:
    sampler = open_sampler([(paint_tissue(), 0.25)], SCALES_MPP, 32)
    with CropFeed(sampler, dataclasses.replace(TINY, batch_size=7)) as feed:
        batches = list(feed.batches(0, 3))
    counts = np.array([np.bincount(batch.scales, minlength=3) for batch in batches])
    assert counts.max() - counts.min() == 1
    assert counts.sum(axis=0).tolist() == [7, 7, 7]
    assert all(batch.pixels.shape == (7, 32, 32, 3) and batch.pixels.dtype == np.uint8 for batch in batches)
    assert all(1 <= one <= 7 for batch in batches for one in batch.symmetries)  # never the identity
    assert not np.array_equal(batches[0].pixels, batches[1].pixels)


@pytest.mark.parametrize("normalisation", ["none", "reinhard", "macenko"])
def test_a_batch_is_a_function_of_seed_and_number(normalisation: Any) -> None:
    def make(workers: int, start: int, seed: int = 0) -> CropBatch:
        sampler = open_sampler([(paint_tissue(), 0.25), (paint_tissue(seed=5), 0.25)], SCALES_MPP, 32)
        settings = dataclasses.replace(TINY, workers=workers, normalisation=normalisation, seed=seed)
        with CropFeed(sampler, settings) as feed:
            return list(feed.batches(start, 5))[-1]

    one, other = make(1, 0), make(3, 4)
    assert np.array_equal(one.pixels, other.pixels)
    assert np.array_equal(one.scales, other.scales)
    assert one.symmetries == other.symmetries
    assert not np.array_equal(make(1, 4, seed=1).pixels, one.pixels)


def test_crops_are_what_the_slide_holds_at_that_scale() -> None:
    """A picture of exactly one crop at the coarsest scale leaves no choice of place."""
    pixels = paint_tissue(128)
    with open_slide(pixels, mpp=0.25) as slide:
        crops = CropSource(slide, SCALES_MPP, 32, 0.5)
        coarse = crops.read(1.0, np.random.default_rng(0))
        assert np.abs(coarse - pixels.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))).max() <= 0.5
        fine = crops.read(0.25, np.random.default_rng(0))
        windows = np.lib.stride_tricks.sliding_window_view(pixels, (32, 32, 3))[:, :, 0]
        assert (windows == fine).all(axis=(2, 3, 4)).any()


def test_crops_lie_on_tissue(tissue_image: NDArray[np.uint8]) -> None:
    """The picture is a disk of radius 450 px at 0.5 mpp; 90 % of every crop must lie within."""
    y, x = np.mgrid[:1200, :1600]
    position = np.stack([x // 8, y // 8, np.full_like(x, 200)], axis=-1).astype(np.uint8)  # tells where a crop is from
    inside = (x - 700) ** 2 + (y - 600) ** 2 < 450**2
    with open_slide(tissue_image, mpp=0.5) as slide, open_slide(position, mpp=0.5) as places:
        crops = CropSource(slide, (0.5, 1.0), 64, 0.9)
        crops.slide = places
        for mpp, side in ((0.5, 64), (1.0, 128)):
            corners = []
            for seed in range(60):
                crop = crops.read(mpp, np.random.default_rng(seed))
                left, top = (8 * int(v) for v in crop[0, 0, :2])
                corners.append((left, top))
                assert inside[top : top + side, left : left + side].mean() > 0.8  # the place is told to 8 px
            assert np.ptp(np.array(corners), axis=0).min() > 400  # all over the disk


def test_annotations_are_left_out(tmp_path: Path, folder: Path) -> None:
    assert [Path(str(one)).name for one, _ in list_pictures([folder])] == ["a.png", "b.png"]
    assert is_annotation(str(folder / "a_label.png"))
    (tmp_path / "lone_label.png").write_bytes(b"")
    assert not is_annotation(str(tmp_path / "lone_label.png"))  # nothing that it could be the annotation of
    with pytest.raises(InputError, match="no image or slide"):
        list_pictures([])


def test_pictures_that_cannot_serve_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    glass = (244 + rng.integers(-2, 3, (200, 200, 1)) + np.zeros((1, 1, 3), int)).astype(np.uint8)
    tissue = paint_tissue()
    for pixels, mpp, words in (
        (tissue[:100], 0.25, r"has 320 × 100 px .* needs 128 × 128: give larger images"),
        (glass, 0.25, "holds no tissue"),
        (tissue, 0.5, "0.5 µm per pixel and crops at 0.25 are needed"),
    ):
        with pytest.raises(InputError, match=words):
            open_sampler([(pixels, mpp)], SCALES_MPP, 32)
    half = np.concatenate([tissue[:, :100], np.full((320, 220, 3), 245, np.uint8)], axis=1)
    with pytest.raises(InputError, match="no place where 90%"):
        open_sampler([(half, 0.25)], SCALES_MPP, 32)
    logging.getLogger("wsi_engine").propagate = True  # a command of another test may have turned it off
    with caplog.at_level(logging.WARNING, "wsi_engine"):
        sampler = open_sampler([(glass, 0.25), (tissue, 0.25)], SCALES_MPP, 32)
    assert len(sampler.sources) == 1
    assert "Left out: <array> holds no tissue" in caplog.text


def test_the_scale_must_be_known(folder: Path, shared_data: Path) -> None:
    assert open_picture(folder / "a.png", None, 0.25).mpp == (0.25, 0.25)
    assert open_picture(folder / "a.png", 0.2, 0.25).mpp == (0.2, 0.2)
    with pytest.raises(ScaleError, match="--image-mpp"):
        open_picture(folder / "a.png", None, None)
    with pytest.raises(ScaleError, match="--slide-mpp"):  # the default is for plain pictures alone
        open_picture(shared_data / "slides" / "TCGA-CR-7395-jpeg2000-no-mpp.svs", None, 0.25)


def test_slides_are_closed_where_one_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Slide] = []
    closed: list[Slide] = []
    close = Slide.close

    def open_and_note(source: Any, mpp: float | None = None) -> Slide:
        opened.append(open_slide(source, mpp))
        return opened[-1]

    def close_and_note(slide: Slide) -> None:
        closed.append(slide)
        close(slide)

    monkeypatch.setattr(samples, "open_slide", open_and_note)
    monkeypatch.setattr(Slide, "close", close_and_note)
    tissue = paint_tissue()
    with pytest.raises(ScaleError):  # the second has no scale
        open_sampler([(tissue, 0.25), (tissue, None)], SCALES_MPP, 32)
    assert len(opened) == 2
    assert {id(slide) for slide in opened} == {id(slide) for slide in closed}
    opened.clear(), closed.clear()
    sampler = open_sampler([(tissue, 0.25), (tissue[:100], 0.25)], SCALES_MPP, 32)
    assert [id(slide) for slide in closed] == [id(opened[1])]
    sampler.close()
    assert len(closed) == 2


def test_threads_end_where_stains_cannot_be_told() -> None:
    grey = np.full((320, 320, 3), 120, np.uint8)
    source = CropSource(open_slide(grey, 0.25), SCALES_MPP, 32, 0.0)
    source._places = {mpp: np.zeros((1, 2), np.int64) for mpp in SCALES_MPP}
    before = threading.active_count()
    with pytest.raises(InputError, match="leave the picture out, or train with --normalisation reinhard"):
        CropFeed(CropSampler([source], SCALES_MPP), dataclasses.replace(TINY, normalisation="macenko"))
    assert threading.active_count() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("crops")]


def test_jitter_by_one_changes_nothing_and_more_stain_is_darker() -> None:
    pixels = paint_tissue(64)
    assert np.abs(jitter_stains(pixels, np.ones(3)).astype(int) - pixels).max() <= 1
    more = jitter_stains(pixels, np.array([1.2, 1, 1]))
    plain = 255 * 10 ** -(
        (-np.log10(np.maximum(pixels, 1) / 255) @ np.linalg.inv(HE_RESIDUAL) * [1.2, 1, 1]) @ HE_RESIDUAL
    )
    assert np.abs(more - plain.clip(0, 255)).max() < 0.6


def test_reinhard_gives_the_reference_s_mean_and_spread() -> None:
    one, other = paint_tissue(), paint_tissue(seed=5, stains=MACENKO)
    look, wanted = measure_look(one, "reinhard"), measure_look(other, "reinhard")
    lab = rgb2lab(other).reshape(-1, 3)
    assert np.allclose(wanted.rows, [lab.mean(axis=0), lab.std(axis=0)], atol=1e-2)
    got = rgb2lab(match_look(one, look, wanted)).reshape(-1, 3)
    assert np.abs(got.mean(axis=0) - wanted.rows[0]).max() < 1.5
    assert np.abs(rgb2lab(one).reshape(-1, 3).mean(axis=0) - wanted.rows[0]).max() > 3
    assert np.abs(match_look(one, look, look).astype(int) - one).max() <= 2


def test_macenko_turns_one_stain_into_the_other() -> None:
    one, other = paint_tissue(), paint_tissue(seed=5, stains=MACENKO)
    look, wanted = measure_look(one, "macenko"), measure_look(other, "macenko")
    assert np.allclose(estimate_stains(other)[:2], wanted.rows[:2])
    again = measure_look(match_look(one, look, wanted), "macenko")
    for row, goal, before in zip(again.rows[:2], wanted.rows[:2], look.rows[:2], strict=True):
        assert np.dot(row, goal) > 0.999 > np.dot(before, goal)
    assert np.allclose(again.rows[2], wanted.rows[2], rtol=0.05)
    with pytest.raises(InputError, match="stains of white"):
        measure_look(np.full((20, 20, 3), 255, np.uint8), "macenko", "white.png")


def test_the_mean_look_is_that_of_its_parts() -> None:
    looks = [measure_look(paint_tissue(seed=seed), kind) for kind in ("macenko",) for seed in (4, 5)]
    mean = mean_look(looks)
    for k in range(3):
        assert np.allclose(mean.rows[k], np.mean([look.rows[k] for look in looks], axis=0))
    amounts = np.array([[[0.5, 0.2, 0.0]]], np.float32)
    vectors = complete_stains((0.65, 0.7, 0.29), (0.07, 0.99, 0.11))
    assert np.abs(remix_stains(amounts, vectors) - 255 * 10 ** -(amounts @ vectors)).max() <= 0.5


@pytest.mark.parametrize(("mpp", "block"), [(0.25, 1), (0.5, 2), (1.0, 4)])
def test_the_stain_s_answer_is_the_painted_nuclei_at_every_scale(mpp: float, block: int) -> None:
    slide = SyntheticSlide(SlideSpec(width=1600, height=1200, mpp=0.25, coverage=1, seed=4))
    side = 320 // block
    pixels = slide.paint(600, 400, 320, 320).reshape(side, block, side, block, 3).mean(axis=(1, 3))
    truth = (slide.truth.labels(600, 400, 320, 320) > 0).reshape(side, block, side, block).mean(axis=(1, 3)) > 0.5
    crop = pixels.round().astype(np.uint8)
    target = paint_stain_target(crop, mpp, find_least_density([crop], mpp))
    assert target.shape == truth.shape
    assert target.dtype == np.float32
    assert 0 <= target.min() < 0.01 < 0.99 < target.max() <= 1
    found = target > 0.5
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.93


def test_a_crop_within_a_nucleus_or_between_nuclei_is_all_one_or_none() -> None:
    tissue = paint_tissue()
    least = find_least_density([tissue], 0.25)
    assert paint_stain_target(np.full((32, 32, 3), (60, 40, 120), np.uint8), 0.25, least).min() > 0.999
    plain = np.full((32, 32, 3), 240, np.uint8)
    assert not paint_stain_target(plain, 0.25, least).any()
    assert find_least_density([plain, plain], 0.25) == float("inf")
    assert not paint_stain_target(tissue, 0.25, float("inf")).any()


def test_batches_of_stain_epochs_have_targets_that_lie_as_their_crops_do() -> None:
    def make(start: int = 0, **options: Any) -> list[CropBatch]:
        sampler = open_sampler([(paint_tissue(), 0.25), (paint_tissue(seed=5), 0.25)], SCALES_MPP, 32)
        with CropFeed(sampler, dataclasses.replace(TINY, stain_jitter=0.0, batch_size=8, **options)) as feed:
            batches = list(feed.batches(start, 4))
            leasts.extend(feed._least_densities)
        return batches

    leasts: list[float] = []
    batches = make(stain_epochs=1)
    assert [batch.target is None for batch in batches] == [False, False, True, True]
    for batch in batches[:2]:
        assert batch.target is not None
        for pixels, target, scale in zip(batch.pixels, batch.target, batch.scales, strict=True):
            answers = [paint_stain_target(pixels, SCALES_MPP[scale], least) for least in leasts]
            assert min(float(np.abs(target - answer).max()) for answer in answers) < 1e-5
    again = make(1, stain_epochs=1, workers=1)[0]
    assert again.target is not None
    assert np.array_equal(again.target, np.asarray(batches[1].target))
    for batch, plain in zip(batches, make(), strict=True):  # the crops are those of a training without
        assert np.array_equal(batch.pixels, plain.pixels)
        assert batch.symmetries == plain.symmetries
        assert plain.target is None
