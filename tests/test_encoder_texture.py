"""The texture encoder: its card, its threads, and whether its features say what they are named after."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from skimage import data

from wsi_engine.encoders.texture import FEATURE_NAMES, TEXTURE_CARD, TextureEncoder
from wsi_engine.errors import EncoderError, SettingsError

DOCS = Path(__file__).resolve().parents[1] / "docs" / "texture.md"
H, E = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])


def draw_tissue(seed: int, nuclei: int, radius: float, stretch: float = 1.0, dye: float = 0.9) -> np.ndarray:
    """Pink ground with purple nuclei by Beer and Lambert: uint8 (160, 160, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:160, :160]
    haematoxylin = np.full((160, 160), 0.05)
    for _ in range(nuclei):
        cy, cx = rng.uniform(0, 160, 2)
        haematoxylin[((x - cx) / (radius * stretch)) ** 2 + ((y - cy) * stretch / radius) ** 2 < 1] = dye
    eosin = 0.25 + 0.05 * ndimage.gaussian_filter(rng.standard_normal((160, 160)), 2)
    density = haematoxylin[..., None] * H + eosin[..., None] * E
    return np.rint(255 * 10 ** -np.maximum(density, 0)).astype(np.uint8)


def measure(*tiles: np.ndarray) -> list[dict[str, float]]:
    rows = TextureEncoder(threads=1).encode(np.stack(tiles))
    return [dict(zip(FEATURE_NAMES, map(float, row), strict=True)) for row in rows]


def test_the_card_names_every_column() -> None:
    assert TEXTURE_CARD.dim == len(FEATURE_NAMES) == len(set(FEATURE_NAMES)) == 90
    assert TEXTURE_CARD.feature_names == FEATURE_NAMES
    assert all(re.fullmatch(r"[a-z]+(_[a-z0-9]+)*", name) for name in FEATURE_NAMES)
    assert re.fullmatch("[0-9a-f]{64}", TEXTURE_CARD.weights_digest)
    encoder = TextureEncoder()
    assert encoder.card is TEXTURE_CARD
    assert encoder.encode(np.zeros((3, 16, 24, 3), np.uint8)).shape == (3, 90)


def test_the_documentation_lists_the_columns_in_order() -> None:
    table = DOCS.read_text(encoding="utf-8").split("## Features")[1].split("## Sources")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.+) \|$", table, flags=re.MULTILINE)
    assert tuple(name for name, *_ in rows) == FEATURE_NAMES


def test_the_card_loads_without_numba() -> None:
    code = "import sys, wsi_engine.encoders.texture; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_do_not_change_the_features(threads: int) -> None:
    picture = data.immunohistochemistry()
    batch = np.stack([picture[y : y + 64, x : x + 64] for y in range(0, 192, 64) for x in range(0, 192, 64)])
    one, many = TextureEncoder(threads=1), TextureEncoder(threads=threads)
    np.testing.assert_array_equal(one.encode(batch), many.encode(batch))
    np.testing.assert_array_equal(one.encode(batch[4:5])[0], many.encode(batch)[4])
    assert many.encode(batch[:0]).shape == (0, 90)


def test_bad_settings_and_tiles_are_refused() -> None:
    with pytest.raises(SettingsError, match="at least 1"):
        TextureEncoder(threads=0)
    with pytest.raises(EncoderError, match="at least 8 × 8 px, not 16 × 7"):
        TextureEncoder().encode(np.zeros((1, 7, 16, 3), np.uint8))
    for pixels in (np.zeros((1, 16, 16, 3), np.float32), np.zeros((16, 16, 3), np.uint8)):
        with pytest.raises(SettingsError, match=r"uint8 of shape \(B, H, W, 3\)"):
            TextureEncoder().encode(pixels)


