"""The study of the documentation: it runs, and what it prints is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pandas = pytest.importorskip("pandas")
pytest.importorskip("lifelines", reason="the study needs lifelines: pip install wsi-engine[cohort]")

SLIDES = 16


@dataclass(frozen=True)
class Study:
    """What the script printed, and the table that it wrote."""

    text: str
    table: Any
    folder: Path

    def numbers(self, pattern: str) -> tuple[float, ...]:
        """The numbers that the only line matching a pattern says in its groups."""
        (found,) = re.findall(pattern, self.text)
        return tuple(map(float, found if isinstance(found, tuple) else (found,)))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    script = Path(__file__).resolve().parents[1] / "docs" / "study.py"
    settings = {"STUDY_FOLDER": str(folder), "STUDY_SLIDES": str(SLIDES), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script], check=False, env=os.environ | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return Study(done.stdout, pandas.read_csv(folder / "table.csv"), folder)


def test_the_cohort_is_sound_and_everything_is_done(study: Study) -> None:
    assert f"{SLIDES} slides of {SLIDES} patients, nothing wrong was found" in study.text
    for job in ("features/texture", "attention/label-abmil", "nuclei/stain"):
        assert f"- {job}: {SLIDES} done\n" in study.text
    assert len(study.table) == SLIDES
    assert study.table["nuclei_count"].min() > 100
    assert (study.folder / "survival.png").stat().st_size > 5000


def test_held_out_predictions_are_mostly_right(study: Study) -> None:
    right, of = study.numbers(r"held out: (\d+) of (\d+) patients classified rightly")
    assert of == SLIDES
    assert right == (study.table["prediction"] == study.table["label"]).sum()
    assert right >= 0.75 * SLIDES
    assert (study.table["prediction_from"] == "held out").all()


@pytest.mark.parametrize("name", ["area_um2_mean", "area_um2_p95", "eccentricity_mean"])
def test_sizes_of_effects_by_counting_pairs(study: Study, name: str) -> None:
    normal, tumour, effect = study.numbers(
        rf"{name}: median ([\d.]+) normal, ([\d.]+) tumour; effect ([+-][\d.]+), q = .*"
    )
    values = {label: group[f"nuclei_{name}"].to_numpy() for label, group in study.table.groupby("label")}
    assert normal == pytest.approx(np.median(values["normal"]), rel=5e-3)
    assert tumour == pytest.approx(np.median(values["tumour"]), rel=5e-3)
    pairs = [np.sign(one - other) for one in values["tumour"] for other in values["normal"]]
    assert effect == pytest.approx(np.mean(pairs), abs=0.006)


def test_tumours_have_the_larger_nuclei_that_were_planted(study: Study) -> None:
    for name in ("area_um2_mean", "area_um2_p95"):
        effect, q = study.numbers(rf"{name}: .*effect ([+-][\d.]+), q = (\S+)")
        assert effect > 0.8
        assert q < 0.05


def test_survival_by_plain_products(study: Study) -> None:
    for name in ("normal", "tumour"):
        patients, deaths, alive = study.numbers(
            rf"predicted {name}: (\d+) patients, (\d+) deaths, ([\d.]+) alive after 60 months"
        )
        group = study.table[study.table["prediction"] == name]
        assert (patients, deaths) == (len(group), group["died"].sum())
        share = 1.0
        for month in sorted(set(group["months"][(group["died"] == 1) & (group["months"] <= 60)])):
            at_risk = (group["months"] >= month).sum()
            share *= 1 - ((group["months"] == month) & (group["died"] == 1)).sum() / at_risk
        assert alive == pytest.approx(share, abs=0.006)


def test_the_log_rank_test_by_plain_sums(study: Study) -> None:
    """Deaths of one group against those expected of it at every death, and the hypergeometric variance of these."""
    stats = pytest.importorskip("scipy.stats")
    (found,) = study.numbers(r"log-rank: p = (\S+)")
    months, died = study.table["months"].to_numpy(), study.table["died"].to_numpy() == 1
    tumour = (study.table["prediction"] == "tumour").to_numpy()
    difference = variance = 0.0
    for month in sorted(set(months[died])):
        risk, now = months >= month, (months == month) & died
        share = (risk & tumour).sum() / risk.sum()
        difference += (now & tumour).sum() - now.sum() * share
        if risk.sum() > 1:
            variance += now.sum() * share * (1 - share) * (risk.sum() - now.sum()) / (risk.sum() - 1)
    assert found == pytest.approx(stats.chi2.sf(difference**2 / variance, 1), rel=0.06)


def test_the_concordance_by_counting_pairs(study: Study) -> None:
    """Of the pairs in which one is known to have died first, those in which that one has the greater hazard."""
    (found,) = study.numbers(r"Cox: concordance ([\d.]+)")
    ratios = [study.numbers(rf"Cox, {name}: hazard ratio ([\d.]+)")[0] for name in ("nuclear size", "age")]
    size, age = study.table["nuclei_area_um2_p95"], study.table["age"]
    risk = (np.log(ratios[0]) * size / size.std() + np.log(ratios[1]) * age / 10).to_numpy()
    months, died = study.table["months"].to_numpy(), study.table["died"].to_numpy() == 1
    pairs = [
        (np.sign(risk[first] - risk[second]) + 1) / 2
        for first in np.flatnonzero(died)
        for second in range(len(months))
        if months[second] > months[first] or (months[second] == months[first] and not died[second])
    ]
    assert found == pytest.approx(np.mean(pairs), abs=0.015)  # the ratios are printed to two digits


def test_the_hazard_is_where_the_partial_likelihood_is_greatest(study: Study) -> None:
    found = [
        study.numbers(rf"Cox, {name}: hazard ratio ([\d.]+) \(([\d.]+)–([\d.]+)\)") for name in ("nuclear size", "age")
    ]
    size = study.table["nuclei_area_um2_p95"]
    columns = np.stack([(size - size.mean()) / size.std(), (study.table["age"] - study.table["age"].mean()) / 10], 1)
    months, died = study.table["months"].to_numpy(), study.table["died"].to_numpy()

    def likelihood(beta: np.ndarray) -> float:
        risk = columns @ beta
        return sum(risk[k] - np.log(np.exp(risk[months >= months[k]]).sum()) for k in np.flatnonzero(died))

    beta = np.log([ratio for ratio, _, _ in found])
    best = likelihood(beta)
    for axis in (0, 1):
        for step in (-0.05, 0.05):
            moved = beta.copy()
            moved[axis] += step
            assert likelihood(moved) < best
    assert found[0][0] > 1.3  # the planted biology: the larger the nuclei, the greater the hazard
    assert found[0][1] < found[0][0] < found[0][2]
