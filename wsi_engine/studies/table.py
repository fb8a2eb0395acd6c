"""A cohort's clinical columns joined to what the engine found on its slides."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wsi_engine.cohorts.findings import list_some
from wsi_engine.cohorts.frames import load_pandas, to_frame
from wsi_engine.cohorts.inventory import read_node, survey_stores
from wsi_engine.cohorts.roster import Roster
from wsi_engine.errors import InputError, SettingsError
from wsi_engine.nuclei.keeping import stored_nuclei, summarise_nuclei
from wsi_engine.places import Place, as_place
from wsi_engine.predictions import SHARE
from wsi_engine.store import FeatureStore, features_key
from wsi_engine.studies.places import find_run
from wsi_engine.studies.predictions import PREDICTION, gather_predictions

if TYPE_CHECKING:
    import pandas

_THREADS = 8

_SLIDES = "slides"
"""Column that counts the slides of a patient."""

_SUMMED = ("tiles", "tissue_mm2", "nuclei_count", "nuclei_tissue_mm2")
"""Columns that add up over the slides of a patient; other numbers are averaged."""

Row = dict[str, Any]


def make_table(
    roster: Roster,
    out: Path,
    by: Literal["slide", "patient"] = "slide",
    *,
    run: str | os.PathLike[str] | None = None,
    nuclei: str | None = None,
    encoder: str | None = None,
    stores: str | os.PathLike[str] | None = None,
) -> pandas.DataFrame:
    """The cohort's columns joined to the results of every slide; what a slide does not have is NaN or None.

    Columns, after those of the cohort (numbers where all values are numbers):

    - ``tiles``, ``tissue_mm2``: tiles that have features, and area of the tissue found.
    - ``prediction``, ``prob_<class>`` …, ``entropy`` (0 certain, 1 no idea), ``disagreement`` and ``prediction_from``:
      what a run says of the slide. Of slides that it was trained on this is what the folds that did *not* see them
      say (``held out``); of others, what ``classify`` wrote (``unseen``); only where there is nothing else is it what
      an ensemble says of a slide that it learned from (``seen in training``), which is not to be trusted.
    - ``nuclei_count``, ``nuclei_per_mm2``, ``nuclei_area_share``, ``nuclei_tissue_mm2``, and for every measurement
      (area, eccentricity, solidity, haematoxylin …) ``nuclei_<measurement>_<statistic>`` with mean, sd, median, p5,
      p25, p75, p95 over the nuclei of the slide.

    By patient, areas and counts are summed, densities taken of the sums, other numbers averaged over slides, and texts
    kept where all slides of the patient say the same; ``slides`` counts them.

    Args:
        roster: the cohort.
        out: folder of the results.
        by: what a row is of.
        run: whose predictions; None for the only run there is.
        nuclei: whose nuclei, by method; None for the only ones there are.
        encoder: whose tiles are counted; None for the only encoder there is.
        stores: folder of the stores, or its URL, where it is not ``out``.

    Raises:
        InputError: there are several runs, methods or encoders and none was named, the one named is not there, or a
            column of the cohort has the name of a result.
        SettingsError: pandas is not installed, or ``by`` is neither slide nor patient.
        StoreError, ModelError: results cannot be read.
    """
    if by not in ("slide", "patient"):
        raise SettingsError(f'a table is by "slide" or by "patient", not by {by!r}')
    pandas = load_pandas()
    clinical = to_frame(roster)
    there = _find_stores(roster, out if stores is None else as_place(stores))
    parts = [_gather_tiles(roster, there, encoder)]
    place = find_run(out, run)
    if place is not None:
        parts.append(gather_predictions(roster, out, place))
    parts.append(_gather_nuclei(roster, there, nuclei))
    columns = list(dict.fromkeys(name for part in parts for row in part.values() for name in row))
    results_named = columns if by == "slide" else [_SLIDES, *columns]
    taken = [name for name in results_named if name in clinical.columns]
    if taken:
        raise InputError(
            f"{roster.source} has columns that are named like results ({', '.join(taken)}): rename them there"
        )
    rows = [{name: value for part in parts for name, value in part.get(one, {}).items()} for one in clinical.slide_id]
    results = pandas.DataFrame(rows, index=clinical.index, columns=columns).infer_objects()
    table = pandas.concat([clinical, results], axis=1)
    return table if by == "slide" else _group(table, list(clinical.columns))


def _find_stores(roster: Roster, out: Place) -> dict[str, Place]:
    """The stores that are there, by slide."""
    named = {row.slide_id: out / f"{row.slide_id}.zarr" for row in roster}
    return {slide_id: path for slide_id, path in named.items() if path.is_dir()}


def _gather_tiles(roster: Roster, stores: Mapping[str, Place], encoder: str | None) -> dict[str, Row]:
    """Tiles and tissue of every slide that has complete features."""
    facts = dict(zip(stores, survey_stores(list(stores.values())), strict=True))
    encoders = sorted({key for fact in facts.values() for key in fact.complete})
    key = _only("encoder", "encoders", encoders, encoder and features_key(encoder), roster)
    if key is None:
        return {}

    def gather(slide_id: str) -> Row:
        features = facts[slide_id].complete.get(key)
        if features is None:
            return {}
        return {"tiles": features.tiles, "tissue_mm2": _measure_tissue(stores[slide_id])}

    return _over(gather, list(stores))


def _measure_tissue(store: Place) -> float | None:
    """Area of a store's tissue in mm²; None where every tile was kept. Mostly told by the attributes alone."""
    try:
        attrs = read_node(store / "tissue" / "mask")["attributes"]
        return float(attrs["counts"][-1]["pixels_after"] * attrs["mpp"] ** 2 / 1e6)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # a mask that was given has no counts
        tissue = FeatureStore.open(store).tissue()
        return None if tissue is None else tissue.area_mm2


