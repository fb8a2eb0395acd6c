"""A study, from a list of slides to survival and morphometry, on a synthetic cohort; docs/study.md says what it shows.

Runs as a script (``python docs/study.py``), or cell by cell in an editor that knows percent cells. STUDY_FOLDER says
where it may write (default: ``study``), STUDY_SLIDES how many slides it draws (default: 32). Safe to stop and to run
again: what is done is kept.
"""

# %%
from __future__ import annotations

import os
from pathlib import Path

import matplotlib
import pandas
from lifelines import CoxPHFitter, KaplanMeierFitter
from lifelines.statistics import logrank_test
from scipy import stats

import wsi_engine as we
from wsi_engine.nuclei.slides import NucleiOutputs
from wsi_engine.synthetic_cohort import CohortSpec, write_cohort

matplotlib.use("Agg")
FOLDER = Path(os.environ.get("STUDY_FOLDER", "study"))
SLIDES = int(os.environ.get("STUDY_SLIDES", "32"))

# %% Slides with known truth: every second patient has a tumour, of large nuclei, and the more of it the greater the
# hazard of death; age means nothing. With slides of your own, you begin in the next cell.
spec = CohortSpec(slides=SLIDES, side_px=1024, tumour_share=(0.2, 0.4), hazard_ratio=20, seed=2)
listed = write_cohort(FOLDER, spec)

# %% From the list of slides to a table
cohort = we.Cohort.read(listed)
print(cohort.check())
cohort.extract("texture", tile_px=64)
cohort.nuclei("stain", outputs=NucleiOutputs(geojson=False, table=None, overlay=False))
splits, settings = we.SplitSettings(folds=3), we.TrainSettings(epochs=20, least_epochs=10, patience=5)
cohort.train("label", "abmil", options={"standardise": True}, splits=splits, settings=settings)
cohort.classify(settings=we.ExplainSettings(heatmaps=False, geojson=False, sheets=False))
print(cohort.status())
table = cohort.table(by="patient")
table.to_csv(FOLDER / "table.csv", index=False)
print(f"table: {len(table)} patients, {len(table.columns)} columns, {table['died'].sum()} deaths")

# %% What the heads say of patients that they were not trained on
held_out = table[table["prediction_from"] == "held out"]
right = (held_out["prediction"] == held_out["label"]).sum()
print(f"held out: {right} of {len(held_out)} patients classified rightly")

# %% Nuclei of the two groups: Mann-Whitney, with the rank-biserial correlation as size of the effect. Several
# measurements are looked at, so their p-values are adjusted (Benjamini and Hochberg).
MEASUREMENTS = ("area_um2_mean", "area_um2_p95", "eccentricity_mean", "solidity_mean", "haematoxylin_mean_mean")
groups = dict(iter(table.groupby("label")))
tests = {}
for name in MEASUREMENTS:
    normal, tumour = (groups[label][f"nuclei_{name}"] for label in ("normal", "tumour"))
    tests[name] = stats.mannwhitneyu(tumour, normal)
adjusted = stats.false_discovery_control([test.pvalue for test in tests.values()])
for (name, test), q in zip(tests.items(), adjusted, strict=True):
    effect = 2 * test.statistic / (len(groups["normal"]) * len(groups["tumour"])) - 1
    medians = [groups[label][f"nuclei_{name}"].median() for label in ("normal", "tumour")]
    print(f"{name}: median {medians[0]:.3g} normal, {medians[1]:.3g} tumour; effect {effect:+.2f}, q = {q:.2g}")

# %% Survival by the class that was predicted from the slide alone: Kaplan-Meier, and a log-rank test
axes = None
for name, group in held_out.groupby("prediction"):
    curve = KaplanMeierFitter().fit(group["months"], group["died"], label=f"predicted {name}")
    axes = curve.plot_survival_function(ax=axes)
    alive = curve.predict(60)
    print(f"predicted {name}: {len(group)} patients, {group['died'].sum()} deaths, {alive:.2f} alive after 60 months")
assert axes is not None
axes.set(xlabel="months", ylabel="alive")
axes.figure.savefig(FOLDER / "survival.png", dpi=120)
first, second = (held_out[held_out["prediction"] == name] for name in ("normal", "tumour"))
test = logrank_test(first["months"], second["months"], first["died"], second["died"])
print(f"log-rank: p = {test.p_value:.2g}")

# %% Cox: the hazard against the size of large nuclei, per standard deviation, and age, per decade
size = table["nuclei_area_um2_p95"]
covariates = pandas.DataFrame(
    {
        "nuclear size": (size - size.mean()) / size.std(),
        "age": (table["age"] - table["age"].mean()) / 10,
        "months": table["months"],
        "died": table["died"],
    }
)
cox = CoxPHFitter().fit(covariates, "months", "died")
for name, row in cox.summary.iterrows():
    low, high = row["exp(coef) lower 95%"], row["exp(coef) upper 95%"]
    print(f"Cox, {name}: hazard ratio {row['exp(coef)']:.2f} ({low:.2f}–{high:.2f}), p = {row['p']:.2g}")
print(f"Cox: concordance {cox.concordance_index_:.2f}")