@pytest.mark.parametrize("seed", range(3))
def test_dense_large_nuclei_differ_from_sparse_long_ones_as_named(seed: int) -> None:
    tumour = draw_tissue(seed, nuclei=40, radius=9)
    stroma = draw_tissue(seed, nuclei=8, radius=4, stretch=1.8, dye=0.6)
    first, second = measure(tumour, stroma)
    higher = [
        "haematoxylin_mean",
        "haematoxylin_p75",
        "nuclear_density",
        "nuclear_area_fraction",
        "nuclear_diameter_mean",
        "nuclear_haematoxylin_mean",
        "glcm_contrast_d4",
        "edge_fraction",
        "haematoxylin_std",
    ]
    lower = ["nuclear_eccentricity_mean", "glcm_energy_d1", "red_mean"]
    assert {name: first[name] > second[name] for name in higher} == dict.fromkeys(higher, True)
    assert {name: first[name] < second[name] for name in lower} == dict.fromkeys(lower, True)


def test_separate_nuclei_are_counted_and_sized() -> None:
    density = np.full((160, 160, 3), 0.05) * H + 0.2 * E
    y, x = np.mgrid[:160, :160]
    for cy in range(20, 160, 40):
        for cx in range(20, 160, 40):
            density[(x - cx) ** 2 + (y - cy) ** 2 <= 8**2] += 0.8 * H
    (found,) = measure(np.rint(255 * 10**-density).astype(np.uint8))
    assert found["nuclear_density"] == pytest.approx(16 / 25.6)
    assert found["nuclear_diameter_mean"] == pytest.approx(1.6, abs=0.1)
    assert found["nuclear_diameter_std"] == pytest.approx(0, abs=1e-3)
    assert found["nuclear_eccentricity_mean"] < 0.1
    assert found["eosin_p50"] == pytest.approx(0.2, abs=0.03)


def test_glass_has_no_tissue_and_no_nuclei() -> None:
    glass = np.random.default_rng(0).integers(240, 250, (64, 64, 3)).astype(np.uint8)
    (found,) = measure(glass)
    assert found["white_fraction"] == 1
    assert found["tissue_fraction"] == found["dark_fraction"] == 0
    assert found["density_bin_00"] == 1
    assert all(found[name] == 0 for name in FEATURE_NAMES if name.startswith("nuclear_"))


def test_blur_and_fibres_move_the_features_named_after_them() -> None:
    sharp = draw_tissue(4, nuclei=25, radius=6)
    blurred = ndimage.gaussian_filter(sharp, (2, 2, 0))
    fibres = np.repeat(np.sin(np.arange(160) / 3)[:, None, None], 160, axis=1) * 30 + np.array([210, 140, 180])
    clear, soft, lines = measure(sharp, blurred, fibres.astype(np.uint8))
    assert soft["laplacian_std"] < 0.3 * clear["laplacian_std"]
    assert soft["edge_fraction"] < clear["edge_fraction"]
    assert lines["edge_coherence"] > 0.99 > 0.5 > clear["edge_coherence"]


def test_brown_and_blue_halves_of_a_real_picture_are_told_apart() -> None:
    picture = data.immunohistochemistry()
    tiles = np.stack([picture[y : y + 64, x : x + 64] for y in range(0, 512, 64) for x in range(0, 512, 64)])
    found = measure(*tiles)
    brown = [(tile[..., 0].astype(int) - tile[..., 2]).mean() for tile in tiles]  # red over blue
    residual = [row["residual_mean"] for row in found]
    assert np.corrcoef(brown, residual)[0, 1] > 0.8
    blue = [row["hue_sin_mean"] for row in found]
    assert np.corrcoef(brown, blue)[0, 1] > 0.8
    assert found[int(np.argmax(brown))]["residual_p95"] > found[int(np.argmin(brown))]["residual_p95"] + 0.1


def test_most_features_keep_three_decimals_in_float16() -> None:
    picture = data.immunohistochemistry()
    tiles = np.stack([picture[y : y + 128, x : x + 128] for y in range(0, 512, 128) for x in range(0, 512, 128)])
    features = TextureEncoder().encode(tiles)
    rounding = np.abs(features.astype(np.float16).astype(np.float32) - features).max(0)
    assert (rounding <= 1e-3).mean() > 0.9
    assert rounding.max() < 0.01
