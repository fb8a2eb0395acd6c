"""Collages for the student: isolated nuclei cut out of an image and set into the same image, touching and overlapping.

Where nuclei of real tissue crowd, nobody can be sure of the outline between them unless a person drew it. A collage is
real tissue in which that outline is known, since it was laid there.

Source of the idea: G. Ghiasi et al., "Simple copy-paste is a strong data augmentation method for instance
segmentation", CVPR 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wsi_engine.kernels import dilate, gaussian, measure_regions
from wsi_engine.kernels.stains import HE_RESIDUAL
from wsi_engine.nuclei.student_scenes import add_nuclei

Labels = NDArray[np.int32]
Floats = NDArray[np.float32]
Rng = np.random.Generator

_MARGIN = 4
"""Pixels around a cut nucleus that come with it."""

_LEAST_SOLIDITY = 0.9
"""Area over convex area of a nucleus that is cut out."""

_CROWDED = 0.25
"""Share of a nucleus' surroundings that may be another nucleus or doubtful."""

_LEAST_LEFT = 0.35
"""Share of a nucleus of the image that must still show; what is covered further is no nucleus that could be told, nor
ground."""

_LEAST_PX = 8
"""Pixels of a nucleus that must still show."""

PAINTED_SHARE = 0.5
"""Share of the collages that get some painted nuclei besides."""


@dataclass(frozen=True, eq=False)
class Cutout:
    """A nucleus with a little of its surroundings: optical density (h, w, 3), mask float32 (h, w), radius in pixels."""

    optical: Floats
    mask: Floats
    radius: float


def cut_nuclei(image: NDArray[np.uint8], labels: Labels, trust: Floats) -> list[Cutout]:
    """Convex nuclei of an image that touch neither another one, nor doubtful ground, nor the border.

    Args:
        image: uint8 (H, W, 3).
        labels: int32 (H, W).
        trust: float32 (H, W), 0 … 1, of the labels.
    """
    optical = to_optical(image)
    table = measure_regions(labels)
    found = []
    for number, box, solidity in zip(table.label, table.bbox, table.solidity, strict=True):
        top, left, bottom, right = (int(side) for side in box + np.array((-_MARGIN, -_MARGIN, _MARGIN, _MARGIN)))
        if solidity < _LEAST_SOLIDITY or min(top, left) < 0 or bottom > labels.shape[0] or right > labels.shape[1]:
            continue
        window = (slice(top, bottom), slice(left, right))
        mask = labels[window] == number
        near = dilate(mask, 3) & ~dilate(mask, 1)  # the very outline is doubtful everywhere
        if ((labels[window][near] > 0) | (trust[window][near] < 0.3)).mean() > _CROWDED:
            continue
        found.append(Cutout(optical[window].copy(), mask.astype(np.float32), float(np.sqrt(mask.sum() / np.pi))))
    return found


def to_optical(image: NDArray[np.uint8]) -> Floats:
    """Optical density (natural logarithm) of an image."""
    return np.asarray(-np.log((image.astype(np.float32) + 1) / 256), dtype=np.float32)


