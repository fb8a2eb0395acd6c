"""Small slides for the proof of prompts: what is large on a tile is told by any look, what decides is small.

A tile of 32 px shows one large body of one of three colours and three small grains. On a marked tile one of the grains
is of a colour of its own; all else is drawn alike. Slides are of 4 × 4 tiles, and those of class "with" have some
marked ones.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TILE, ROW, GRAINS = 32, 4, 3
"""Pixels of a tile's side, tiles of a slide's side, grains on a tile."""

GROUNDS = np.array([[228.0, 170.0, 200.0], [214.0, 184.0, 186.0]])
"""Colour of the ground: that of the cohort, and of another stain not far from it."""

BODIES = np.array([[96.0, 66.0, 150.0], [70.0, 110.0, 140.0], [130.0, 100.0, 60.0]])
"""Colours of bodies, and of grains that decide nothing."""

SOUGHT = np.array([170.0, 40.0, 70.0])
"""Colour of the grain that decides."""

WITHOUT, WITH = "without", "with"

_Y, _X = np.mgrid[0:TILE, 0:TILE].astype(np.float32)


@dataclass(frozen=True)
class SceneSpec:
    """A cohort: slides of each part, and how many tiles of a slide of class "with" are marked."""

    train: int = 120
    validation: int = 40
    test: int = 80
    marked: tuple[int, int] = (6, 12)
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles uint8 (N, 32, 32, 3), and the kind of the body on each, int64 (N,)."""

    pixels: NDArray[np.uint8]
    kinds: NDArray[np.int64]


def draw_tiles(
    rng: np.random.Generator,
    marked: NDArray[np.bool_],
    grounds: NDArray[np.int64] | None = None,
    stain: NDArray[np.float64] | None = None,
) -> Tiles:
    """Tiles, marked (N,) or not, on grounds (N,) of :data:`GROUNDS`; the stain shifts every colour, of each anew."""
    kinds = rng.integers(0, len(BODIES), len(marked))
    pixels = np.empty((len(marked), TILE, TILE, 3), np.uint8)
    for tile, sought in enumerate(marked):
        shift = rng.uniform(-8, 8, 3) if stain is None else stain
        waves = np.kron(rng.normal(0, 4, (4, 4)), np.ones((8, 8)))[:, :, None]
        picture = GROUNDS[0 if grounds is None else grounds[tile]] + shift + waves
        x, y, radius = *rng.uniform(8, TILE - 8, 2), rng.uniform(5.5, 7.5)
        picture = _blend(picture, rng, (x, y), radius, BODIES[kinds[tile]] + shift)
        for grain in range(GRAINS):
            at = rng.uniform(3, TILE - 3, 2)
            while np.hypot(at[0] - x, at[1] - y) < radius + 2:
                at = rng.uniform(3, TILE - 3, 2)
            colour = SOUGHT if sought and grain == 0 else BODIES[rng.integers(len(BODIES))]
            picture = _blend(picture, rng, (at[0], at[1]), rng.uniform(2.6, 3.2), colour + shift)
        pixels[tile] = np.clip(picture + rng.normal(0, 4, picture.shape), 0, 255)
    return Tiles(pixels, kinds)


def write_scenes(folder: Path, spec: SceneSpec) -> Path:
    """Draw a cohort into a folder; its ``cohort.csv`` has slide, slide_id, patient, label, split and mpp."""
    rng = np.random.default_rng([spec.seed, 1])
    (folder / "slides").mkdir(parents=True)
    table = folder / "cohort.csv"
    with open(table, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["slide", "slide_id", "patient", "label", "split", "mpp"])
        parts = ["train"] * spec.train + ["val"] * spec.validation + ["test"] * spec.test
        for number, part in enumerate(parts):
            name, label = f"slide-{number:03}", (WITHOUT, WITH)[number % 2]
            Image.fromarray(_draw_slide(rng, spec, label == WITH)).save(folder / "slides" / f"{name}.png")
            writer.writerow([f"slides/{name}.png", name, f"patient-{number:03}", label, part, 0.5])
    return table


def _draw_slide(rng: np.random.Generator, spec: SceneSpec, positive: bool) -> NDArray[np.uint8]:
    marked = np.zeros(ROW * ROW, bool)
    if positive:
        marked[rng.choice(ROW * ROW, rng.integers(spec.marked[0], spec.marked[1] + 1), replace=False)] = True
    tiles = draw_tiles(rng, marked, stain=rng.uniform(-8, 8, 3)).pixels
    return tiles.reshape(ROW, ROW, TILE, TILE, 3).swapaxes(1, 2).reshape(ROW * TILE, ROW * TILE, 3)


def _blend(
    picture: NDArray[np.float64], rng: np.random.Generator, at: tuple[float, float], radius: float,
    colour: NDArray[np.float64],
) -> NDArray[np.float64]:  # fmt: skip
    """An ellipse with a soft edge over a picture."""
    flat, turn = rng.uniform(0.75, 1), rng.uniform(0, np.pi)
    dx, dy = _X - at[0], _Y - at[1]
    along, across = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
    inside = np.clip((1 - np.hypot(along / radius, across / (radius * flat))) * radius * 0.8 + 0.5, 0, 1)[:, :, None]
    blended: NDArray[np.float64] = picture * (1 - inside) + (colour + rng.normal(0, 6, 3)) * inside
    return blended
