"""What the workers of a cluster do of an extraction: a slide each, or some rows of one."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from wsi_engine.cluster.messages import Teller
from wsi_engine.cluster.places import ONE_AT_A_TIME, WorkerShare, check_shared
from wsi_engine.encoders.base import Encoder, EncoderCard
from wsi_engine.encoders.cards import TEXTURE
from wsi_engine.encoders.plan import EncoderPlan
from wsi_engine.encoding import extract_sources
from wsi_engine.errors import EncoderError
from wsi_engine.inputs import SlideSource
from wsi_engine.jobs import ExtractSettings, LargeSlide, Share, SlideResult
from wsi_engine.places import Place
from wsi_engine.version import __version__


@dataclass(frozen=True)
class RemoteEncoder:
    """An encoder that workers can make; its precision is decided, so that all of them make the same.

    Attributes:
        plan: how it is made.
        card: of what is made.
        precision: decided.
        threads: that the worker uses which was asked.
    """

    plan: EncoderPlan
    card: EncoderCard
    precision: str
    threads: int


@dataclass(frozen=True)
class SlideSpec:
    """What a task is to do of a slide."""

    source: SlideSource
    out: Place
    encoder: RemoteEncoder
    settings: ExtractSettings
    share: Share
    topic: str
    worker: WorkerShare
    mark: str


@dataclass(frozen=True)
class SpreadSlide:
    """A task's answer that its slide is too large for one; see :class:`~wsi_engine.jobs.LargeSlide`."""

    tiles: int
    missing: int
    parts: tuple[range, ...]


def extract_slide(spec: SlideSpec) -> SlideResult | SpreadSlide:
    """In a worker: extract a slide, or some rows of it.

    Raises:
        ClusterError: the output folder is not the caller's.
    """
    check_shared(spec.out, spec.mark)
    with ONE_AT_A_TIME:
        threads = spec.worker.count_threads()
        settings = dataclasses.replace(spec.settings, workers=spec.settings.workers or threads)
        try:
            encoder = _load_encoder(spec.encoder.plan, spec.worker)
            if encoder.card.weights_digest != spec.encoder.card.weights_digest:
                _made.clear()
                encoder = _load_encoder(spec.encoder.plan, spec.worker)
            _check_weights(encoder, spec.encoder)
            told = _Told(spec)
            # the caller writes failures down: that of a worker which was given up would tell of a slide done elsewhere
            report = extract_sources([spec.source], spec.out, encoder, settings, told, spec.share, record=False)
            return report.results[0]
        except LargeSlide as slide:
            return SpreadSlide(slide.tiles, slide.missing, slide.parts)
        except EncoderError as error:
            return SlideResult(spec.source.slide_id, spec.source.path, "failed", message=str(error))


class _Told:
    """A progress that is told in a worker and heard where the run was started."""

    def __init__(self, spec: SlideSpec) -> None:
        rows = spec.share.rows
        self._rows = rows
        self._teller = Teller(spec.topic, spec.source.slide_id, rows.stop if rows else 0)

    def run_started(self, slides: int) -> None:
        """Of one slide: nothing to tell."""

    def slide_started(self, slide_id: str, tiles: int, done: int) -> None:
        """Of a part, only its own rows count."""
        if self._rows is not None:
            own = len(range(self._rows.start, min(self._rows.stop, tiles)))
            tiles, done = own, own - (tiles - done)
        self._teller.begin(tiles, done)

    def tiles_done(self, tiles: int) -> None:
        """So many more."""
        self._teller.add(tiles)

    def slide_finished(self, result: SlideResult) -> None:
        """The task's result tells it."""


def describe_encoder(spec: tuple[EncoderPlan, WorkerShare]) -> tuple[str, RemoteEncoder]:
    """In a worker: which version it runs, and what it makes of a plan."""
    plan, share = spec
    with ONE_AT_A_TIME:
        _made.clear()  # a worker outlives files of weights
        encoder = _load_encoder(plan, share)
        decided = dataclasses.replace(plan, precision=encoder.precision, tiles=None)
        _made[decided] = encoder  # as the tasks will ask for it
    return __version__, RemoteEncoder(decided, encoder.card, encoder.precision, share.count_threads())


_made: dict[EncoderPlan, Encoder] = {}
"""The encoder of this process, by the plans that it was made for."""


def _load_encoder(plan: EncoderPlan, share: WorkerShare) -> Encoder:
    """The encoder of a plan, made once in a process; one of another plan goes before it is made."""
    if plan not in _made:
        _made.clear()
        _made[plan] = _make_encoder(plan, share)
    return _made[plan]


def _make_encoder(plan: EncoderPlan, share: WorkerShare) -> Encoder:
    if plan.name == TEXTURE and plan.weights is None and plan.prompts is None:
        from wsi_engine.encoders.texture import MOST_THREADS, TextureEncoder  # noqa: PLC0415 - loads Numba

        return TextureEncoder(min(share.count_threads(), MOST_THREADS))
    share.limit_torch()
    return dataclasses.replace(plan, device=share.choose_device(plan.device)).create()


def _check_weights(encoder: Encoder, wanted: RemoteEncoder) -> None:
    """Refuse to mix weights: each machine of a cluster may have downloaded its own."""
    found, expected = encoder.card.weights_digest, wanted.card.weights_digest
    if found != expected:
        raise EncoderError(
            f"the weights of {wanted.card.name} differ between workers (digest {found[:12]}… on process {os.getpid()}, "
            f"{expected[:12]}… elsewhere): pass one file with --weights"
        )
