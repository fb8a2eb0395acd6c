"""A cohort as the unit of work: read, checked, extracted, trained on, classified, measured, and put in a table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, Unpack

from wsi_engine.cohorts.examination import CohortReport, examine_roster
from wsi_engine.cohorts.findings import count, list_some
from wsi_engine.cohorts.frames import to_frame
from wsi_engine.cohorts.opening import parse_scale
from wsi_engine.cohorts.roster import Roster, RosterRow, RosterSource
from wsi_engine.cohorts.states import CohortStatus, read_status
from wsi_engine.errors import InputError
from wsi_engine.inputs import SlideSource
from wsi_engine.places import Place, as_place
from wsi_engine.studies.places import STORES, find_run, place_predictions, place_run
from wsi_engine.studies.selection import Selection, choose_places

if TYPE_CHECKING:
    import pandas

    from wsi_engine.classification.outcomes import ClassifyReport
    from wsi_engine.encoders.base import Encoder
    from wsi_engine.extraction import ExtractReport
    from wsi_engine.nuclei.method import NucleiMethod
    from wsi_engine.nuclei.slides import NucleiReport
    from wsi_engine.studies.options import ClassifyOptions, ExtractOptions, NucleiOptions, TrainOptions
    from wsi_engine.training.report import TrainReport

    Folder = str | os.PathLike[str]


@dataclass(frozen=True)
class Cohort:
    """The slides of a study, and the folder where their results are kept.

    It remembers nothing that the disk does not say: made again from the same file, in another process or on another
    day, it knows as much. Long jobs are safe to kill and to call again.

    Attributes:
        roster: the rows that can be used.
        out: folder of the results: ``<slide_id>.zarr`` stores, ``runs/``, ``predictions/``.
        faults: what is wrong with rows that are left out.

    Example:
        >>> cohort = Cohort.read("cohort.csv")  # doctest: +SKIP
        >>> print(cohort.check())  # doctest: +SKIP
        >>> cohort.extract("texture")  # doctest: +SKIP
        >>> cohort.nuclei()  # doctest: +SKIP
        >>> table = cohort.table()  # doctest: +SKIP
    """

    roster: Roster
    out: Path
    faults: tuple[str, ...] = ()

    @classmethod
    def read(cls, source: RosterSource, root: Folder | None = None, out: Folder | None = None) -> Self:
        """Read a cohort.

        Columns that mean something: ``slide`` (path or URL), ``slide_id`` (name of its store; else from the path),
        ``patient``, ``site``, ``mpp`` (micrometres per level-0 pixel, where the slide's header has none or a wrong
        one), ``split`` (train, val, test). Any others are labels or clinical values.

        Args:
            source: a CSV in UTF-8 or its URL, a Parquet file, rows as mappings, a pandas data frame (an index with a
                name is a column of it), or a roster.
            root: folder that relative paths of slides start from; None for the file's own, or the working folder.
            out: folder of the results; None for ``wsi`` in the file's folder, or in ``root``; in the working folder
                where that is by URL.

        Raises:
            InputError: it cannot be read, is empty, or has no column that names slides. Rows that cannot be used are
                told by :meth:`check`.
            SettingsError: it is a Parquet file, and pandas or pyarrow is not installed.
        """
        faults: list[str] = []
        roster = Roster.read(source, root, faults)
        folder = as_place(source).parent if isinstance(source, str | os.PathLike) else as_place(root or "")
        beside = folder if isinstance(folder, Path) else Path()
        return cls(roster, beside / STORES if out is None else Path(out), tuple(faults))

    @classmethod
    def from_csv(cls, path: Folder, root: Folder | None = None, out: Folder | None = None) -> Self:
        """:meth:`read` of a file."""
        return cls.read(path, root, out)

    @property
    def slide_ids(self) -> tuple[str, ...]:
        """Names of the slides, in order."""
        return tuple(row.slide_id for row in self.roster)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return self.roster.columns

    def column(self, name: str) -> tuple[str | None, ...]:
        """What a column says of each slide, None where it is empty.

        Raises:
            InputError: there is no such column.
        """
        return self.roster.column(name)

    def frame(self) -> pandas.DataFrame:
        """The rows as a data frame; see :func:`~wsi_engine.cohorts.frames.to_frame`."""
        return to_frame(self.roster)

    def check(self, open_slides: bool = True) -> CohortReport:
        """Everything that can be seen to be wrong, in one report; it can be printed.

        Missing files, slides and files named twice, rows without a name or with one that would leave the folder,
        impossible scales, patients in several splits or at several sites; and, where slides are opened (in threads),
        those that cannot be read, and those whose picture is another one's.
        """
        return examine_roster(self.roster, self.faults, open_slides)

    def select(self, where: Selection) -> Self:
        """The cohort of some of the slides, with the same folder of results.

        Args:
            where: an expression of columns as for :meth:`pandas.DataFrame.query` (``"site == 'A' and age > 60"``), a
                function of a :class:`~wsi_engine.cohorts.roster.RosterRow`, or wanted values by column, one or several
                (``{"site": ["A", "B"], "split": "test"}``).

        Raises:
            InputError: a column is not there, the expression cannot be understood, or no slide is left.
            SettingsError: it is an expression, and pandas is not installed.
        """
        return replace(self, roster=self.roster.select(choose_places(self.roster, where)))

    def status(self, jobs: Iterable[str] = (), *, out: Folder | None = None) -> CohortStatus:
        """What is done, running, failed (and why) and pending of every slide, as the disk tells it.

        Args:
            jobs: what there should be, as ``features/resnet50``, ``attention/run`` or ``nuclei/stain``, beside what
                there is of any slide.
            out: folder of the stores, or its URL, where it is not the cohort's.

        Raises:
            InputError: the folder cannot be read.
        """
        return read_status(self._folder(out), self.roster, jobs)

    def extract(
        self,
        encoder: str | Encoder = "resnet50",
        *,
        out: Folder | None = None,
        strict: bool = True,
        **options: Unpack[ExtractOptions],
    ) -> ExtractReport:
        """Features of every slide, as :func:`~wsi_engine.extraction.extract` does it.

        Args:
            encoder: name of an encoder, or one already loaded.
            out: folder of the stores, or its URL, where it is not the cohort's.
            strict: refuse a cohort with problems; else slides that are not there fail one by one.
            options: of that function.

        Raises:
            InputError: the cohort has problems; the message is the report of :meth:`check`, without opening slides.
            WsiError: as that function.
        """
        from wsi_engine.extraction import extract  # noqa: PLC0415 - torch loads only when it is needed

        return extract(self._sources(strict), self._folder(out), encoder, **options)

    def train(
        self,
        label: str,
        head: str = "clam_sb",
        *,
        run: Folder | None = None,
        out: Folder | None = None,
        strict: bool = True,
        **options: Unpack[TrainOptions],
    ) -> TrainReport:
        """A head on every fold of the cohort, as :func:`~wsi_engine.training.run.train_head` does it.

        Args:
            label: column of the labels.
            head: ``clam_sb``, ``clam_mb``, ``abmil``, ``dsmil``, ``transmil`` or ``mean``.
            run: folder of the run, or a name for one in ``<out>/runs``; None for ``<label>-<head>`` there.
            out: folder of the stores, or its URL, where it is not the cohort's.
            strict: refuse a cohort with rows that cannot be used; else these are left out.
            options: of that function.

        Raises:
            InputError: the cohort cannot be trained on; the message lists everything that is wrong.
            WsiError: as that function.
        """
        from wsi_engine.training.run import train_head  # noqa: PLC0415

        if strict and self.faults:
            self.check(open_slides=False).require()
        folder = self._folder(out)
        place = place_run(self._desk(out), f"{_file_name(label)}-{head}" if run is None else run)
        return train_head(self.roster, folder, label, place, head=head, **options)

    def classify(
        self,
        model: Folder | None = None,
        *,
        predictions: Folder | None = None,
        out: Folder | None = None,
        strict: bool = True,
        **options: Unpack[ClassifyOptions],
    ) -> ClassifyReport:
        """Classes of every slide, as :func:`~wsi_engine.classification.slides.classify` does it.

        Args:
            model: folder of a run, or the name of one in ``<out>/runs``; None for the only one there.
            predictions: folder of the results; None for ``<out>/predictions/<run>``.
            out: folder of the stores, or its URL, where it is not the cohort's.
            strict: refuse a cohort with problems; slides of which only the id is known are taken from their stores.
            options: of that function.

        Raises:
            InputError: the cohort has problems, or there is no run.
            WsiError: as that function.
        """
        from wsi_engine.classification.slides import classify  # noqa: PLC0415

        folder = self._folder(out)
        desk = self._desk(out)
        run = find_run(desk, model)
        if run is None:
            raise InputError(f"{desk} holds no training run: train first, or name the folder of a run")
        place = place_predictions(desk, run) if predictions is None else predictions
        sources = self._sources(strict, bare=True)
        bare = [folder / f"{row.slide_id}.zarr" for row in self.roster if not row.slide]
        return classify([*sources, *bare], run, place, features=folder, **options)

    def nuclei(
        self,
        model: Folder | NucleiMethod = "builtin",
        *,
        out: Folder | None = None,
        strict: bool = True,
        **options: Unpack[NucleiOptions],
    ) -> NucleiReport:
        """Every nucleus of every slide, as :func:`~wsi_engine.nuclei.slides.segment_slides` does it.

        Args:
            model: ``builtin``, a method's name, a file of weights, or a method.
            out: folder of the stores, or its URL, where it is not the cohort's.
            strict: refuse a cohort with problems; else slides that are not there fail one by one.
            options: of that function.

        Raises:
            InputError: the cohort has problems.
            WsiError: as that function.
        """
        from wsi_engine.nuclei.slides import segment_slides  # noqa: PLC0415 - Numba loads only when it is needed

        return segment_slides(self._sources(strict), self._folder(out), model, **options)

    def table(
        self,
        by: Literal["slide", "patient"] = "slide",
        *,
        run: Folder | None = None,
        nuclei: str | None = None,
        encoder: str | None = None,
        out: Folder | None = None,
    ) -> pandas.DataFrame:
        """The cohort's columns joined to all results, as :func:`~wsi_engine.studies.table.make_table` does it.

        Args:
            by: a row for each slide, or for each patient: slides of one patient are not independent.
            run: whose predictions; None for the only run there is.
            nuclei: whose nuclei, by method; None for the only ones there are.
            encoder: whose tiles are counted; None for the only encoder there is.
            out: folder of the stores, or its URL, where it is not the cohort's.

        Raises:
            InputError: there are several runs, methods or encoders and none was named, or a column of the cohort has
                the name of a result.
            SettingsError: pandas is not installed.
            WsiError: results cannot be read.
        """
        from wsi_engine.studies.table import make_table  # noqa: PLC0415

        return make_table(
            self.roster, self._desk(out), by, run=run, nuclei=nuclei, encoder=encoder, stores=self._folder(out)
        )

    def _folder(self, out: Folder | None) -> Place:
        return self.out if out is None else as_place(out)

    def _desk(self, out: Folder | None) -> Path:
        """Where runs and predictions are: with the stores, unless these are kept by URL."""
        folder = self._folder(out)
        return folder if isinstance(folder, Path) else self.out

    def _sources(self, strict: bool, bare: bool = False) -> list[SlideSource]:
        """The slides that are named, to be worked on; ``bare`` allows some of which only the id is known."""
        if strict:
            self.check(open_slides=False).require()
        nameless = [row.slide_id for row in self.roster if not row.slide]
        if nameless and not bare:
            raise InputError(
                f"{self.roster.source} does not say where {count(len(nameless), 'slide')} are "
                f'({list_some(nameless, 3)}): fill in the column "slide", or select the others'
            )
        return [SlideSource(row.slide, row.slide_id, parse_scale(row)) for row in self.roster if row.slide]

    def __len__(self) -> int:
        return len(self.roster)

    def __iter__(self) -> Iterator[RosterRow]:
        return iter(self.roster)

    def __repr__(self) -> str:
        patients = len({row.patient for row in self.roster})
        size = f"{count(len(self), 'slide')} of {count(patients, 'patient')}"
        return f"<Cohort {self.roster.source}: {size}, results in {self.out}>"


def _file_name(label: str) -> str:
    """A column's name as part of the name of a folder."""
    return "".join(sign if sign.isalnum() or sign in "._+-" else "_" for sign in label).lstrip(".") or "label"
