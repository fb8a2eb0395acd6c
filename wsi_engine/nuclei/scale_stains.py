"""Stain augmentation and normalisation of crops for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import InputError
from wsi_engine.kernels.macenko import estimate_stains
from wsi_engine.kernels.stains import HE_RESIDUAL, complete_stains, unmix_stains
from wsi_engine.readers.base import RGBImage

NORMALISATIONS = ("none", "reinhard", "macenko")

_LEAST_SD = 1e-3
_LEAST_ANGLE = 1e-3
"""Norm of the cross product of two stains below which they are taken for one."""

_LENGTHS = {"reinhard": (3, 3), "macenko": (3, 3, 2)}
"""Numbers in each row of a look."""


@dataclass(frozen=True)
class Look:
    """The stain of a picture.

    ``rows`` are, for ``reinhard``, the means and the standard deviations of L, a, b; for ``macenko``, the vectors of
    haematoxylin and eosin, then the 99th percentiles of their concentrations.
    """

    kind: str
    rows: tuple[tuple[float, ...], ...]


def measure_look(pixels: RGBImage, kind: str, where: str = "the picture") -> Look:
    """The look of tissue: uint8 (..., 3); ``kind`` is ``reinhard`` or ``macenko``.

    Raises:
        InputError: Macenko's method finds no two stains; ``where`` names the picture.
    """
    flat = pixels.reshape(-1, 1, 3)
    if kind == "reinhard":
        lab = _to_lab(flat).reshape(-1, 3)
        return Look(kind, (_row(lab.mean(axis=0)), _row(np.maximum(lab.std(axis=0), _LEAST_SD))))
    try:
        vectors = estimate_stains(flat)
    except ValueError as error:
        raise InputError(
            f"the stains of {where} cannot be told ({error}); leave the picture out, or train with --normalisation "
            "reinhard"
        ) from error
    amounts = np.maximum(np.percentile(unmix_stains(flat, vectors)[..., :2].reshape(-1, 2), 99, axis=0), _LEAST_SD)
    return Look(kind, (_row(vectors[0]), _row(vectors[1]), _row(amounts)))


def read_look(entry: Any) -> Look:
    """The look that ``asdict`` made plain values of, as JSON gives them back.

    Raises:
        ValueError: it is none; the message says what is amiss.
    """
    try:
        look = Look(str(entry["kind"]), tuple(tuple(float(value) for value in row) for row in entry["rows"]))
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise ValueError("it lacks its kind or its rows of numbers") from error
    lengths = _LENGTHS.get(look.kind)
    if lengths is None:
        raise ValueError(f"its kind is {look.kind[:40]!r}")
    if tuple(map(len, look.rows)) != lengths:
        raise ValueError(f"its rows have {', '.join(str(len(row)) for row in look.rows)} numbers")
    if not np.isfinite(np.concatenate(look.rows)).all() or not min(look.rows[-1]) > 0:
        raise ValueError("its numbers are not finite, or its last row is not above 0")
    if look.kind == "macenko" and np.linalg.norm(np.cross(look.rows[0], look.rows[1])) < _LEAST_ANGLE:
        raise ValueError("its stains are parallel")
    return look


def mean_look(looks: Sequence[Look]) -> Look:
    """The mean of looks of one kind: the reference that pictures are brought to."""
    rows = np.array([[value for row in look.rows for value in row] for look in looks]).mean(axis=0).tolist()
    lengths = [len(row) for row in looks[0].rows]
    starts = np.cumsum([0, *lengths])
    return Look(looks[0].kind, tuple(tuple(rows[a : a + n]) for a, n in zip(starts, lengths, strict=False)))


def match_look(pixels: RGBImage, look: Look, reference: Look) -> RGBImage:
    """Bring pixels, uint8 (H, W, 3), of one look to another of the same kind.

    Source: E. Reinhard et al., "Color transfer between images", IEEE CG&A 2001 (in CIE Lab); M. Macenko et al., ISBI
    2009, section 2.3.
    """
    if look.kind == "reinhard":
        (mean, sd), (to_mean, to_sd) = (np.array(one.rows, np.float32) for one in (look, reference))
        return _from_lab((_to_lab(pixels) - mean) / sd * to_sd + to_mean)
    haematoxylin, eosin, most = look.rows
    amounts = unmix_stains(pixels, complete_stains(_three(haematoxylin), _three(eosin)))
    amounts[..., :2] *= np.divide(reference.rows[2], most, dtype=np.float32)
    return remix_stains(amounts, complete_stains(_three(reference.rows[0]), _three(reference.rows[1])))


def jitter_stains(pixels: RGBImage, factors: NDArray[np.float64]) -> RGBImage:
    """Multiply haematoxylin, eosin and the residual by a factor each: uint8 (H, W, 3) to the same."""
    return remix_stains(unmix_stains(pixels) * factors.astype(np.float32), HE_RESIDUAL)


def remix_stains(amounts: NDArray[np.float32], vectors: NDArray[np.float64]) -> RGBImage:
    """Pixels uint8 (..., 3) of concentrations float32 (..., 3), a channel per row of ``vectors``."""
    density = amounts @ vectors.astype(np.float32)
    return _to_bytes(np.exp(density * np.float32(-np.log(10))))


def _to_lab(pixels: RGBImage) -> NDArray[np.float32]:
    from skimage.color import rgb2lab  # noqa: PLC0415 - only for Reinhard's normalisation

    lab: NDArray[np.float32] = rgb2lab(pixels).astype(np.float32)
    return lab


def _from_lab(lab: NDArray[np.float32]) -> RGBImage:
    from skimage.color import lab2rgb  # noqa: PLC0415

    lightness = np.clip(lab[..., :1], 0, 100)
    bluest = 200 * (lightness + 16) / 116 - 1e-3  # beyond it Z would be negative
    return _to_bytes(lab2rgb(np.concatenate([lightness, lab[..., 1:2], np.minimum(lab[..., 2:], bluest)], axis=-1)))


def _to_bytes(share: NDArray[np.float32]) -> RGBImage:
    """Values within 0-1, cut off there, as uint8."""
    return np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)


def _row(values: NDArray[np.floating]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _three(row: tuple[float, ...]) -> tuple[float, float, float]:
    return row[0], row[1], row[2]
