"""Cohorts with known truth: synthetic slides whose label depends on a small tumour region.

Slides differ in much that has nothing to do with the label (density of nuclei and glands, stains, noise), so that the
mean of a slide's tiles tells little of a region that covers a few hundredths of its tissue; whoever finds the region
knows the label.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import InputError, SettingsError
from wsi_engine.grid import TileGrid
from wsi_engine.synthetic import SlideTruth, write_slide
from wsi_engine.synthetic_scene import RUIFROK_JOHNSTON, Ellipse, SlideSpec, Stains
from wsi_engine.workers import usable_cores

NORMAL, TUMOUR = "normal", "tumour"

_TWIN_MPP = 8.0
"""Scale at which a slide's outlines are looked at; they are laid in µm, so a coarse twin has the same."""

_ATTEMPTS = 200

_HALF_LIFE = 90.0
"""Months after which half of the patients without tumour are dead."""

_FOLLOW_UP = 1
"""Tells the draw of survival from that of the slides."""


@dataclass(frozen=True)
class CohortSpec:
    """A synthetic cohort of two classes.

    Attributes:
        slides: number of slides, half of them with a tumour.
        side_px: width and height of a slide in level-0 pixels.
        mpp: micrometres per level-0 pixel.
        tumour_share: least and greatest share of the tissue that the tumour covers on slides that have one.
        slides_per_patient: every patient but perhaps the last has so many slides, of one class.
        sites: number of sites; patients are spread over them.
        hazard_ratio: of death, of a patient whose slides show the greatest share of tumour against one without any;
            between them the logarithm of the hazard follows the share.
        seed: the same spec and seed give the same files.
    """

    slides: int = 48
    side_px: int = 4096
    mpp: float = 0.5
    tumour_share: tuple[float, float] = (0.02, 0.10)
    slides_per_patient: int = 1
    sites: int = 3
    hazard_ratio: float = 6.0
    seed: int = 0

    def __post_init__(self) -> None:
        least, most = self.tumour_share
        if not 0 < least <= most <= 0.5:
            raise SettingsError(f"tumour_share is {self.tumour_share}: give two shares above 0 and at most 0.5")
        for name, value, low in (
            ("slides", self.slides, 2), ("side_px", self.side_px, 256),
            ("slides_per_patient", self.slides_per_patient, 1), ("sites", self.sites, 1),
        ):  # fmt: skip
            if value < low:
                raise SettingsError(f"{name} is {value}: give {low} or more")
        if not 0 < self.hazard_ratio < math.inf:
            raise SettingsError(f"hazard_ratio is {self.hazard_ratio}: give a number above 0")


@dataclass(frozen=True)
class CohortSlide:
    """One slide of a synthetic cohort: its names, its label, and what is drawn on it."""

    slide_id: str
    patient: str
    site: str
    label: str
    spec: SlideSpec

    @property
    def truth(self) -> SlideTruth:
        """What is where on the slide."""
        return SlideTruth(self.spec)


@dataclass(frozen=True)
class FollowUp:
    """What became of a patient: ``age`` in years, ``months`` under observation, and whether that ended in death."""

    age: int
    months: float
    died: bool


def lay_cohort(spec: CohortSpec) -> tuple[CohortSlide, ...]:
    """Choose the slides of a cohort from its seed; nothing is drawn yet."""
    return tuple(_lay_slides(spec))


