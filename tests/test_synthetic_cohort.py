"""Cohorts whose label depends on a small tumour region: what is drawn, and that its truth is where it says."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from wsi_engine import lay_grid, open_slide
from wsi_engine.errors import InputError, SettingsError
from wsi_engine.synthetic_cohort import CohortSpec, lay_cohort, measure_tumour, tumour_of_tiles, write_cohort

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


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    for bad in ({"slides": 1}, {"tumour_share": (0.0, 0.1)}, {"tumour_share": (0.2, 0.1)}, {"sites": 0}):
        with pytest.raises(SettingsError, match="give"):
            CohortSpec(**bad)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write a cohort"):
        write_cohort(tmp_path / "file", SMALL)
