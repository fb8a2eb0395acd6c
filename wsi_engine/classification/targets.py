"""What a classification works on: from slides, stores, folders and lists to one store of features for each slide."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from wsi_engine.cluster.session import Session
from wsi_engine.cohorts.roster import Roster
from wsi_engine.distribution import extract_on_cluster, find_encoder
from wsi_engine.encoders.base import Encoder
from wsi_engine.encoders.plan import EncoderPlan
from wsi_engine.errors import EncoderError, InputError, ModelError, StoreError, WeightsError
from wsi_engine.extraction import Progress, extract_sources
from wsi_engine.grid import GridSettings
from wsi_engine.inputs import SlideInput, SlideSource, check_slide_id, find_slides
from wsi_engine.jobs import ExtractSettings, SlideResult
from wsi_engine.places import Place, as_place, list_stores, make_folder
from wsi_engine.remote import RemoteEncoder
from wsi_engine.runs import FeatureOrigin
from wsi_engine.store import FeatureStore, features_key
from wsi_engine.tissue import TissueSettings

CaseSource: TypeAlias = SlideInput | FeatureStore
"""A slide, a store, a folder of either, a CSV, a slide with its name and scale, or an open store."""


@dataclass(frozen=True)
class Target:
    """One slide to classify: where its features are or will be, and the slide itself where it is at hand."""

    slide_id: str
    store: Place
    slide: SlideSource | None = None


@dataclass(frozen=True)
class FeatureSource:
    """One kind of features that a model takes.

    Attributes:
        origin: where they come from.
        tuned: file of the prompts, or of the tuned weights; None where the encoder is used as it was published.
        tissue: how tissue is found where features are missing; None takes all tiles.
        min_tissue: least part of a tile that must be tissue then, 0 to 1.
    """

    origin: FeatureOrigin
    tuned: Path | None = None
    tissue: Literal["otsu"] | TissueSettings | None = "otsu"
    min_tissue: float = GridSettings.min_tissue


@dataclass(frozen=True)
class ExtractOptions:
    """How features that are missing are made; the scale and the encoder are the model's."""

    weights: str | None = None
    device: str = "auto"
    batch_size: int = 64
    workers: int | None = None
    reader: str = "auto"


def find_targets(
    sources: CaseSource | Iterable[CaseSource], features: Place, slide_mpp: float | None = None
) -> list[Target]:
    """List the slides that are named, in the order given.

    A path or URL ending in ``.zarr`` is a store, and so is each one in a folder that holds any; other folders, files
    and URLs are slides, whose features are ``<features>/<slide_id>.zarr``. A CSV has a column ``slide`` or, for slides
    that are not at hand, ``slide_id``.

    Args:
        sources: what the user named.
        features: folder of the features of slides.
        slide_mpp: micrometres per level-0 pixel of slides whose header has none.

    Raises:
        InputError: nothing was named, a folder or CSV holds no slide, or two slides have one id.
    """
    if isinstance(sources, str | os.PathLike | SlideSource | FeatureStore):
        sources = [sources]
    targets: list[Target] = []
    for source in sources:
        if isinstance(source, SlideSource):
            (slide,) = find_slides([source], slide_mpp)
            targets.append(Target(slide.slide_id, features / f"{slide.slide_id}.zarr", slide))
            continue
        path = source.place if isinstance(source, FeatureStore) else as_place(source)
        if path.suffix == ".zarr":
            targets.append(_from_store(path))
        elif stores := list_stores(path):
            targets += [_from_store(store) for store in stores]
        elif path.suffix.lower() == ".csv" and "slide" not in (roster := Roster.read(path)).columns:
            targets += [Target(row.slide_id, features / f"{row.slide_id}.zarr") for row in roster]
        else:
            assert not isinstance(source, FeatureStore)
            slides = find_slides([source], slide_mpp)
            targets += [Target(slide.slide_id, features / f"{slide.slide_id}.zarr", slide) for slide in slides]
    if not targets:
        raise InputError("no slide was named: pass slides, stores, folders or CSV files")
    _refuse_duplicates(targets)
    return targets


def extract_missing(
    targets: Sequence[Target],
    features: Place,
    sources: Sequence[FeatureSource],
    options: ExtractOptions,
    progress: Progress | None = None,
    session: Session | None = None,
) -> dict[str, str]:
    """Extract what a model takes for the slides that have none yet: all slides in one stream for each source.

    Returns:
        By slide id, why a slide has none even now.

    Raises:
        ModelError: the encoder's weights are not those that the model was trained on; nothing was encoded with them.
        EncoderError: the encoder cannot be made.
        InputError: ``features`` cannot be written.
    """
    missing = {
        source: [target for target in targets if target.slide and _lacks(target.store, source.origin.encoder)]
        for source in sources
    }
    rounds = _Rounds(progress, sum(map(len, missing.values()))) if progress else None
    failures: dict[str, str] = {}
    for source, lacking in missing.items():
        if rounds:
            rounds.leave_out(one.slide for one in lacking if one.slide and one.slide_id in failures)
        slides = [target.slide for target in lacking if target.slide and target.slide_id not in failures]
        if slides:
            failures |= _extract(slides, features, source, options, rounds, session)
    return failures


