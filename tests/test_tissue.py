"""Tissue detection: where it is, what each filter left, and slides that have none."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from wsi_engine import TissueMask, TissueSettings, detect_tissue, open_slide
from wsi_engine.errors import ScaleError, SettingsError
from wsi_engine.tissue import find_tissue


def draw(*shapes: tuple[float, float, float], side: int = 400, ground: int = 245) -> np.ndarray:
    """Pink discs (x, y, radius) on white; a negative radius cuts a hole."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side]
    tissue = np.zeros((side, side), bool)
    for cx, cy, radius in shapes:
        disc = (x - cx) ** 2 + (y - cy) ** 2 < radius**2
        tissue = tissue & ~disc if radius < 0 else tissue | disc
    noise = rng.integers(-2, 3, (side, side, 3))
    return np.clip(np.where(tissue[..., None], (200, 120, 170), ground) + noise, 0, 255).astype(np.uint8)


def test_finds_a_disc_and_keeps_its_large_hole() -> None:
    image = draw((200, 200, 120), (200, 200, -40))
    found = find_tissue(image, mpp=8.0)
    y, x = np.mgrid[:400, :400]
    distance = np.hypot(x - 200, y - 200)
    truth = (distance < 120) & (distance > 40)
    overlap = (found.mask & truth).sum() / (found.mask | truth).sum()
    assert overlap > 0.97
    assert found.area_mm2 == pytest.approx(truth.sum() * 64e-6, rel=0.03)


def test_area_filters_are_physical() -> None:
    """A disc of radius 10 raster pixels measures 0.02 mm² at 8 µm and 0.005 mm² at 4 µm."""
    image = draw((100, 100, 10), (250, 250, 60))
    keeps = TissueSettings(min_tissue_mm2=0.01)
    assert ndimage.label(find_tissue(image, 8.0, keeps).mask)[1] == 2
    assert ndimage.label(find_tissue(image, 4.0, keeps).mask)[1] == 1


def test_holes_are_filled_by_area_and_number() -> None:
    image = draw((200, 200, 150), (150, 150, -30), (250, 250, -20), (250, 150, -8))

    def holes(**options: float | int) -> int:
        mask = find_tissue(image, 8.0, TissueSettings(**options)).mask  # type: ignore[arg-type]
        return int(ndimage.label(~mask)[1]) - 1  # the glass around is one

    assert holes(min_hole_mm2=0.0) == 3
    assert holes(min_hole_mm2=0.03) == 2
    assert holes(min_hole_mm2=0.0, max_holes=1) == 1
    assert holes(min_hole_mm2=0.0, max_holes=0) == 0


def test_counts_chain_through_the_filters() -> None:
    found = find_tissue(draw((100, 100, 4), (250, 250, 60)), 8.0)
    assert [count.filter for count in found.counts] == ["saturation", "closing", "small tissue", "small holes"]
    for before, after in zip(found.counts, found.counts[1:], strict=False):
        assert (before.pixels_after, before.regions_after) == (after.pixels_before, after.regions_before)
    small = found.counts[2]
    assert (small.regions_before, small.regions_after) == (2, 1)
    assert found.counts[-1].pixels_after == found.mask.sum()
    assert found.emptied_by() is None


def test_says_which_filter_emptied_a_slide() -> None:
    blank = find_tissue(draw(), 8.0)
    assert not blank.mask.any()
    assert blank.emptied_by() == "saturation"
    speck = find_tissue(draw((200, 200, 5)), 8.0)
    assert speck.emptied_by() == "small tissue"


def test_a_slide_full_of_tissue_is_all_tissue() -> None:
    """Otsu alone would split the tissue in halves; the range of its threshold keeps it whole."""
    rng = np.random.default_rng(1)
    image = np.where(rng.random((200, 200, 1)) < 0.5, (190, 110, 160), (225, 190, 215)).astype(np.uint8)
    assert find_tissue(image, 8.0).mask.mean() > 0.99


def test_tissue_at_the_border_stays() -> None:
    assert find_tissue(draw((0, 200, 100)), 8.0).mask[200, 0]


def test_detects_on_a_slide(tissue_image: np.ndarray) -> None:
    with open_slide(tissue_image, mpp=0.5) as slide:
        found = detect_tissue(slide)
    assert found.mpp == 8.0
    assert found.mask.shape == (75, 100)
    assert found.area_mm2 == pytest.approx(np.pi * 0.225**2, rel=0.05)


def test_coarse_slides_are_looked_at_as_they_are(tissue_image: np.ndarray) -> None:
    with open_slide(tissue_image, mpp=20.0) as slide:
        assert detect_tissue(slide).mask.shape == (1200, 1600)


def test_needs_a_scale(tissue_image: np.ndarray) -> None:
    with open_slide(tissue_image) as slide, pytest.raises(ScaleError):
        detect_tissue(slide)


def test_mask_digest_tells_masks_apart() -> None:
    mask = np.zeros((10, 10), bool)
    other = mask.copy()
    other[3, 3] = True
    digests = {TissueMask(mask, 8.0).digest, TissueMask(other, 8.0).digest, TissueMask(mask, 4.0).digest}
    assert len(digests) == 3
    assert TissueMask(mask.copy(), 8.0).digest in digests


@pytest.mark.parametrize(
    "options",
    [
        {"mpp": 0},
        {"mpp": 9},
        {"threshold": 300},
        {"otsu_range": (40, 10)},
        {"median_px": 4},
        {"close_px": -1},
        {"min_tissue_mm2": -1},
        {"max_holes": -1},
    ],
)
def test_settings_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(SettingsError):
        TissueSettings(**options)  # type: ignore[arg-type]


def test_masks_are_checked() -> None:
    with pytest.raises(SettingsError):
        TissueMask(np.zeros((3, 3)), 8.0)  # type: ignore[arg-type]
    with pytest.raises(SettingsError):
        TissueMask(np.zeros((3, 3), bool), 0.0)
