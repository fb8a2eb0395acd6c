"""Cohorts whose label depends on a small tumour region: what is drawn, and that its truth is where it says."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wsi_engine import lay_grid, open_slide
from wsi_engine.errors import InputError, SettingsError
from wsi_engine.synthetic_cohort import (
    CohortSpec,
    draw_follow_up,
    lay_cohort,
    measure_tumour,
    tumour_of_tiles,
    write_cohort,
)

SMALL = CohortSpec(slides=6, side_px=1024, mpp=1.0, slides_per_patient=2, sites=2, seed=5)


def test_half_of_the_patients_have_a_tumour_of_the_allowed_size() -> None:
    cohort = lay_cohort(CohortSpec(slides=12, seed=1))
    assert [slide.label for slide in cohort] == ["normal", "tumour"] * 6
    for slide in cohort:
        share = measure_tumour(slide.spec)
        assert 0.02 <= share <= 0.10 if slide.label == "tumour" else share == 0
    assert len({slide.spec.stains for slide in cohort}) == 12


def test_slides_of_a_patient_share_class_and_site() -> None:
    known: dict[str, tuple[str, str]] = {}
    for slide in lay_cohort(SMALL):
        assert known.setdefault(slide.patient, (slide.label, slide.site)) == (slide.label, slide.site)
    assert len(known) == 3
    assert {site for _, site in known.values()} == {"site-0", "site-1"}


def test_the_coarse_truth_is_the_fine_truth() -> None:
    spec = lay_cohort(SMALL)[2].spec
    slide = lay_cohort(SMALL)[2]
    tissue = slide.truth.tissue(0, 0, 1024, 1024)
    tumour = slide.truth.tumour(0, 0, 1024, 1024)
    assert measure_tumour(spec) == pytest.approx(tumour.sum() / tissue.sum(), rel=0.03)


def test_written_slides_and_their_table(tmp_path: Path) -> None:
    table = write_cohort(tmp_path, SMALL)
    with open(table, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["label"] for row in rows] == ["normal", "normal", "tumour", "tumour", "normal", "normal"]
    assert rows[0]["months"] == rows[1]["months"] != rows[2]["months"]  # of the patient
    assert {row["died"] for row in rows} <= {"0", "1"}
    kept = (tmp_path / rows[0]["slide"]).stat().st_mtime_ns
    write_cohort(tmp_path, SMALL)
    assert (tmp_path / rows[0]["slide"]).stat().st_mtime_ns == kept
    chosen = lay_cohort(SMALL)[2]
    with open_slide(tmp_path / rows[2]["slide"]) as slide:
        assert slide.dimensions == (1024, 1024)
        grid = lay_grid(slide, mpp=1.0, tile_px=64, tissue=None)
        shares = tumour_of_tiles(chosen.spec, grid)
        truth = chosen.truth.tumour(0, 0, 1024, 1024)
        wanted = [truth[y : y + 64, x : x + 64].mean() for x, y in grid.origins]
        assert np.abs(shares - wanted).max() < 0.15
        assert 0.5 < shares.max() <= 1
        # and it can be seen: nuclei of the tumour make it darker than the rest of the tissue
        pixels = slide.read_region(0, 0, 1024, 1024, mpp=1.0).mean(axis=2)
        tissue = chosen.truth.tissue(0, 0, 1024, 1024)
        assert pixels[truth & tissue].mean() < pixels[tissue & ~truth].mean() - 5


def test_more_tumour_means_a_shorter_life() -> None:
    spec = CohortSpec(slides=4000, slides_per_patient=2, side_px=256, tumour_share=(0.1, 0.2), hazard_ratio=9.0)
    shares = np.repeat(np.tile([0.0, 0.1, 0.0, 0.2], 500), 2) * np.tile([1, 0.5], 2000)
    slide = lay_cohort(CohortSpec(slides=2))[0]
    cohort = [replace(slide, patient=f"p{place // 2}") for place in range(4000)]
    known = draw_follow_up(spec, cohort, shares.tolist())
    assert len(known) == 2000
    groups = [[known[f"p{k}"] for k in range(2000) if k % 4 == place] for place in (0, 1, 3)]
    rates = [sum(one.died for one in group) / sum(one.months for one in group) for group in groups]
    assert rates[0] == pytest.approx(np.log(2) / 90, rel=0.15)
    assert rates[1] / rates[0] == pytest.approx(3, rel=0.2)  # half the share, the root of the ratio
    assert rates[2] / rates[0] == pytest.approx(9, rel=0.2)
    months = [one.months for group in groups for one in group]
    assert min(months) > 0
    assert max(months) <= 120
    assert all(one.months >= 60 for group in groups for one in group if not one.died)
    ages = np.array([one.age for one in groups[0]]), np.array([one.months for one in groups[0]])
    assert abs(np.corrcoef(*ages)[0, 1]) < 0.15
    assert draw_follow_up(spec, cohort, shares.tolist()) == known


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    for bad in (
        {"slides": 1},
        {"tumour_share": (0.0, 0.1)},
        {"tumour_share": (0.2, 0.1)},
        {"sites": 0},
        {"hazard_ratio": 0},
    ):
        with pytest.raises(SettingsError, match="give"):
            CohortSpec(**bad)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write a cohort"):
        write_cohort(tmp_path / "file", SMALL)
