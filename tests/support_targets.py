"""What is fuzzed: every reader of files that others make."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from support_fuzz import Target
from support_fuzz_models import make_checkpoints, read_checkpoint, spoil_checkpoint, use_checkpoint
from support_fuzz_slides import make_headers, make_slides, read_header, read_slide, spoil_header, spoil_slide
from support_mutation import TEXTS, pick, spoil_bytes, spoil_folder, spoil_json_text, spoil_table

REFUSED_BY_MODELS = ("WsiError", "HeadError", "PromptError", "ScaleAttentionError", "NucleiNetError")
"""Errors of the package of models, which knows nothing of the engine's; the engine turns them into its own."""


# ---- tables ----

TABLES = {
    "cohort.csv": (
        "slide_id,slide,patient,subtype,mpp\ns1,a/s1.svs,p1,tumour,0.25\ns2,b/s2.svs,p2,normal,\n"
        "s3,c.svs,p2,tumour,0.5\n"
    ),
    "slides.csv": 'slide,slide_id,mpp\ns1.svs,one,0.25\n"a, b.svs",two,\ns3://x/y.svs,,0.5\n',
    "folds.csv": (
        "fold,slide_id,patient,label,prediction,prob_a,prob_b\n0,s1,p1,a,a,0.75,0.25\n1,s2,p2,b,a,0.5,0.5\n"
        "1,s3,p3,,b,0.1,0.9\n"
    ),
    "ensemble.csv": (
        "slide_id,prediction,prob_a,prob_b,entropy,disagreement\ns1,a,0.75,0.25,0.1,0.1\ns2,b,0.25,0.75,0.2,0\n"
    ),
}


PARQUET = "cohort.parquet"

COLUMNS: tuple[list[Any], ...] = (
    [[1, 2], [3], []], [["a"], None, ["b", "c"]], [{"a": 1}, {"a": None}, None], [b"\xff", b"", None], [None] * 3,
    [True, None, False], [float("nan"), 1e300, float("-inf")], [1, 2, 1 << 62], [date(1970, 1, 1), None, date.max],
    [Decimal("0.5"), None, Decimal("-1")], ["s1", "s1", "s2"], [0.25, None, 0.5],
)  # fmt: skip
"""Columns of three cells that a CSV cannot have, and some that it can."""


def spoil_any_table(sound: Any, place: Path, rng: np.random.Generator) -> Path:
    """One of the tables, spoiled."""
    name = pick(rng, [PARQUET, *sorted(TABLES)])
    path: Path = place / name
    if name == PARQUET:
        path.write_bytes(spoil_parquet(rng))
    else:
        path.write_bytes(spoil_table(TABLES[name], rng))
    return path


def spoil_parquet(rng: np.random.Generator) -> bytes:
    """A cohort in Parquet with odd columns, and an index that may have a name."""
    import pandas

    columns: dict[str, list[Any]] = {"slide_id": ["s1", "s2", "s3"], "slide": ["a.svs", None, "s3://x/c.svs"]}
    columns |= {"patient": ["p1", "p2", "p2"], "subtype": ["tumour", "normal", None], "mpp": [0.25, None, 0.5]}
    for _ in range(int(rng.integers(0, 4))):
        name = pick(rng, [*columns, *TEXTS])
        columns[name] = pick(rng, COLUMNS) if rng.random() < 0.6 else [pick(rng, TEXTS) for _ in range(3)]
    frame = pandas.DataFrame(columns).drop(columns=[pick(rng, list(columns))] if rng.random() < 0.2 else [])
    if rng.random() < 0.4:
        frame = frame.set_index(pick(rng, list(frame)), drop=bool(rng.integers(2)))
    data: bytes = frame.head(int(rng.integers(4))).to_parquet()
    return spoil_bytes(data, rng) if rng.random() < 0.3 else data


def read_table(given: Path, place: Path) -> None:
    """Every reader of tables."""
    from wsi_engine.cohorts.roster import Roster
    from wsi_engine.evaluation.cases import gather_cases
    from wsi_engine.inputs import find_slides
    from wsi_engine.predictions import PredictionTable

    (place / "truth.csv").write_text("slide_id,patient,kind\ns1,p1,a\ns2,p2,b\ns3,p3,b\n")
    if given.name == "slides.csv":
        find_slides([given])
    elif given.name == PARQUET:
        Roster.read(given).column("subtype")
    elif given.name == "cohort.csv":
        roster = Roster.read(given)
        roster.column("subtype")
        find_slides([given])
    elif given.name == "folds.csv":
        PredictionTable.read(given)
        gather_cases(given)
    else:
        gather_cases(given, place / "truth.csv", "kind")


# ---- stores and formats of others ----


def make_formats(folder: Path) -> dict[str, Path]:
    """A store with everything in it, and what is exported of it."""
    from support_formats import make_full_store

    from wsi_engine.formats.anndata import export_anndata
    from wsi_engine.formats.clam import export_clam
    from wsi_engine.formats.spatialdata import export_spatialdata
    from wsi_engine.formats.stamp import export_stamp
    from wsi_engine.formats.trident import export_trident
    from wsi_engine.store import FeatureStore
    from wsi_engine.tissue import FilterCount, TissueMask

    if not (folder / "s1.zarr").exists():
        store = make_full_store(folder / "s1.zarr")
        mask = TissueMask(np.eye(30, dtype=bool), 8.0, 0.1, (FilterCount("start", 1, 1, 1, 1),))
        FeatureStore.create(store.path, store.slide).write_grid("256px_1mpp", store.grid(), {}, mask)
        shutil.rmtree(folder / "s1.zarr/tiles/256px_1mpp")
        for write in (export_trident, export_clam, export_stamp, export_anndata, export_spatialdata):
            write(store, folder / write.__name__)  # type: ignore[operator]
    return {path.name: path for path in folder.iterdir()}


