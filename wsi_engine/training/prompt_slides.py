"""The slides of a cohort that is trained on from pixels: their grids, laid once, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from wsi_engine.cohorts.audit import Survey, TrainingSet, audit_cohort
from wsi_engine.cohorts.findings import Problem, count
from wsi_engine.cohorts.inventory import StoredFeatures, StoreFacts
from wsi_engine.cohorts.roster import Roster, RosterRow
from wsi_engine.cohorts.splits import SplitSettings
from wsi_engine.errors import InputError, WsiError
from wsi_engine.grid import TileGrid
from wsi_engine.inputs import SlideSource
from wsi_engine.jobs import ExtractSettings, open_store
from wsi_engine.runs import FeatureOrigin
from wsi_engine.slide import open_slide
from wsi_engine.slide_record import SlideRecord
from wsi_engine.store import FeatureStore
from wsi_engine.workers import usable_cores


@dataclass(frozen=True)
class SlideSet:
    """A cohort that can be trained on from its slides.

    Attributes:
        training: its rows, labels and classes; each slide has at least one tile.
        sources: the slides, in the order of the rows.
        grids: their tiles.
    """

    training: TrainingSet
    sources: tuple[SlideSource, ...]
    grids: tuple[TileGrid, ...]


def prepare_slide_set(
    roster: Roster,
    folder: Path,
    label: str,
    origin: FeatureOrigin,
    settings: ExtractSettings,
    splits: SplitSettings,
    slide_mpp: float | None = None,
) -> SlideSet:
    """Check a cohort and lay a grid over each of its slides, or take the one laid before from ``folder``.

    What can be seen without opening a slide is checked first. Slides without a label or a tile are left out with a
    warning.

    Args:
        roster: the cohort; it has a column ``slide``, and ``mpp`` where slides need one.
        folder: where the grids are kept, ``<folder>/<slide_id>.zarr``.
        label: the column to learn.
        origin: what the features will be.
        settings: how grids are laid and slides read.
        splits: how the cohort will be split.
        slide_mpp: micrometres per level-0 pixel of slides that have none of their own.

    Raises:
        InputError: the cohort cannot be trained on, or a slide cannot be read; the message lists everything.
    """

    def look(labelled: Roster, problems: list[Problem]) -> Survey:
        _find_sources(labelled, slide_mpp, problems)
        return [StoreFacts(folder) for _ in labelled], [StoredFeatures(origin, 1) for _ in labelled]

    def lay(labelled: Roster, problems: list[Problem]) -> Survey:
        return _lay_grids(_find_sources(labelled, slide_mpp, problems), folder, origin, settings, problems)

    audit_cohort(roster, label, look, splits)
    training = audit_cohort(roster, label, lay, splits)
    sources = _find_sources(training.roster, slide_mpp, [])
    grids = tuple(FeatureStore.open(path).grid(settings.grid.name) for path in training.stores)
    return SlideSet(training, tuple(sources), grids)


def _find_sources(roster: Roster, slide_mpp: float | None, problems: list[Problem]) -> list[SlideSource]:
    """The slides of the rows; rows without one, or with a scale that is no number, are a problem."""
    if "slide" not in roster.columns:
        columns = ", ".join(roster.columns)
        problems.append(Problem(f'no column "slide" (its columns: {columns})', cure="add the paths of the slides"))
        return []
    missing = tuple(row.where for row in roster if not row.slide)
    if missing:
        problems.append(Problem(f"{count(len(missing), 'row')} without a slide", missing, "fill in the path"))
    sources, wrong = [], []
    for row in roster:
        try:
            sources.append(SlideSource(row.slide or "", row.slide_id, _read_mpp(row) or slide_mpp))
        except ValueError:
            wrong.append(f'{row.where}: "{row.value("mpp")}"')
    if wrong:
        problems.append(
            Problem(f'{count(len(wrong), "row")} whose "mpp" is no number', tuple(wrong), "give micrometres per pixel")
        )
    return [] if missing or wrong else sources


def _read_mpp(row: RosterRow) -> float | None:
    given = row.value("mpp")
    return float(given) if given else None


def _lay_grids(
    sources: Sequence[SlideSource],
    folder: Path,
    origin: FeatureOrigin,
    settings: ExtractSettings,
    problems: list[Problem],
) -> Survey:
    """What :func:`audit_cohort` wants to know of each slide, with its grid in the store afterwards."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    workers = settings.workers or usable_cores()
    with ThreadPoolExecutor(workers, "grids") as pool, ThreadPoolExecutor(workers, "tissue") as inner:
        found = list(pool.map(lambda source: _lay_grid(source, folder, settings, inner), sources))
    facts: list[StoreFacts] = []
    stored: list[StoredFeatures | None] = []
    failed = []
    for source, (fact, tiles) in zip(sources, found, strict=True):
        facts.append(fact)
        stored.append(None if tiles is None else StoredFeatures(origin, tiles))
        if tiles is None:
            failed.append(f"{source.slide_id}: {fact.fault}")
    if failed:
        problems.append(
            Problem(f"{count(len(failed), 'slide')} that cannot be read", tuple(failed), "mend or leave out")
        )
    return facts, stored


def _lay_grid(
    source: SlideSource, folder: Path, settings: ExtractSettings, pool: ThreadPoolExecutor
) -> tuple[StoreFacts, int | None]:
    """One slide's store and number of tiles; None where it cannot be read, and the fault says why."""
    path = folder / f"{source.slide_id}.zarr"
    try:
        with open_slide(source.path, source.mpp, settings.reader) as slide:
            record = SlideRecord.of(slide, source.slide_id)
            _, grid = open_store(path, record, slide, settings, pool)
    except WsiError as error:
        return StoreFacts(path, exists=False, fault=str(error)), None
    return StoreFacts(path, fingerprint=record.fingerprint), len(grid)