def lay_collage(
    rng: Rng, image: NDArray[np.uint8], labels: Labels, trust: Floats, cutouts: Sequence[Cutout], count: int
) -> tuple[NDArray[np.uint8], Labels, Floats]:
    """Set ``count`` of the cutouts into an image, most of them against a nucleus that is there.

    Args:
        rng: of all chance.
        image: uint8 (H, W, 3).
        labels: int32 (H, W).
        trust: float32 (H, W), 0 … 1, of the labels.
        cutouts: of the same image.
        count: how many to lay.

    Returns:
        image, labels and trust with them; the arguments are left alone.
    """
    before = labels
    optical, labels, trust = to_optical(image), labels.copy(), trust.copy()
    if rng.random() < PAINTED_SHARE:
        optical = _add_painted(rng, optical, labels, trust, 1 + count // 3)
    ground = np.median(optical[labels == 0], axis=0) if (labels == 0).any() else np.zeros(3, np.float32)
    sizes = np.bincount(before.ravel())
    table = measure_regions(labels)
    anchors = [
        (float(y), float(x), float(np.sqrt(a / np.pi))) for (y, x), a in zip(table.centroid, table.area, strict=True)
    ]
    number = int(labels.max(initial=0))
    through = float(rng.uniform(0, 0.6))
    for _ in range(count if cutouts else 0):
        cutout = _turn(rng, cutouts[int(rng.integers(len(cutouts)))])
        place = _choose_place(rng, anchors, cutout.radius, labels.shape)
        number += 1
        if _lay(cutout, place, number, optical, labels, trust, ground, through):
            anchors.append((*place, cutout.radius))
    sizes = np.maximum(np.pad(sizes, (0, number + 1 - len(sizes))), 1)
    left = np.bincount(labels.ravel(), minlength=number + 1)
    covered = ((left < _LEAST_LEFT * sizes) | (left < _LEAST_PX)) & (np.arange(len(sizes)) > 0)
    hidden = covered[labels]
    labels[hidden], trust[hidden] = 0, 0
    return np.clip(256 * np.exp(-optical) - 0.5, 0, 255).astype(np.uint8), labels, trust


def _add_painted(rng: Rng, optical: Floats, labels: Labels, trust: Floats, most: int) -> Floats:
    """The optical density with painted nuclei upon it, as dark as those that are there; labels and trust follow."""
    rows = HE_RESIDUAL.astype(np.float32)
    parts = optical @ np.linalg.inv(rows)  # (H, W, 3) @ (3, 3)
    old, usual = labels.copy(), np.median(parts[labels > 0], axis=0)
    parts[..., 1] -= usual[1] * 0.5  # nuclei of the image hold some of the second stain; so will the painted ones
    for _ in range(int(rng.integers(1, 4))):
        add_nuclei(rng, parts[..., 0], parts[..., 1], labels, max(float(usual[0]), 0.3), most)
    parts[..., 1] += usual[1] * 0.5
    laid = (labels != old) & (labels > 0)
    trust[dilate(laid, 1)] = np.maximum(trust[dilate(laid, 1)], 0.8)
    trust[laid] = 1
    return np.asarray(parts @ rows, dtype=np.float32)


def _turn(rng: Rng, cutout: Cutout) -> Cutout:
    """The cutout turned, mirrored, scaled and stained a little differently."""
    scale, angle = float(np.exp(rng.normal(0, 0.15))), float(rng.uniform(0, 2 * np.pi))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    turn[:, 1] *= rng.choice((-1, 1))
    old = np.array(cutout.mask.shape)
    side = int(np.ceil(np.hypot(*old) * scale)) + 2
    offset = (old - 1) / 2 - turn @ np.full(2, (side - 1) / 2)

    def move(plane: Floats, order: int, mode: str) -> Floats:
        return np.asarray(ndimage.affine_transform(plane, turn, offset, (side, side), order=order, mode=mode))

    planes = [move(cutout.optical[..., one], 1, "nearest") for one in range(3)]
    strength = np.float32(np.exp(rng.normal(0, 0.15)))
    return Cutout(np.stack(planes, -1) * strength, move(cutout.mask, 1, "constant"), cutout.radius * scale)


def _choose_place(
    rng: Rng, anchors: Sequence[tuple[float, float, float]], radius: float, shape: tuple[int, ...]
) -> tuple[float, float]:
    """A centre: mostly beside a nucleus that is there, from half covered to just apart."""
    if anchors and rng.random() < 0.75:
        y, x, other = anchors[int(rng.integers(len(anchors)))]
        angle, far = rng.uniform(0, 2 * np.pi), (radius + other) * rng.uniform(0.6, 1.15)
        return float(y + far * np.sin(angle)), float(x + far * np.cos(angle))
    return float(rng.uniform(0, shape[0])), float(rng.uniform(0, shape[1]))


def _lay(
    cutout: Cutout,
    place: tuple[float, float],
    number: int,
    optical: Floats,
    labels: Labels,
    trust: Floats,
    ground: Floats,
    through: float,
) -> bool:
    """Lay a cutout in place; whether any of it is within the image. ``through``: how much of what lies below shows."""
    side = cutout.mask.shape[0]
    top, left = round(place[0] - side / 2), round(place[1] - side / 2)
    rows = slice(max(top, 0), min(top + side, labels.shape[0]))
    columns = slice(max(left, 0), min(left + side, labels.shape[1]))
    if rows.stop <= rows.start or columns.stop <= columns.start:
        return False
    part = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
    cover = np.clip(gaussian(cutout.mask, 0.7)[part] * 1.15, 0, 1)[..., None]
    below = optical[rows, columns]
    laid = cutout.optical[part] + through * np.maximum(below - ground, 0)
    optical[rows, columns] = below * (1 - cover) + laid * cover
    inside = cutout.mask[part] > 0.5
    labels[rows, columns][inside] = number
    edge = dilate(inside, 1)
    trust[rows, columns][edge] = np.maximum(trust[rows, columns][edge], 0.8)
    trust[rows, columns][inside] = 1
    return True