class _Rounds:
    """A progress that is told of several extractions as of one.

    A slide that failed in one is left out of those that follow, and ends there, too: each slide ends as often as
    there are extractions of it, so that what was announced is what ends.
    """

    def __init__(self, progress: Progress, slides: int) -> None:
        self._slides, self._begun = slides, False
        self._told = progress
        self.slide_started = progress.slide_started
        self.tiles_done = progress.tiles_done
        self.slide_finished = progress.slide_finished

    def run_started(self, slides: int) -> None:
        """The first extraction begins, or a further one."""
        if not self._begun:
            self._told.run_started(self._slides)
        self._begun = True

    def leave_out(self, slides: Iterable[SlideSource]) -> None:
        """These failed before, and are not tried again."""
        for slide in slides:
            self._told.slide_finished(
                SlideResult(slide.slide_id, slide.path, "failed", message="left out, for it failed before")
            )


def _extract(
    slides: Sequence[SlideSource],
    features: Place,
    source: FeatureSource,
    options: ExtractOptions,
    progress: Progress | None,
    session: Session | None,
) -> dict[str, str]:
    """Extract features of one kind, here or on a cluster; by slide id, why a slide has none even now."""
    encoder, model = _load_encoder(source, options, session), source.origin
    make_folder(features)
    stride = None if model.stride_px == model.tile_px else model.stride_px
    settings = ExtractSettings(
        GridSettings(model.mpp, model.tile_px, stride, source.min_tissue), source.tissue,
        batch_size=options.batch_size, workers=options.workers, reader=options.reader,
    )  # fmt: skip
    if isinstance(encoder, RemoteEncoder):
        assert session is not None
        report = extract_on_cluster(slides, features, encoder, settings, session, progress)
    else:
        report = extract_sources(slides, features, encoder, settings, progress)
    return {
        result.slide_id: result.message or f"its features could not be extracted ({result.status})"
        for result in report.results
        if result.status in ("failed", "busy")
    }


def _load_encoder(source: FeatureSource, options: ExtractOptions, session: Session | None) -> Encoder | RemoteEncoder:
    """The model's encoder in the precision of its training set where the device has it; its weights are checked."""
    model = source.origin
    precision = model.precision.partition("+")[0]
    if precision not in ("fp32", "bf16", "fp16"):
        precision = "auto"
    try:
        encoder = _make_encoder(source, options, precision, session)
    except WeightsError:
        raise
    except EncoderError:
        if precision == "auto":
            raise
        encoder = _make_encoder(source, options, "auto", session)
    found = encoder.card.weights_digest
    if found != model.weights_digest:
        raise ModelError(
            f"the weights of {model.encoder} ({encoder.card.weights or 'none'}, digest {found[:12]}…) are not those "
            f"that the model was trained on ({model.weights_digest[:12]}…): pass those with --weights"
        )
    return encoder


def _make_encoder(
    source: FeatureSource, options: ExtractOptions, precision: str, session: Session | None
) -> Encoder | RemoteEncoder:
    tuned = None if source.tuned is None else str(source.tuned)
    name = source.origin.encoder if tuned is None else None
    plan = EncoderPlan(name, options.weights, tuned, options.device, precision)
    return plan.create() if session is None else find_encoder(session, plan)


def _lacks(store: Place, encoder: str) -> bool:
    """Whether features of the encoder are still to be made; a damaged store is left for its reader to complain of."""
    if not store.exists():
        return True
    try:
        return features_key(encoder) not in FeatureStore.open(store).encoders()
    except StoreError:
        return False


def _from_store(path: Place) -> Target:
    return Target(check_slide_id(path.stem, str(path)), path)


def _refuse_duplicates(targets: Sequence[Target]) -> None:
    """Two slides of one id would share a row and a picture; compared without case, as some file systems do."""
    seen: dict[str, Target] = {}
    for target in targets:
        other = seen.setdefault(target.slide_id.lower(), target)
        if other is not target:
            places = [str(one.slide.path if one.slide else one.store) for one in (other, target)]
            raise InputError(
                f'{places[0]} and {places[1]} are both called "{target.slide_id}": classify them into two folders'
            )
