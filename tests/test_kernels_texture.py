"""Stain unmixing and texture features against NumPy, SciPy and scikit-image, feature by feature."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from skimage import data
from skimage.color import rgb_from_hed, separate_stains
from skimage.feature import graycomatrix, graycoprops, local_binary_pattern
from skimage.filters import sobel, threshold_otsu
from skimage.measure import label, regionprops

from wsi_engine.encoders.texture import FEATURE_NAMES
from wsi_engine.kernels.patterns import UNIFORM_CLASSES, count_binary_patterns
from wsi_engine.kernels.stains import HE_RESIDUAL, complete_stains, unmix_stains
from wsi_engine.kernels.texture import SMALLEST_TILE, TEXTURE_DIM, texture_features

INVERSE = np.linalg.inv(HE_RESIDUAL)


def tiles() -> dict[str, np.ndarray]:
    """Pictures of many kinds and odd shapes, uint8 (H, W, 3)."""
    rng = np.random.default_rng(5)
    stained = data.immunohistochemistry()
    stripes = np.zeros((24, 31, 3), np.uint8)
    stripes[:, ::2] = (90, 60, 130)
    return {
        "stained": stained[:128, :160],
        "stained, other half": stained[300:405, 250:381],
        "smallest": stained[200:208, 200:208],
        "noise": rng.integers(0, 256, (40, 33, 3), dtype=np.uint8),
        "pale noise": rng.integers(200, 256, (33, 40, 3), dtype=np.uint8),
        "stripes": stripes,
        "white": np.full((32, 32, 3), 255, np.uint8),
        "black": np.zeros((16, 48, 3), np.uint8),
        "purple": np.full((20, 20, 3), (90, 60, 130), np.uint8),
    }


def describe_stain(levels: np.ndarray) -> list[float]:
    values = levels.ravel() / 256
    gap, deviation = values - values.mean(), values.std()
    skewness = np.clip((gap**3).mean() / deviation**3, -10, 10) if deviation > 1e-9 else 0.0
    return [values.mean(), deviation, skewness, *np.percentile(values, [5, 25, 50, 75, 95], method="inverted_cdf")]


def describe_colour(tile: np.ndarray, density: np.ndarray) -> list[float]:
    rgb = tile.astype(np.float64)
    r, g, b = np.moveaxis(rgb, -1, 0)
    mean_density = (density[..., 0] + density[..., 1] + density[..., 2]) / 3
    bins = np.bincount(np.minimum((mean_density * 10).astype(int), 15).ravel(), minlength=16) / r.size
    high, low = rgb.max(-1), rgb.min(-1)
    saturation = np.divide(high - low, high, out=np.zeros_like(high), where=high > 0)
    hue = np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)
    means, deviations = rgb.mean((0, 1)) / 255, rgb.std((0, 1)) / 255
    hues = [(saturation * np.cos(hue)).mean(), (saturation * np.sin(hue)).mean()]
    shares = [(low >= 220).mean(), (mean_density > 0.15).mean(), (high <= 50).mean()]
    return [*bins, *means, *deviations, *hues, saturation.mean(), saturation.std(), high.mean() / 255, *shares]


def describe_cooccurrence(grey: np.ndarray, distance: int) -> list[float]:
    angles = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
    matrix = graycomatrix(grey // 8, [distance], angles, levels=32, symmetric=True, normed=True)
    names = ["contrast", "dissimilarity", "homogeneity", "energy", "correlation"]
    contrast, *others = (graycoprops(matrix, name).mean() for name in names)
    entropy = -(matrix * np.log2(matrix, out=np.zeros_like(matrix), where=matrix > 0)).sum((0, 1)).mean()
    return [contrast / 31, *others, entropy]


def describe_edges(grey: np.ndarray) -> list[float]:
    image, inner = grey.astype(np.float64) / 255, (slice(1, -1), slice(1, -1))
    magnitude = sobel(image)[inner]
    gy, gx = (ndimage.sobel(grey.astype(np.int64), axis)[inner] for axis in (0, 1))
    xx, yy, xy = (gx * gx).sum(), (gy * gy).sum(), (gx * gy).sum()
    coherence = np.hypot(xx - yy, 2.0 * xy) / (xx + yy) if xx + yy else 0.0
    laplacian = ndimage.laplace(image)[inner]
    return [magnitude.mean(), magnitude.std(), (magnitude > 0.1).mean(), coherence, laplacian.std()]


def find_nuclei(haematoxylin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blurred haematoxylin in 1/65536 (exact), and the mask of nuclei."""
    smooth = haematoxylin.astype(np.int64)
    for axis in (0, 1):
        smooth = ndimage.correlate1d(smooth, [1, 4, 6, 4, 1], axis=axis, mode="nearest")
    steps = np.maximum(smooth >> 8, 0)
    otsu = threshold_otsu(steps) if steps.min() < steps.max() else 0
    return smooth, steps > max(otsu, 64)


