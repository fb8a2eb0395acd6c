"""What is wrong with a cohort: all of it, found before training, in one report."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from wsi_engine.cohorts.audit import TrainingSet, prepare_training_set
from wsi_engine.cohorts.findings import Problem, count, list_some
from wsi_engine.cohorts.inventory import survey_store, survey_stores
from wsi_engine.cohorts.roster import Roster
from wsi_engine.cohorts.splits import SplitSettings
from wsi_engine.encoders.base import EncoderCard
from wsi_engine.errors import InputError
from wsi_engine.grid import TileGrid
from wsi_engine.runs import FeatureOrigin
from wsi_engine.slide_record import SlideRecord
from wsi_engine.store import FeatureStore
from wsi_engine.writer import FeatureIdentity, FeatureWriter, write_features

CARD = EncoderCard("net", "timm", "resnet", 224, 4, "mean", "open", weights="random:0", weights_digest="d" * 64)
OTHER = EncoderCard("timm:a/b", "timm", "vit", 224, 6, "cls", "open", weights="random:0", weights_digest="e" * 64)


def make_grid(tiles: int, mpp: float = 0.5, stride_px: int = 256) -> TileGrid:
    origins = np.stack([np.arange(tiles) * 512, np.zeros(tiles, int)], axis=1).astype(np.int64)
    return TileGrid(origins, 256, stride_px, mpp, (512.0, 512.0), tiles + 3)


def write_store(
    path: Path, tiles: int = 7, cards: Sequence[EncoderCard] = (CARD,), mpp: float = 0.5, stride_px: int = 256
) -> None:
    """A real store, with features of each card."""
    store = FeatureStore.create(path, SlideRecord(path.stem, "f" * 64, (9, 9), (0.25, 0.25), "x", "x", "turbo"))
    grid = make_grid(tiles, mpp, stride_px)
    store.write_grid("g", grid, {"mpp": mpp}, None)
    for card in cards:
        values = np.zeros((tiles, card.dim), np.float16)
        write_features(store, FeatureIdentity(card, "g", grid, "fp32", "float16"), values, {})


def edit(node: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the attributes of a group or array."""
    value = json.loads((node / "zarr.json").read_text())
    change(value["attributes"])
    (node / "zarr.json").write_text(json.dumps(value))


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of every kind, to be copied: writing one takes longer."""
    folder = tmp_path_factory.mktemp("templates")
    write_store(folder / "good.zarr")
    write_store(folder / "empty.zarr", tiles=0)
    write_store(folder / "other.zarr", cards=[OTHER])
    write_store(folder / "both.zarr", cards=[CARD, OTHER])
    write_store(folder / "coarse.zarr", mpp=1.0)
    write_store(folder / "overlap.zarr", stride_px=128)
    write_store(folder / "none.zarr", cards=[])
    shutil.copytree(folder / "good.zarr", folder / "partial.zarr")
    store, grid = FeatureStore.open(folder / "none.zarr"), make_grid(7)
    shutil.rmtree(folder / "partial.zarr/features")
    store = FeatureStore.create(folder / "partial.zarr", store.slide)
    writer = FeatureWriter(store, FeatureIdentity(CARD, "g", grid, "fp32", "float16"), 4)
    writer.add(np.arange(4), np.zeros((4, 4), np.float32))
    shutil.copytree(folder / "good.zarr", folder / "retrained.zarr")
    edit(folder / "retrained.zarr/features/net/values", lambda attrs: attrs["encoder"].update(weights_digest="9" * 64))
    shutil.copytree(folder / "good.zarr", folder / "half.zarr")
    edit(folder / "half.zarr/features/net/values", lambda attrs: attrs.update(precision="bf16"))
    shutil.copytree(folder / "good.zarr", folder / "torn.zarr")
    (folder / "torn.zarr/tiles/g/origins/zarr.json").write_text("{")
    shutil.copytree(folder / "good.zarr", folder / "newer.zarr")
    edit(folder / "newer.zarr", lambda attrs: attrs.update(schema_version=9))
    return folder


class Clinic:
    """A cohort under construction: rows, and a folder of stores."""

    def __init__(self, templates: Path, features: Path) -> None:
        self._templates = templates
        self.features = features
        self.rows: list[dict[str, str]] = []
        features.mkdir()

    def add(self, slide_id: str, kind: str | None = "good", fingerprint: str | None = None, **values: str) -> None:
        self.rows.append({"slide_id": slide_id, "patient": f"p-{slide_id}", **values})
        store = self.features / f"{slide_id}.zarr"
        if kind is not None and not store.exists():
            shutil.copytree(self._templates / f"{kind}.zarr", store)
            edit(store, lambda attrs: attrs["slide"].update(fingerprint=fingerprint or slide_id))

    def fill(self, numbers: dict[str, int], **values: str) -> None:
        """So many good slides with each label."""
        for label, number in numbers.items():
            for at in range(number):
                self.add(f"{label}{at}", label=label, **values)

    def prepare(self, splits: SplitSettings | None = None, encoder: str | None = None) -> TrainingSet:
        return prepare_training_set(self.rows, self.features, "label", encoder, splits)

    def report(self, splits: SplitSettings | None = None, encoder: str | None = None) -> str:
        with pytest.raises(InputError) as caught:
            self.prepare(splits, encoder)
        return str(caught.value)


@pytest.fixture
def clinic(templates: Path, tmp_path: Path) -> Clinic:
    return Clinic(templates, tmp_path / "features")


def test_a_good_cohort(clinic: Clinic) -> None:
    clinic.fill({"b": 6, "a": 5})
    got = clinic.prepare(SplitSettings())
    assert got.classes == ("a", "b")
    assert got.labels.tolist() == [1] * 6 + [0] * 5
    assert got.labels.dtype == np.int64
    assert [row.slide_id for row in got.roster] == [row["slide_id"] for row in clinic.rows]
    assert got.stores == tuple(clinic.features / f"{row.slide_id}.zarr" for row in got.roster)
    assert got.origin == FeatureOrigin.of(FeatureStore.open(got.stores[0]))
    assert got.warnings == ()


def test_whole_numbers_are_sorted_as_numbers(clinic: Clinic) -> None:
    clinic.fill({"10": 2, "9": 2, "-1": 2})
    assert clinic.prepare().classes == ("-1", "9", "10")
    clinic.fill({"x": 2})
    assert clinic.prepare().classes == ("-1", "10", "9", "x")


def test_what_cannot_be_used_is_left_out(clinic: Clinic) -> None:
    clinic.fill({"a": 5, "b": 5})
    clinic.add("unlabelled", None, label="")
    clinic.add("blank", "empty", label="a")
    got = clinic.prepare(SplitSettings())
    assert len(got.roster) == len(got.stores) == len(got.labels) == 10
    assert got.warnings == (
        '1 slide left out, for want of a "label" (unlabelled)',
        "1 slide left out, for want of a tile (blank)",
    )


def test_all_problems_come_at_once(clinic: Clinic) -> None:
    clinic.fill({"a": 8, "b": 3})
    clinic.add("lost", None, label="a")
    clinic.add("begun", "partial", label="a")
    clinic.add("foreign", "other", label="b")
    clinic.add("a0", label="a")
    clinic.add("rotten", "torn", label="a")
    clinic.add("future", "newer", label="a")
    clinic.add("wide", "coarse", label="a")
    lines = clinic.report(SplitSettings(), encoder="net").splitlines()
    cure = f"run wsi extract SLIDES -o {clinic.features} --encoder net"
    assert lines[0] == "the cohort cannot be trained on, 7 problems found:"
    assert lines[1:3] == [
        "- 1 slide named more than once: keep one row for each slide",
        "    a0: the cohort, row 1; the cohort, row 15",
    ]
    assert lines[3:5] == [f"- 1 slide without a store: {cure}", "    lost"]
    assert lines[5:7] == [f"- 1 slide whose features are not complete: {cure}", "    begun"]
    assert lines[7:9] == [f"- 1 slide without features of net: {cure}", "    foreign (there: timm_a_b)"]
    assert lines[9] == "- 2 slides whose store cannot be used: extract them again, into another folder"
    assert lines[10].startswith("    rotten: is damaged (JSONDecodeError")
    assert lines[11] == "    future: has schema version 9, this engine uses 1"
    assert lines[12] == "- the features are of 2 kinds: extract all slides with the same weights at the same scale"
    # 8 + 3 good slides, and the one that is there twice
    made = "net, 4 numbers per tile, weights dddddddddddd…, tiles of 256 px"
    assert lines[13] == f"    12 slides: {made} at 0.5 mpp (a0, a1, a2 and 9 more)"
    assert lines[14] == f"    1 slide: {made} at 1.0 mpp (wide)"
    assert lines[15] == ('- class "b" has 4 patients, fewer than the 5 folds: take fewer folds, or leave the class out')
    assert len(lines) == 16


def test_ids_that_differ_in_case_alone_are_one_slide(clinic: Clinic) -> None:
    clinic.fill({"a": 2, "b": 2})
    clinic.add("A0", label="a")
    report = clinic.report()
    assert (
        "- 1 slide named more than once: keep one row for each slide\n    a0: the cohort, row 1; the cohort, row 5"
        in report
    )


def test_many_examples_are_cut(clinic: Clinic) -> None:
    clinic.fill({"a": 2, "b": 2})
    for at in range(23):
        clinic.add(f"lost{at:02}", None, label="a")
    lines = clinic.report().splitlines()
    assert lines[1].startswith("- 23 slides without a store")
    assert lines[2:22] == [f"    lost{at:02}" for at in range(20)]
    assert lines[22:] == ["    and 3 more"]


def test_a_missing_column_does_not_hide_the_rest(clinic: Clinic) -> None:
    clinic.fill({"a": 2, "b": 2})
    clinic.add("lost", None, label="a")
    with pytest.raises(InputError) as caught:
        prepare_training_set(clinic.rows, clinic.features, "grade")
    message = str(caught.value)
    assert 'the cohort has no column "grade" (its columns: slide_id, patient, label)' in message
    assert "1 slide without a store" in message
    by_site, by_column = SplitSettings(folds=2, by_site=True), SplitSettings("column", column="part")
    assert 'no column "site"' in clinic.report(by_site)
    assert 'no column "part"' in clinic.report(by_column)


def test_encoders(clinic: Clinic) -> None:
    clinic.fill({"a": 2, "b": 2})
    clinic.add("c", "other", label="a")
    assert re.search(
        r"- the encoders are mixed: extract all slides with one of them\n    net: 4 slides\n    timm_a_b: 1 slide$",
        clinic.report(),
    )
    clinic.add("d", "both", label="a")
    assert re.search(
        r"- the stores hold features of several encoders: name one with --encoder\n    net: 5 slides\n"
        r"    timm_a_b: 2 slides$",
        clinic.report(),
    )
    assert "5 slides" not in clinic.report(encoder="timm:a/b")
    assert "- 4 slides without features of timm_a_b: run wsi extract" in clinic.report(encoder="timm:a/b")
    clinic.rows = [row for row in clinic.rows if row["slide_id"] != "c"]
    assert clinic.prepare(encoder="net").origin.dim == 4
    clinic.rows = [row | {"label": "ab"[at]} for at, row in enumerate(clinic.rows[-1:])]
    clinic.add("c", label="b")
    assert clinic.prepare(encoder="timm:a/b").origin.encoder == "timm:a/b"


def test_weights_and_scales(clinic: Clinic) -> None:
    clinic.fill({"a": 2, "b": 2})
    clinic.add("c", "retrained", label="a")
    assert "1 slide: net, 4 numbers per tile, weights 999999999999…" in clinic.report()
    clinic.rows[-1]["label"] = ""
    clinic.add("d", "half", label="a")
    clinic.add("e", "overlap", label="b")
    got = clinic.prepare()  # precision and stride may differ
    assert got.origin.precision == "fp32"
    assert got.origin.stride_px == 256
    assert got.warnings[1:] == (
        "the features differ in their precision (fp32: 5 slides; bf16: 1 slide)",
        "the features differ in their stride_px (256: 5 slides; 128: 1 slide)",
    )


def test_nothing_is_there(clinic: Clinic, tmp_path: Path) -> None:
    clinic.fill({"a": 2, "b": 2})
    missing = tmp_path / "nowhere"
    with pytest.raises(InputError, match=rf"there is no folder {missing}: run wsi extract SLIDES -o {missing}"):
        prepare_training_set(clinic.rows, missing, "label")
    for row in clinic.rows:
        shutil.rmtree(clinic.features / f"{row['slide_id']}.zarr")
    assert "- 4 slides without a store" in clinic.report()
    unlabelled = [row | {"label": ""} for row in clinic.rows]
    with pytest.raises(InputError, match='no slide has both a value of "label" and a tile'):
        prepare_training_set(unlabelled, clinic.features, "label")


def test_the_cure_names_the_cohort_where_it_names_slides(clinic: Clinic, tmp_path: Path) -> None:
    path = tmp_path / "cohort.csv"
    path.write_text("slide,label\nx/a.svs,1\n")
    with pytest.raises(InputError, match=rf"run wsi extract {path} -o {clinic.features}\n"):
        prepare_training_set(path, clinic.features, "label")


def test_one_class(clinic: Clinic) -> None:
    clinic.fill({"a": 6})
    for splits in (None, SplitSettings()):
        report = clinic.report(splits)
        assert report.count("all slides are of one class") == 1
        assert '"a": a head needs at least two' in report


def test_patients(clinic: Clinic) -> None:
    clinic.fill({"a": 11, "b": 1}, patient="")
    for row in clinic.rows[:3]:
        row["patient"] = "ann"
    clinic.rows[11]["patient"] = "ann"
    got = clinic.prepare()
    assert got.warnings == (
        "8 slides without a patient, each taken for one (a3; a4; a5 and 5 more)",
        'the classes are uneven: "a" has 11 slides and "b" 1',
        "1 patient with slides of several classes, each split as one of the rarest (ann: a, b)",
    )
    for row in clinic.rows:
        del row["patient"]
    assert clinic.prepare().warnings[0].startswith('the cohort has no column "patient", so each slide is taken')
    clinic.rows.pop(0)
    assert len(clinic.prepare().warnings) == 1  # 10 to 1 is not worse than 10 to 1


def test_sites(clinic: Clinic) -> None:
    for at in range(12):
        clinic.add(f"s{at}", label="ab"[at % 2], site=f"site{at // 4}")
    splits = SplitSettings(folds=3, by_site=True)
    assert clinic.prepare(splits).warnings == ()
    clinic.rows[1]["patient"] = clinic.rows[11]["patient"]
    assert "- 1 patient at several sites: give each one site" in clinic.report(splits)
    assert clinic.prepare(SplitSettings(folds=2)).warnings == ("1 patient at several sites (p-s11: site0, site2)",)
    clinic.rows[1]["patient"] = ""
    clinic.rows[1]["site"] = ""
    assert "- 1 patient without a site: fill in the site\n    s1" in clinic.report(splits)
    clinic.rows[1]["site"] = "site0"
    for row in clinic.rows:
        row["label"] = "b" if row["site"] == "site0" else "a"
    assert re.search(r'- fold \d has no slide of class "b" to train on', clinic.report(splits))


def test_a_column_of_parts(clinic: Clinic) -> None:
    for at, part in enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 2 + [""]):
        clinic.add(f"s{at}", label="ab"[at % 2], split=part)
    splits = SplitSettings("column")
    assert clinic.prepare(splits).warnings == ('1 slide in no part, for want of a "split" (s8)',)
    clinic.rows[5]["label"] = "a"
    for row in clinic.rows[6:8]:
        row["split"] = "train"
    assert clinic.prepare(splits).warnings[1:] == (
        "1 fold without a slide of some class to test on (fold 0: a, b)",
        "1 fold without a slide of some class to validate on (fold 0: b)",
    )
    clinic.rows[4]["patient"] = clinic.rows[0]["patient"]
    assert '- 1 patient in several parts of column "split"' in clinic.report(splits)


def test_one_slide_under_two_names(clinic: Clinic) -> None:
    clinic.fill({"a": 2, "b": 2})
    clinic.add("copy", label="a", fingerprint="a0")
    report = clinic.report()
    assert "- 1 slide there more than once, as slides of several patients: keep one of each\n    a0, copy" in report
    clinic.rows[-1]["patient"] = "p-a0"
    assert clinic.prepare().warnings == (
        "1 slide there more than once, as slides of one patient (a0, copy): keep one of each",
    )
    edit(clinic.features / "a0.zarr", lambda attrs: attrs["slide"].update(fingerprint=""))
    edit(clinic.features / "a1.zarr", lambda attrs: attrs["slide"].update(fingerprint=""))
    assert clinic.prepare().warnings == ()  # an import does not know its slides


def test_a_roster_goes_in(clinic: Clinic) -> None:
    clinic.fill({"a": 2, "b": 2})
    roster = Roster.read(clinic.rows)
    assert prepare_training_set(roster, str(clinic.features), "label").roster == roster


@pytest.mark.parametrize("kind", ["good", "empty", "both", "coarse", "overlap", "half"])
def test_a_survey_agrees_with_the_store(templates: Path, kind: str) -> None:
    store = FeatureStore.open(templates / f"{kind}.zarr")
    facts = survey_store(templates / f"{kind}.zarr")
    assert (facts.fault, facts.fingerprint) == ("", store.slide.fingerprint)
    assert tuple(facts.complete) == store.encoders()
    for key, features in facts.complete.items():
        assert features.origin == FeatureOrigin.of(store, key)
        assert features.tiles == len(store.features(key))


def test_a_survey_of_stores_that_are_no_good(templates: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.zarr").mkdir()
    zarr.create_group(tmp_path / "strange.zarr", zarr_format=3)
    shutil.copytree(templates / "good.zarr", tmp_path / "gridless.zarr")
    shutil.rmtree(tmp_path / "gridless.zarr/tiles")
    names = ("absent", "folder", "strange", "gridless")
    facts = survey_stores([tmp_path / f"{name}.zarr" for name in names])
    assert [fact.exists for fact in facts] == [False, True, True, True]
    assert facts[1].fault == "lacks zarr.json"
    assert facts[2].fault.startswith("is damaged (KeyError: 'schema_version'")
    assert facts[3].fault == "lacks tiles/g/origins/zarr.json"
    shutil.copytree(templates / "good.zarr", tmp_path / "unmarked.zarr")
    edit(tmp_path / "unmarked.zarr/features/net/values", lambda attrs: attrs.update(complete=False))
    assert FeatureStore.open(tmp_path / "unmarked.zarr").encoders() == ()
    assert survey_store(tmp_path / "unmarked.zarr").partial == ("net",)
    begun = survey_store(templates / "partial.zarr")
    assert (dict(begun.complete), begun.partial, begun.fault) == ({}, ("net",), "")


def test_words() -> None:
    assert [count(1, "slide"), count(2, "slide"), count(2000, "class")] == ["1 slide", "2 slides", "2,000 classes"]
    assert list_some(["a", "b", "c"], 2) == "a, b and 1 more"
    assert str(Problem("x is wrong", ("a", "b", "c", "d"), "mend it")) == "x is wrong (a; b; c and 1 more): mend it"
    assert str(Problem("x is wrong")) == "x is wrong"