def write_cohort(folder: str | os.PathLike[str], spec: CohortSpec) -> Path:
    """Draw a cohort into ``<folder>/slides/*.tif`` and list it in ``<folder>/cohort.csv``.

    Slides that are there already are kept, so that a run that was stopped goes on.

    Returns:
        Path of the CSV: slide, slide_id, patient, site, label, tumour_share (of the tissue), and of the patient age,
        months and died (1 or 0), see :func:`draw_follow_up`.

    Raises:
        InputError: the folder cannot be written.
        SlideError: a slide cannot be written.
    """
    root = Path(folder)
    try:
        (root / "slides").mkdir(parents=True, exist_ok=True)
        cohort = lay_cohort(spec)
        with ThreadPoolExecutor(usable_cores()) as pool:
            list(pool.map(lambda slide: _draw_slide(root, slide), cohort))
        table = root / "cohort.csv"
        with open(table, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            names = ["slide", "slide_id", "patient", "site", "label", "tumour_share", "age", "months", "died"]
            writer.writerow(names)
            shares = [measure_tumour(slide.spec) for slide in cohort]
            follow_up = draw_follow_up(spec, cohort, shares)
            for slide, share in zip(cohort, shares, strict=True):
                known = follow_up[slide.patient]
                writer.writerow(
                    [
                        f"slides/{slide.slide_id}.tif", slide.slide_id, slide.patient, slide.site, slide.label,
                        f"{share:.4f}", known.age, f"{known.months:.1f}", int(known.died),
                    ]
                )  # fmt: skip
    except OSError as error:
        raise InputError(f"cannot write a cohort into {root}: {error.strerror or error}") from error
    return table


def draw_follow_up(spec: CohortSpec, cohort: Sequence[CohortSlide], shares: Sequence[float]) -> dict[str, FollowUp]:
    """Survival of the patients, by patient: exponential times whose hazard follows the largest share of tumour.

    Half of the patients without tumour are alive after 90 months; patients are observed for 60 to 120. Age has no
    influence. The slides do not depend on any of it.

    Args:
        spec: of the cohort.
        cohort: its slides.
        shares: of each slide, the share of its tissue that is tumour.
    """
    burden: dict[str, float] = {}
    for slide, share in zip(cohort, shares, strict=True):
        burden[slide.patient] = max(share, burden.get(slide.patient, 0.0))
    rng = np.random.default_rng([spec.seed, _FOLLOW_UP])
    known = {}
    for patient, share in burden.items():
        hazard = math.log(2) / _HALF_LIFE * spec.hazard_ratio ** (share / spec.tumour_share[1])
        age, death, end = int(rng.integers(38, 86)), float(rng.exponential(1 / hazard)), float(rng.uniform(60, 120))
        known[patient] = FollowUp(age, max(0.1, round(min(death, end), 1)), death <= end)
    return known


def measure_tumour(spec: SlideSpec) -> float:
    """Share of a slide's tissue that lies in tumour regions, measured on 8 µm pixels."""
    truth, side = _twin(spec)
    tissue = truth.tissue(0, 0, *side)
    tumour = truth.tumour(0, 0, *side)
    return float((tumour & tissue).sum() / max(1, tissue.sum()))


def tumour_of_tiles(spec: SlideSpec, grid: TileGrid) -> NDArray[np.float64]:
    """Share of each tile's area that lies in a tumour region: float64 (N,), measured on 8 µm pixels."""
    truth, side = _twin(spec)
    inside = np.pad(truth.tumour(0, 0, *side).astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    scale = spec.mpp / _TWIN_MPP
    low = np.rint(grid.origins * scale).astype(np.int64)
    high = np.rint((grid.origins + np.asarray(grid.tile_size_level0)) * scale).astype(np.int64)
    limit = np.array(side)
    x0, y0 = np.minimum(low, limit).T
    x1, y1 = np.minimum(high, limit).T
    area = np.maximum((high - low).prod(axis=1), 1)
    shares: NDArray[np.float64] = (inside[y1, x1] - inside[y0, x1] - inside[y1, x0] + inside[y0, x0]) / area
    return shares


def _lay_slides(spec: CohortSpec) -> Iterator[CohortSlide]:
    rng = np.random.default_rng(spec.seed)
    for k in range(spec.slides):
        patient = k // spec.slides_per_patient
        label = TUMOUR if patient % 2 else NORMAL
        drawn = SlideSpec(
            spec.side_px, spec.side_px, spec.mpp,
            seed=int(rng.integers(2**31)), tumours=0,
            nuclei_density=float(rng.uniform(0.45, 1.0)), gland_density=float(rng.uniform(0.3, 0.95)),
            stains=_vary_stains(rng), grain=float(rng.uniform(0.8, 3.0)),
        )  # fmt: skip
        if label == TUMOUR:
            drawn = _place_tumour(drawn, float(rng.uniform(*spec.tumour_share)), spec.tumour_share, rng)
        yield CohortSlide(f"slide-{k:03d}", f"patient-{patient:03d}", f"site-{patient // 2 % spec.sites}", label, drawn)


def _vary_stains(rng: np.random.Generator) -> Stains:
    """Stains that differ from slide to slide, in every channel by up to a tenth of the vector's length."""
    vectors = np.array([RUIFROK_JOHNSTON.haematoxylin, RUIFROK_JOHNSTON.eosin])
    vectors = np.clip(vectors + rng.uniform(-0.1, 0.1, vectors.shape), 0.01, None)
    haematoxylin, eosin = (tuple(row) for row in vectors.tolist())
    return Stains(haematoxylin, eosin)


def _place_tumour(spec: SlideSpec, wanted: float, allowed: tuple[float, float], rng: np.random.Generator) -> SlideSpec:
    """The slide with one tumour region that covers about the wanted share of its tissue, and surely an allowed one."""
    truth, side = _twin(spec)
    tissue = truth.tissue(0, 0, *side)
    rows, columns = np.nonzero(tissue)
    if not len(rows):
        raise SettingsError("a slide of the cohort would have no tissue: give a larger side_px")
    to_level0 = _TWIN_MPP / spec.mpp
    area = wanted * len(rows) * to_level0**2  # level-0 pixels
    for _ in range(_ATTEMPTS):
        at = int(rng.integers(len(rows)))
        stretch, angle = float(rng.uniform(0.75, 1.35)), float(rng.uniform(0, 180))
        radius = math.sqrt(area / math.pi)
        place = Ellipse(
            float(columns[at] + 0.5) * to_level0, float(rows[at] + 0.5) * to_level0,
            radius * stretch, radius / stretch, angle,
        )  # fmt: skip
        placed = replace(spec, tumour_ellipses=(place,))
        if allowed[0] <= measure_tumour(placed) <= allowed[1]:
            return placed
    raise SettingsError(f"no place was found for a tumour of {wanted:.3f} of the tissue: give a larger side_px")


def _twin(spec: SlideSpec) -> tuple[SlideTruth, tuple[int, int]]:
    """The truth of the same slide at 8 µm per pixel, and its size."""
    scale = spec.mpp / _TWIN_MPP
    size = max(1, round(spec.width * scale)), max(1, round(spec.height * scale))
    ellipses = tuple(
        replace(e, x=e.x * scale, y=e.y * scale, rx=e.rx * scale, ry=e.ry * scale) for e in spec.tumour_ellipses
    )
    return SlideTruth(replace(spec, width=size[0], height=size[1], mpp=_TWIN_MPP, tumour_ellipses=ellipses)), size


def _draw_slide(root: Path, slide: CohortSlide) -> None:
    """Draw a slide where an earlier run has not; it appears whole or not at all."""
    target = root / "slides" / f"{slide.slide_id}.tif"
    if not target.exists():
        write_slide(target, slide.spec)