def describe_nuclei(haematoxylin: np.ndarray) -> list[float]:
    smooth, mask = find_nuclei(haematoxylin)
    regions = [region for region in regionprops(label(mask, connectivity=1)) if region.area >= 16]
    before = np.zeros((7, 7), bool)
    before.ravel()[:24] = True
    after = before[::-1, ::-1]
    earlier = ndimage.maximum_filter(smooth, footprint=before, mode="constant", cval=-(2**40))
    later = ndimage.maximum_filter(smooth, footprint=after, mode="constant", cval=-(2**40))
    peaks = (mask & (smooth > earlier) & (smooth >= later)).sum()
    thousands, found = mask.size / 1000, [0.0] * 4
    if regions:
        areas = np.array([region.area for region in regions])
        diameters = np.sqrt(4 * areas / np.pi) / 10
        eccentricity = np.mean([region.eccentricity for region in regions])
        found = [diameters.mean(), diameters.std(), areas.std() / areas.mean(), eccentricity]
    inside = smooth[mask].mean() / 65536 if mask.any() else 0.0
    contrast = inside - smooth[~mask].mean() / 65536 if mask.any() and not mask.all() else 0.0
    return [len(regions) / thousands, peaks / thousands, mask.mean(), *found, inside, contrast]


def describe_tile(tile: np.ndarray) -> np.ndarray:
    """All features by other means, float64 (D,)."""
    density = -np.log10(np.maximum(tile, 1) / 255)
    levels = np.zeros(tile.shape, np.int64)
    for channel in range(3):
        levels += np.rint(density[..., channel, None] * INVERSE[channel] * 65536).astype(np.int64)
    levels = (levels + 128) >> 8
    grey = ((tile.astype(np.int64) @ [77, 150, 29] + 128) >> 8).astype(np.uint8)
    stains = [value for stain in range(3) for value in describe_stain(levels[..., stain])]
    patterns = local_binary_pattern(grey, 8, 1, method="uniform")[1:-1, 1:-1].astype(int)
    return np.array(
        [
            *stains,
            *describe_colour(tile, density),
            *(np.bincount(patterns.ravel(), minlength=10) / patterns.size),
            *describe_cooccurrence(grey, 1),
            *describe_cooccurrence(grey, 4),
            *describe_edges(grey),
            *describe_nuclei(levels[..., 0]),
        ]
    )


@pytest.mark.parametrize(("name", "tile"), tiles().items())
def test_features_equal_those_of_other_libraries(name: str, tile: np.ndarray) -> None:
    found, expected = texture_features(tile[None])[0], describe_tile(tile)
    assert len(expected) == len(FEATURE_NAMES) == TEXTURE_DIM
    wrong = [
        f"{feature}: {a} instead of {b}"
        for feature, a, b in zip(FEATURE_NAMES, found, expected, strict=True)
        if not np.isclose(a, b, rtol=2e-6, atol=2e-6)
    ]
    assert not wrong


def test_binary_patterns_of_every_kind_equal_scikit_image() -> None:
    assert np.bincount(UNIFORM_CLASSES, minlength=10).tolist() == [1, 8, 8, 8, 8, 8, 8, 8, 1, 198]
    rng = np.random.default_rng(6)
    for grey in (rng.integers(0, 256, (70, 50)), rng.integers(0, 3, (70, 50)), data.camera()[::5, ::5]):
        patterns = local_binary_pattern(grey.astype(np.uint8), 8, 1, method="uniform")[1:-1, 1:-1]
        counts = np.bincount(patterns.astype(int).ravel(), minlength=10)
        np.testing.assert_array_equal(count_binary_patterns(grey.astype(np.uint8), UNIFORM_CLASSES), counts)