def spoil_store(sound: dict[str, Path], place: Path, rng: np.random.Generator) -> Path:
    """A spoiled store."""
    spoil_folder(sound["s1.zarr"], place / "s1.zarr", rng)
    return place / "s1.zarr"


def read_store(given: Path, place: Path) -> None:
    """Everything that is read of a store; each part may be refused by itself."""
    from wsi_engine.bags import StoredBags
    from wsi_engine.cohorts.inventory import survey_store
    from wsi_engine.errors import WsiError
    from wsi_engine.formats.trident import export_trident
    from wsi_engine.nuclei.keeping import read_nuclei, stored_nuclei
    from wsi_engine.store import FeatureStore, stored_precision

    refused: list[WsiError] = []

    def attempt(read: Callable[[], Any]) -> None:
        try:
            read()
        except WsiError as error:
            refused.append(error)

    stored_precision(place, "uni")
    attempt(lambda: survey_store(given))
    store = FeatureStore.open(given)
    for part in ("grids", "encoders", "grid", "tile_scale", "origins", "tissue", "features", "provenance", "runs"):
        attempt(getattr(store, part))
    attempt(lambda: store.slide)
    attempt(lambda: store.features("uni"))
    for run in ("one", "two"):
        attempt(lambda run=run: (store.attention(run), store.attention_record(run)))  # type: ignore[misc]
    attempt(lambda: stored_nuclei(store))
    attempt(lambda: read_nuclei(store).summary())
    attempt(lambda: StoredBags([given]).load(0))
    attempt(lambda: export_trident(store, place / "out"))
    if refused:
        raise refused[0]


FOREIGN = ("trident", "clam", "stamp", "anndata", "spatialdata")


def spoil_foreign(sound: dict[str, Path], place: Path, rng: np.random.Generator) -> tuple[str, Path]:
    """One of the other tools' folders, with spoiled files."""
    kind = pick(rng, FOREIGN)
    source = sound[f"export_{kind}"]
    target = place / "foreign"
    if kind in ("anndata", "spatialdata"):
        target.mkdir()
        spoil_folder(source / "s1.zarr", target / "s1.zarr", rng)
        return kind, target
    shutil.copytree(source, target)
    path = pick(rng, sorted(entry for entry in target.rglob("*") if entry.is_file()))
    path.write_bytes(spoil_bytes(path.read_bytes(), rng, near=pick(rng, (100, 2000, None))))
    return kind, target


def read_foreign(given: tuple[str, Path], place: Path) -> None:
    """Import them."""
    from wsi_engine.formats.anndata import import_anndata
    from wsi_engine.formats.clam import import_clam
    from wsi_engine.formats.spatialdata import import_spatialdata
    from wsi_engine.formats.stamp import import_stamp
    from wsi_engine.formats.trident import import_trident

    kind, folder = given
    out = place / "out"
    if kind == "trident":
        import_trident(next(folder.iterdir()), out)
    elif kind == "clam":
        if (folder / "pt_files").stat().st_ino % 2:
            shutil.rmtree(folder / "h5_files")
        import_clam(folder, out, "uni", 0.25)
    elif kind == "stamp":
        import_stamp(folder, out, slide_mpp=0.25)
    elif kind == "anndata":
        import_anndata(folder, out)
    else:
        import_spatialdata(folder, out)


def make_run_folder(folder: Path) -> Path:
    """A finished training run."""
    from support_runs import make_origin, make_run

    return make_run(folder / "run", make_origin(8), "mean", temperatures=(1.0, 2.0))


def spoil_run(sound: Path, place: Path, rng: np.random.Generator) -> Path:
    """The run with a changed record."""
    shutil.copytree(sound, place / "run")
    record = place / "run/run.json"
    record.write_bytes(spoil_json_text(record.read_bytes(), rng))
    return place / "run"


def read_run(given: Path, place: Path) -> None:
    """Load its heads."""
    from wsi_engine.classification.ensemble import load_ensemble

    load_ensemble(given, device="cpu")


TARGETS: dict[str, Target] = {
    "slides": Target(make_slides, spoil_slide, read_slide),
    "tiles": Target(make_headers, spoil_header, read_header),
    "models": Target(make_checkpoints, spoil_checkpoint, read_checkpoint, REFUSED_BY_MODELS),
    "checkpoints": Target(make_checkpoints, spoil_checkpoint, use_checkpoint),
    "runs": Target(make_run_folder, spoil_run, read_run),
    "tables": Target(lambda folder: None, spoil_any_table, read_table),
    "stores": Target(make_formats, spoil_store, read_store),
    "formats": Target(make_formats, spoil_foreign, read_foreign),
}
COUNTS = {
    "slides": 10_000, "tiles": 5_000, "models": 1_000, "checkpoints": 1_000, "runs": 500, "tables": 4_000,
    "stores": 1_000, "formats": 1_000,
}  # fmt: skip
