"""The nuclei of many slides: one store each, and beside it GeoJSON, a table, a summary and a picture.

Safe to kill and to run again: nuclei count only once they are completely in the store, files appear whole or not at
all, and a slide that cannot be done does not stop the others.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

import numpy as np

from wsi_engine.cluster.session import Cluster, open_session
from wsi_engine.errors import BusyError, SettingsError, StoreError, WsiError
from wsi_engine.failures import record_outcome
from wsi_engine.inputs import SlideInput, SlideSource, find_slides
from wsi_engine.lease import Lease, hold_lease
from wsi_engine.nuclei.drafts import replacing
from wsi_engine.nuclei.instances import InstanceSet
from wsi_engine.nuclei.keeping import check_nuclei, read_nuclei, write_nuclei
from wsi_engine.nuclei.method import NucleiMethod, create_method
from wsi_engine.nuclei.overlay import draw_nuclei
from wsi_engine.nuclei.segmentation import NucleiSettings, PreparedSlide, TileProgress
from wsi_engine.nuclei.table import check_parquet
from wsi_engine.picture import save_picture
from wsi_engine.places import Place, as_place, make_folder, write_file
from wsi_engine.slide import Slide, open_slide
from wsi_engine.slide_record import SlideRecord
from wsi_engine.store import FeatureStore, features_key

Status = Literal["done", "already complete", "no tissue", "busy", "failed"]

LABELLED_PX = 1 << 27
"""Pixels of pictures up to which a label image is written as well."""


@dataclass(frozen=True)
class NucleiOutputs:
    """Which files are written beside the store.

    Attributes:
        geojson: for QuPath.
        table: ``csv``, ``parquet`` or None.
        overlay: a picture.
        labels: a label image, of pictures (PNG, JPEG, plain TIFF) alone.
    """

    geojson: bool = True
    table: Literal["csv", "parquet"] | None = "csv"
    overlay: bool = True
    labels: bool = True

    def __post_init__(self) -> None:
        if self.table not in ("csv", "parquet", None):
            raise SettingsError(f"--table must be csv or parquet, not {self.table}")
        if self.table == "parquet":
            check_parquet()


@dataclass(frozen=True)
class NucleiResult:
    """How one slide ended; ``seconds`` are those of this run, ``files`` those that are there, by kind."""

    slide_id: str
    path: str
    status: Status
    message: str = ""
    nuclei: int = 0
    tissue_mm2: float = 0.0
    seconds: float = 0.0
    files: dict[str, str] = field(default_factory=dict)

    @property
    def per_mm2(self) -> float | None:
        """Nuclei per mm² of tissue; None without tissue."""
        return self.nuclei / self.tissue_mm2 if self.tissue_mm2 > 0 else None


@dataclass(frozen=True)
class NucleiReport:
    """How a run ended, slide by slide in the order given."""

    method: str
    results: tuple[NucleiResult, ...]
    wall_seconds: float

    @property
    def failed(self) -> tuple[NucleiResult, ...]:
        """The slides that have no nuclei because of an error."""
        return tuple(result for result in self.results if result.status == "failed")

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        slides = [asdict(result) | {"per_mm2": result.per_mm2} for result in self.results]
        return {"method": self.method, "wall_seconds": self.wall_seconds, "slides": slides}


class NucleiProgress(TileProgress, Protocol):
    """Told how a run goes; every call comes from the thread that called :func:`segment_slides`."""

    def run_started(self, slides: int) -> None:
        """The list of slides is checked; so many there are."""

    def slide_finished(self, result: NucleiResult) -> None:
        """A slide ended, well or not."""


def segment_slides(
    slides: SlideInput | Iterable[SlideInput],
    out: str | os.PathLike[str],
    model: str | os.PathLike[str] | NucleiMethod = "builtin",
    *,
    weights: str | os.PathLike[str] | None = None,
    device: str = "auto",
    slide_mpp: float | None = None,
    settings: NucleiSettings | None = None,
    outputs: NucleiOutputs | None = None,
    reader: str = "auto",
    progress: NucleiProgress | None = None,
    cluster: Cluster | None = None,
) -> NucleiReport:
    """Find the nuclei of slides and pictures, and write them into ``out``.

    ``<out>/<slide_id>.zarr`` holds them, and beside it are, named ``<slide_id>.<method>``: ``.geojson``, ``.csv`` or
    ``.parquet``, ``.json`` (the summary), ``.png`` (a picture) and for pictures ``.labels.tif`` (uint16, or uint32 from
    65,536 nuclei on). Nuclei that are complete are not looked for again; files of theirs that are missing are written.

    Args:
        slides: a slide, picture, folder, CSV or URL, or several of them (see :func:`~wsi_engine.inputs.find_slides`).
        out: folder of the results, made if it is not there, or its URL (``s3://bucket/nuclei``).
        model: as in :func:`~wsi_engine.nuclei.segmentation.segment_nuclei`.
        weights: the same.
        device: the same.
        slide_mpp: micrometres per level-0 pixel, for slides and pictures whose header has none or a wrong one.
        settings: how slides are gone through.
        outputs: which files are written.
        reader: ``auto`` or one reader's name.
        progress: told how the run goes; on a cluster of several slides at a time.
        cluster: as in :func:`~wsi_engine.extraction.extract`; the method is given by its name or file then.

    Raises:
        InputError: the list of slides cannot be used, or ``out`` cannot be written.
        ClusterError: the cluster cannot be reached or started, or went away for too long.
        SettingsError: a setting is out of range, or the method is unknown.
        ModelError: the weights are missing, damaged or of another model.
        EncoderError: there is no such device.
    """
    named = [slides] if isinstance(slides, str | os.PathLike | SlideSource) else slides
    sources = find_slides(named, slide_mpp)
    method: NucleiMethod | None = create_method(model, weights, device) if cluster is None else None
    folder, settings, outputs = as_place(out), settings or NucleiSettings(), outputs or NucleiOutputs()
    if cluster is not None:
        from wsi_engine.nuclei.distribution import MethodPlan, segment_on_cluster  # noqa: PLC0415 - it needs this module

        plan = MethodPlan.of(model, weights, device)
        described = plan.describe()  # before a cluster is started for it
        make_folder(folder)
        with open_session(cluster) as session:
            return segment_on_cluster(sources, folder, plan, described, settings, outputs, reader, session, progress)
    assert method is not None
    make_folder(folder)
    if progress:
        progress.run_started(len(sources))
    begun = time.perf_counter()
    results = []
    for source in sources:
        results.append(segment_source(source, folder, method, settings, outputs, reader, progress))
        record_outcome(folder, source.slide_id, nuclei_job(method.name), results[-1].status, results[-1].message)
        if progress:
            progress.slide_finished(results[-1])
    return NucleiReport(method.name, tuple(results), time.perf_counter() - begun)


def segment_source(
    source: SlideSource,
    out: Place,
    method: NucleiMethod,
    settings: NucleiSettings,
    outputs: NucleiOutputs,
    reader: str = "auto",
    progress: TileProgress | None = None,
) -> NucleiResult:
    """The nuclei of one slide, as in :func:`segment_slides`; what goes wrong is in the result."""
    return _Job(source, out, method, settings, outputs, reader).run(progress)


def nuclei_job(method: str) -> str:
    """What the nuclei of a method are called where jobs are told apart: their place in a store."""
    return f"nuclei/{features_key(method)}"


@dataclass
class _Job:
    """One slide of a run."""

    source: SlideSource
    out: Place
    method: NucleiMethod
    settings: NucleiSettings
    outputs: NucleiOutputs
    reader: str

    def run(self, progress: TileProgress | None) -> NucleiResult:
        """Do the slide; what goes wrong is in the result."""
        begun = time.perf_counter()
        source = self.source
        try:
            with (
                open_slide(source.path, source.mpp, self.reader) as slide,
                hold_lease(self._path(".lease", hidden=True), nuclei_job(self.method.name)) as lease,
            ):
                return self._run(slide, lease, begun, progress)
        except WsiError as error:
            status: Status = "busy" if isinstance(error, BusyError) else "failed"
            return NucleiResult(source.slide_id, source.path, status, str(error), seconds=time.perf_counter() - begun)

    def _run(self, slide: Slide, lease: Lease, begun: float, progress: TileProgress | None) -> NucleiResult:
        record = SlideRecord.of(slide, self.source.slide_id)
        prepared = PreparedSlide(slide, self.method, self.settings, self.source.slide_id)
        path = self._path(".zarr")
        store = FeatureStore.create(path, record) if (path / "zarr.json").exists() else None
        complete = store is not None and check_nuclei(store, prepared.record)
        if store is not None and complete:
            nuclei = read_nuclei(store, self.method.name)
        else:
            nuclei = prepared.segment(progress)
            lease.check()
            store = store or FeatureStore.create(path, record)
            self._drop_files()
            write_nuclei(store, nuclei, lease.check)
        lease.check()
        files = {"store": str(path)} | self._write_files(slide, nuclei)
        empty = nuclei.record.tissue_mm2 == 0
        status: Status = "already complete" if complete else "no tissue" if empty else "done"
        return NucleiResult(
            slide_id=self.source.slide_id,
            path=self.source.path,
            status=status,
            message="no tissue was found: look at the slide, or pass --tissue none" if empty else "",
            nuclei=len(nuclei),
            tissue_mm2=nuclei.record.tissue_mm2,
            seconds=time.perf_counter() - begun,
            files=files,
        )

    def _path(self, ending: str, hidden: bool = False) -> Place:
        return self.out / f"{'.' if hidden else ''}{self.source.slide_id}{ending}"

    def _targets(self, slide: Slide | None = None) -> dict[str, Place]:
        """Files by kind; all that there can be without a slide, else those that are wanted of it."""
        stem = f".{features_key(self.method.name)}"
        wanted = {
            "geojson": self.outputs.geojson,
            "csv": self.outputs.table == "csv",
            "parquet": self.outputs.table == "parquet",
            "overlay": self.outputs.overlay,
            "labels": slide is not None and self.outputs.labels and _is_picture(slide),
            "summary": True,
        }
        endings = {"overlay": f"{stem}.png", "labels": f"{stem}.labels.tif", "summary": f"{stem}.json"}
        return {
            kind: self._path(endings.get(kind, f"{stem}.{kind}"))
            for kind, yes in wanted.items()
            if yes or slide is None
        }

    def _drop_files(self) -> None:
        """Take away what an earlier run wrote: it is of other nuclei."""
        try:
            for path in self._targets().values():
                path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"cannot replace {path}: {error.strerror or error}") from error

    def _write_files(self, slide: Slide, nuclei: InstanceSet) -> dict[str, str]:
        """Write the files that are not there."""
        writers: dict[str, Callable[[Path], None]] = {
            "geojson": nuclei.to_geojson,
            "csv": nuclei.to_csv,
            "parquet": nuclei.to_parquet,
            "overlay": lambda path: save_picture(draw_nuclei(slide, nuclei), path),
            "labels": lambda path: write_labels(nuclei, path),
            "summary": lambda path: _write_summary(nuclei, path),
        }
        targets = self._targets(slide)
        try:
            for kind, path in targets.items():
                if not path.exists():
                    _write_at(path, writers[kind])
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
        return {kind: str(path) for kind, path in targets.items()}


def _write_at(place: Place, write: Callable[[Path], None]) -> None:
    """Write a file at a place; one that goes to an object store is made on this machine first."""
    if isinstance(place, Path):
        write(place)
        return
    with TemporaryDirectory(prefix="wsi-") as folder:
        file = Path(folder) / place.name
        write(file)
        place.upload(file)


def _is_picture(slide: Slide) -> bool:
    width, height = slide.dimensions
    return slide.reader == "image" and width * height <= LABELLED_PX


def write_labels(nuclei: InstanceSet, path: str | os.PathLike[str]) -> None:
    """Write the label image at level 0 as TIFF: uint16, or uint32 from 65,536 nuclei on; whole or not at all.

    Raises:
        StoreError: the file cannot be written.
    """
    from tifffile import imwrite  # noqa: PLC0415

    labels = nuclei.labels().astype(np.uint16 if len(nuclei) < 1 << 16 else np.uint32)
    with replacing(path, "the label image") as draft:
        imwrite(draft, labels, compression="zlib")


def _write_summary(nuclei: InstanceSet, path: Path) -> None:
    try:
        write_file(path, json.dumps(nuclei.summary(), indent=2).encode())
    except OSError as error:
        raise StoreError(f"cannot write the summary {path}: {error.strerror or error}") from error