def test_a_tile_does_not_depend_on_its_batch() -> None:
    picture = data.immunohistochemistry()
    batch = np.stack([picture[:64, x : x + 64] for x in range(0, 320, 64)] + [np.zeros((64, 64, 3), np.uint8)])
    together = texture_features(batch)
    alone = np.concatenate([texture_features(tile[None]) for tile in batch[::-1]])[::-1]
    np.testing.assert_array_equal(together, alone)
    assert texture_features(batch[:0]).shape == (0, TEXTURE_DIM)


def test_views_and_read_only_tiles_are_taken() -> None:
    batch = np.ascontiguousarray(data.immunohistochemistry()[:40, :48])[None]
    mirrored = batch[:, :, ::-1]
    mirrored.flags.writeable = False
    np.testing.assert_array_equal(texture_features(mirrored), texture_features(mirrored.copy()))


@pytest.mark.parametrize("shape", [(8, 8), (8, 200), (9, 8), (65, 31)])
def test_any_size_and_content_gives_finite_numbers_that_fit_float16(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(8)
    levels = [rng.integers(0, 2, (*shape, 3)) * 255, rng.integers(0, 256, (*shape, 3)), np.full((*shape, 3), 255)]
    spot = np.full((*shape, 3), 255)
    spot[3, 3] = 0
    ramp = np.broadcast_to(np.arange(shape[1])[None, :, None] % 256, (*shape, 3))
    features = texture_features(np.stack([*levels, spot, ramp]).astype(np.uint8))
    assert np.isfinite(features).all()
    assert np.abs(features).max() < 1000
    assert np.isfinite(features.astype(np.float16)).all()


@pytest.mark.parametrize(
    ("pixels", "error", "words"),
    [
        (np.zeros((1, 16, 16, 3)), TypeError, "not float64"),
        (np.zeros((16, 16, 3), np.uint8), ValueError, r"\(B, H, W, 3\)"),
        (np.zeros((1, 16, 16, 4), np.uint8), ValueError, r"\(B, H, W, 3\)"),
        (np.zeros((1, 16, SMALLEST_TILE - 1, 3), np.uint8), ValueError, "at least 8 × 8 px, not 7 × 16"),
    ],
)
def test_bad_pixels_are_refused(pixels: np.ndarray, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        texture_features(pixels)


def test_unmixing_equals_a_plain_loop_and_recovers_pure_stains() -> None:
    pixels = np.random.default_rng(9).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    for at in np.ndindex(5, 4):
        density = [-np.log10(max(int(value), 1) / 255) for value in pixels[at]]
        expected = np.linalg.solve(HE_RESIDUAL.T, density)
        np.testing.assert_allclose(unmix_stains(pixels)[at], expected, atol=1e-5)
    for stain in range(2):
        colour = np.rint(255 * 10 ** (-0.8 * HE_RESIDUAL[stain])).astype(np.uint8)
        np.testing.assert_allclose(unmix_stains(colour), 0.8 * np.eye(3)[stain], atol=0.01)


def test_unmixing_with_the_same_matrix_equals_scikit_image() -> None:
    pixels = np.maximum(data.immunohistochemistry()[::4, ::4], 1)
    # scikit-image takes logarithms to the base 10⁻⁶, a sixth of optical density, and drops negative concentrations.
    expected = 6 * separate_stains(pixels, np.linalg.inv(rgb_from_hed))
    np.testing.assert_allclose(np.maximum(unmix_stains(pixels, rgb_from_hed), 0), expected, atol=1e-5)


def test_the_residual_is_at_right_angles_to_both_stains() -> None:
    np.testing.assert_allclose(np.linalg.norm(HE_RESIDUAL, axis=1), 1)
    np.testing.assert_allclose(HE_RESIDUAL[:2] @ HE_RESIDUAL[2], 0, atol=1e-12)
    with pytest.raises(ValueError, match="independent"):
        unmix_stains(np.zeros((2, 3), np.uint8), np.ones((3, 3)))
    with pytest.raises(ValueError, match="cannot be inverted"):
        unmix_stains(np.zeros((2, 3), np.uint8), complete_stains((1, 1, 1), (1, 1, np.nan)))


def test_unmixing_refuses_other_pixels() -> None:
    with pytest.raises(TypeError, match="float32"):
        unmix_stains(np.zeros((4, 3), np.float32))
    with pytest.raises(ValueError, match=r"\(\.\.\., 3\)"):
        unmix_stains(np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        unmix_stains(np.zeros((4, 3), np.uint8), np.eye(2))
