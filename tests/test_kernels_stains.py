"""Stain vectors estimated from pictures whose stains are known."""

from __future__ import annotations

import numpy as np
import pytest

from wsi_engine.kernels.macenko import LEAST_TISSUE, estimate_stains
from wsi_engine.kernels.stains import complete_stains, unmix_stains
from wsi_engine.synthetic import MACENKO, RUIFROK_JOHNSTON, SlideSpec, Stains, SyntheticSlide

GLASS = tuple(255 * np.exp(-np.array([0.047, 0.05, 0.042])))
"""Empty glass of synthetic slides."""

each_stain = pytest.mark.parametrize("stains", [RUIFROK_JOHNSTON, MACENKO], ids=["Ruifrok-Johnston", "Macenko"])


def angles(found: np.ndarray, stains: Stains) -> np.ndarray:
    """Degrees between each row and the true one."""
    true = complete_stains(stains.haematoxylin, stains.eosin)
    return np.degrees(np.arccos(np.clip((found * true).sum(1), -1, 1)))


def mix(stains: Stains, shape: tuple[int, ...], white: tuple[float, float, float] = (255, 255, 255)) -> np.ndarray:
    """Pixels with random amounts of both stains, a twentieth of them of one stain alone, a third of them glass."""
    rng = np.random.default_rng(0)
    amounts = rng.uniform(0.2, 0.9, (*shape, 2))
    alone = rng.random(shape)
    amounts[alone < 0.05, 1] = 0
    amounts[alone > 0.95, 0] = 0
    amounts[rng.random(shape) < 1 / 3] = 0
    density = amounts @ complete_stains(stains.haematoxylin, stains.eosin)[:2]
    return np.rint(white * 10**-density + rng.normal(0, 0.5, (*shape, 3))).clip(0, 255).astype(np.uint8)


@each_stain
@pytest.mark.parametrize("white", [(255, 255, 255), (240, 235, 244)])
def test_recovers_the_vectors_of_mixed_stains(stains: Stains, white: tuple[float, float, float]) -> None:
    found = estimate_stains(mix(stains, (200, 300), white), white=white)
    assert found.shape == (3, 3)
    assert found.dtype == np.float64
    assert angles(found, stains).max() < 1.5
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
    np.testing.assert_allclose(found[:2] @ found[2], 0, atol=1e-12)


@each_stain
def test_recovers_the_vectors_of_synthetic_tissue(stains: Stains) -> None:
    spec = SlideSpec(width=4096, height=4096, mpp=0.5, coverage=1, stains=stains)
    pixels = SyntheticSlide(spec).paint(1500, 1500, 512, 512)
    haematoxylin, eosin, residual = angles(estimate_stains(pixels, white=GLASS), stains)
    assert residual < 0.1  # the plane of the two stains
    # No pixel there is of one stain alone, so the vectors lie a little inwards of the true ones.
    assert haematoxylin < 4
    assert eosin < 5
    nearer = angles(estimate_stains(pixels, white=GLASS, alpha=0.1), stains)
    assert nearer[0] < haematoxylin
    assert angles(estimate_stains(pixels), stains)[1] > eosin


def test_the_estimate_unmixes_its_picture() -> None:
    pixels = mix(RUIFROK_JOHNSTON, (150, 200))
    amounts = unmix_stains(pixels, estimate_stains(pixels))
    assert np.abs(amounts[..., 2]).max() < 0.1
    true = unmix_stains(pixels, complete_stains(RUIFROK_JOHNSTON.haematoxylin, RUIFROK_JOHNSTON.eosin))
    np.testing.assert_allclose(amounts[..., :2], true[..., :2], atol=0.05)


def test_shape_order_and_strides_do_not_matter() -> None:
    pixels = mix(MACENKO, (60, 80))
    expected = estimate_stains(pixels)
    np.testing.assert_allclose(estimate_stains(pixels.reshape(-1, 3)), expected)
    view = pixels[::-1, ::-1]
    view.flags.writeable = False
    np.testing.assert_allclose(estimate_stains(view), expected)
    assert expected[0, 0] > expected[1, 0]


def test_black_pixels_and_glass_are_left_out() -> None:
    pixels = mix(RUIFROK_JOHNSTON, (100, 100))
    expected = estimate_stains(pixels)
    frame = np.zeros((120, 130, 3), np.uint8)
    frame[:, :20] = 253
    frame[20:, 30:] = pixels
    np.testing.assert_allclose(estimate_stains(frame), expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3), (0, 5, 3), (64, 64, 3)])
def test_too_little_tissue_is_said(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"at least 100 stained pixels, and 0 of \d+ have .* more tissue"):
        estimate_stains(np.full(shape, 244, np.uint8))


def test_the_least_tissue_is_enough() -> None:
    tissue = np.empty((LEAST_TISSUE, 3), np.uint8)
    tissue[::2], tissue[1::2] = (90, 60, 130), (220, 90, 160)
    glass = np.full((500, 3), 250, np.uint8)
    assert np.isfinite(estimate_stains(np.concatenate([glass, tissue]))).all()
    with pytest.raises(ValueError, match="and 99 of 599"):
        estimate_stains(np.concatenate([glass, tissue[1:]]))


def test_tissue_of_one_colour_is_refused() -> None:
    with pytest.raises(ValueError, match=r"two stains, and the colours of the tissue lie within 0\.0 degrees"):
        estimate_stains(np.full((50, 50, 3), (90, 60, 130), np.uint8))


@pytest.mark.parametrize(
    ("pixels", "options", "error", "words"),
    [
        (np.zeros((4, 3)), {}, TypeError, "uint8 pixels, not float64"),
        (np.zeros((4, 4), np.uint8), {}, ValueError, r"\(\.\.\., 3\), not \(4, 4\)"),
        (np.zeros((4, 3), np.uint8), {"beta": 0}, ValueError, "beta above 0, not 0"),
        (np.zeros((4, 3), np.uint8), {"beta": np.nan}, ValueError, "beta above 0, not nan"),
        (np.zeros((4, 3), np.uint8), {"alpha": 50}, ValueError, "below 50 percent, not 50"),
        (np.zeros((4, 3), np.uint8), {"alpha": np.nan}, ValueError, "below 50 percent, not nan"),
        (np.zeros((4, 3), np.uint8), {"white": 256}, ValueError, "up to 255, one value or three, not 256"),
        (np.zeros((4, 3), np.uint8), {"white": (240, 240)}, ValueError, "one value or three"),
    ],
)
def test_refuses(pixels: np.ndarray, options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        estimate_stains(pixels, **options)