def _gather_nuclei(roster: Roster, stores: Mapping[str, Place], method: str | None) -> dict[str, Row]:
    """Statistics of the nuclei of every slide that has any by the method."""
    methods = _over(lambda one: stored_nuclei(FeatureStore.open(stores[one])), list(stores))
    there = sorted({name for names in methods.values() for name in names})
    key = _only("method", "methods of nuclei", there, method and features_key(method), roster)
    if key is None:
        return {}

    def gather(slide_id: str) -> Row:
        return _flatten(summarise_nuclei(FeatureStore.open(stores[slide_id]), key)) if key in methods[slide_id] else {}

    return _over(gather, list(stores))


def _flatten(summary: Mapping[str, Any]) -> Row:
    """A summary of nuclei as columns."""
    row: Row = {
        "nuclei_count": summary["nuclei"],
        "nuclei_per_mm2": summary["nuclei_per_mm2"],
        "nuclei_area_share": summary["nuclear_area_share"],
        "nuclei_tissue_mm2": summary["tissue_mm2"],
    }
    for name, statistics in summary["distributions"].items():
        row |= {f"nuclei_{name}_{statistic}": value for statistic, value in statistics.items()}
    return row


def _only(one: str, many: str, there: Sequence[str], wanted: str | None, roster: Roster) -> str | None:
    """What is wanted, or the only one there is; None where nothing is there."""
    if wanted is not None and wanted not in there:
        raise InputError(f"no slide of {roster.source} has results of the {one} {wanted} (there: {list_some(there)})")
    if wanted is None and len(there) > 1:
        raise InputError(f"the slides of {roster.source} have results of several {many} ({', '.join(there)}): name one")
    return wanted or (there[0] if there else None)


def _over(work: Callable[[str], Any], slide_ids: Sequence[str]) -> dict[str, Any]:
    """What the work makes of each slide, in threads: on a network's disk each file is a wait."""
    with ThreadPoolExecutor(_THREADS, "table") as pool:
        return dict(zip(slide_ids, pool.map(work, slide_ids), strict=True))


def _group(table: pandas.DataFrame, clinical: Sequence[str]) -> pandas.DataFrame:
    """A row for each patient, in the order in which they first come."""
    pandas = load_pandas()
    groups = table.groupby("patient", sort=False)
    columns: dict[str, Any] = {"patient": list(groups.groups), _SLIDES: groups.size().to_numpy()}
    for name in table.columns:
        if name in ("patient", "slide_id", "slide"):
            continue
        if name in clinical or not pandas.api.types.is_numeric_dtype(table[name]):
            columns[name] = groups[name].agg(_agreed).to_numpy()
        elif name in _SUMMED:
            columns[name] = groups[name].sum(min_count=1).to_numpy()
        else:
            columns[name] = groups[name].mean().to_numpy()
    if "nuclei_count" in columns:
        columns["nuclei_per_mm2"] = columns["nuclei_count"] / columns["nuclei_tissue_mm2"]
    shares = [name for name in columns if name.startswith(SHARE) and name not in clinical]
    patients = pandas.DataFrame(columns).infer_objects()
    if shares and PREDICTION in patients and PREDICTION not in clinical:
        told = patients[shares].notna().all(axis=1)
        best = patients.loc[told, shares].idxmax(axis=1).str.removeprefix(SHARE)
        patients[PREDICTION] = best.reindex(patients.index).astype(object).where(told, None)
    return patients


def _agreed(values: Any) -> Any:
    """The value that all slides of a patient have, None where they differ or nothing is known."""
    found = values.dropna().unique()
    return found[0] if len(found) == 1 else None
