"""Collages that the student learns from: which nuclei are cut out, and what is known of those that are laid."""

from __future__ import annotations

import numpy as np
import pytest

from wsi_engine.nuclei.student_collages import cut_nuclei, lay_collage


def crowd() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Six dark disks on a bright ground, their labels, and full trust."""
    rows, columns = np.mgrid[:96, :128]
    labels = np.zeros((96, 128), np.int32)
    for number, (y, x) in enumerate(((20, 20), (20, 60), (20, 100), (70, 20), (70, 60), (70, 100)), start=1):
        labels[np.hypot(rows - y, columns - x) <= 8] = number
    image = np.where(labels[..., None] > 0, (90, 60, 140), (230, 200, 225)).astype(np.uint8)
    return image, labels, np.ones(labels.shape, np.float32)


def test_only_isolated_convex_nuclei_are_cut_out() -> None:
    image, labels, trust = crowd()
    assert len(cut_nuclei(image, labels, trust)) == 6
    rows, columns = np.mgrid[:96, :128]
    labels[(np.hypot(rows - 20, columns - 20) <= 14) & (columns > 20) & (labels == 0)] = 7  # a crescent at the first
    trust[60:80, 9:11] = 0  # ground in doubt beside the fourth, which stays: most of its surroundings are sure
    cutouts = cut_nuclei(image, labels, trust)
    assert len(cutouts) == 5
    doubtful = np.where(labels > 0, trust, 0).astype(np.float32)
    assert not cut_nuclei(image, labels, doubtful)
    for cutout in cutouts:
        assert cutout.radius == pytest.approx(8, abs=0.5)
        assert (cutout.optical.mean(-1)[cutout.mask > 0] > 0.7).all()


@pytest.mark.parametrize("painted", [0.0, 1.0])
def test_collages_hold_the_nuclei_that_were_laid(painted: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsi_engine.nuclei.student_collages.PAINTED_SHARE", painted)
    image, labels, trust = crowd()
    before = [array.copy() for array in (image, labels, trust)]
    cutouts = cut_nuclei(image, labels, trust)
    made = [lay_collage(np.random.default_rng(seed), image, labels, trust, cutouts, 8) for seed in range(4)]
    for laid, found, sure in made:
        assert laid.shape == image.shape
        assert laid.dtype == np.uint8
        assert len(np.unique(found)) > 10
        assert (np.bincount(found.ravel())[np.unique(found)] >= 8).all()
        dark = laid.mean(-1) < 160
        if not painted:  # what is dark is labelled, but where too little of a nucleus shows
            assert ((found > 0) == dark)[sure > 0].mean() > 0.95
        assert set(np.unique(sure)) <= {np.float32(v) for v in (0, 0.8, 1)}
    again = lay_collage(np.random.default_rng(0), image, labels, trust, cutouts, 8)
    assert all(np.array_equal(a, b) for a, b in zip(made[0], again, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(before, (image, labels, trust), strict=True))


def test_an_image_without_cutouts_still_takes_painted_nuclei(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsi_engine.nuclei.student_collages.PAINTED_SHARE", 1.0)
    image, labels, trust = crowd()
    made = [lay_collage(np.random.default_rng(seed), image, labels, trust, [], 24) for seed in range(4)]
    assert max(found.max() for _, found, _ in made) > 6
    assert not all(np.array_equal(laid, image) for laid, _, _ in made)
