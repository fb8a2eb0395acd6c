"""Slides in, features out: the main job, safe to kill and to run again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Literal

from wsi_engine.cluster.session import Cluster, open_session
from wsi_engine.distribution import extract_on_cluster, find_encoder
from wsi_engine.encoders.base import Encoder
from wsi_engine.encoders.cards import TEXTURE
from wsi_engine.encoders.plan import EncoderPlan
from wsi_engine.encoding import ExtractReport, Progress, SubmittingEncoder, extract_sources
from wsi_engine.errors import EncoderError, WsiError
from wsi_engine.grid import GridSettings, TissueChoice
from wsi_engine.inputs import SlideInput, SlideSource, find_slides
from wsi_engine.jobs import ExtractSettings
from wsi_engine.places import Place, as_place, make_folder
from wsi_engine.slide import open_slide
from wsi_engine.store import stored_precision

__all__ = [
    "DEFAULT_ENCODER",
    "ExtractReport",
    "Progress",
    "SubmittingEncoder",
    "extract",
    "extract_sources",
    "guess_tiles",
]

DEFAULT_ENCODER = "resnet50"

_SAMPLED_SLIDES = 20
"""Slides that are looked at to guess how many tiles a run has."""

_TISSUE_SHARE = 0.4
"""Share of a slide that is taken to be tissue in that guess."""


def extract(
    slides: SlideInput | Iterable[SlideInput],
    out: str | os.PathLike[str],
    encoder: str | Encoder = DEFAULT_ENCODER,
    weights: str | os.PathLike[str] | None = None,
    *,
    prompts: str | os.PathLike[str] | None = None,
    mpp: float = 0.5,
    tile_px: int = 256,
    stride_px: int | None = None,
    tissue: TissueChoice = "otsu",
    min_tissue: float = 0.25,
    slide_mpp: float | None = None,
    device: str = "auto",
    precision: str = "auto",
    dtype: Literal["float16", "float32"] = "float16",
    batch_size: int = 64,
    workers: int | None = None,
    reader: str = "auto",
    exact_resample: bool = False,
    progress: Progress | None = None,
    cluster: Cluster | None = None,
) -> ExtractReport:
    """Extract features of slides into one store each, ``<out>/<slide_id>.zarr``.

    Safe to kill at any instant and to run again: finished slides are skipped, a slide in progress goes on where it
    stopped and ends in the same bytes. A slide that cannot be done does not stop the others; the report says why.

    Args:
        slides: a slide, folder, CSV or URL, or several of them (see :func:`~wsi_engine.inputs.find_slides`).
        out: folder of the stores, made if it is not there, or its URL (``s3://bucket/features``).
        encoder: name of an encoder (``wsi encoders`` lists them) or one already loaded.
        weights: file of weights, ``random:SEED``, or None for the published ones.
        prompts: ``prompts.safetensors`` (or ``encoder.safetensors``) of a fold of ``wsi train prompt``; the encoder is
            the one that it was trained in, and its features are kept apart from the plain ones.
        mpp: micrometres per tile pixel.
        tile_px: side of a tile in pixels.
        stride_px: step from tile to tile in pixels; None for ``tile_px``.
        tissue: which tiles to keep; see :func:`~wsi_engine.grid.lay_grid`.
        min_tissue: least part of a tile that must be tissue, 0–1.
        slide_mpp: micrometres per level-0 pixel, for slides whose header has none or a wrong one.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` …
        precision: ``auto`` (what the stores in ``out`` were made with, else the fastest that the device computes in
            natively), ``fp32``, ``bf16`` or ``fp16``, and any of them with ``+compile``.
        dtype: stored type; float16 is checked for overflow.
        batch_size: tiles encoded at a time.
        workers: reading threads; None for the number of usable cores.
        reader: ``auto`` or one reader's name.
        exact_resample: resample by the area filter alone; by default a reader may shrink the slide while it decodes.
        progress: told how the run goes; on a cluster of several slides at a time.
        cluster: None to work here; else ``local:N``, ``slurm:N``, the address of a Dask scheduler or its file, a
            :class:`~wsi_engine.cluster.choice.ClusterChoice`, or a ``distributed.Client``. The encoder is given by its
            name then, and made once in each worker; slides and ``out`` lie where all workers see them.

    Raises:
        InputError: the list of slides cannot be used, or ``out`` cannot be written.
        ClusterError: the cluster cannot be reached or started, or went away for too long.
        EncoderError: the encoder or its weights cannot be loaded, or the prompts are of another backbone.
        SettingsError: a number is out of range.
    """
    settings = ExtractSettings(
        GridSettings(mpp, tile_px, stride_px, min_tissue), tissue, dtype, batch_size, workers, reader, exact_resample
    )
    named = [slides] if isinstance(slides, str | os.PathLike | SlideSource) else slides
    sources = find_slides(named, slide_mpp)
    folder = as_place(out)
    make_folder(folder)
    if not isinstance(encoder, str):
        if prompts is not None:
            raise EncoderError(
                f"{prompts} goes into an encoder given by its name, not into one that is loaded; name it"
            )
        if cluster is not None:
            raise EncoderError("an encoder that is loaded cannot go to a cluster; give its name")
        return extract_sources(sources, folder, encoder, settings, progress)
    plan = _plan_encoder(encoder, weights, prompts, device, precision, folder, sources, settings)
    if cluster is None:
        return extract_sources(sources, folder, plan.create(), settings, progress)
    with open_session(cluster) as session:
        return extract_on_cluster(sources, folder, find_encoder(session, plan), settings, session, progress)


def _plan_encoder(
    name: str,
    weights: str | os.PathLike[str] | None,
    prompts: str | os.PathLike[str] | None,
    device: str,
    precision: str,
    folder: Place,
    sources: Sequence[SlideSource],
    settings: ExtractSettings,
) -> EncoderPlan:
    """The encoder that is asked for, with the precision of the features that are there already."""
    kept = name
    if prompts is not None:
        from wsi_engine.encoders.prompted import check_tuned  # noqa: PLC0415 - loads torch

        asked = None if name == DEFAULT_ENCODER else name
        kept = check_tuned(prompts, asked, settings.grid.mpp, settings.grid.tile_px) or name
    stored = stored_precision(folder, kept) if precision == "auto" else None
    deciding = precision == "auto" and stored is None and kept != TEXTURE
    tiles = guess_tiles(sources, settings) if deciding else None
    return EncoderPlan(
        name if prompts is None else None,
        None if weights is None else os.fspath(weights),
        None if prompts is None else os.fspath(prompts),
        device,
        stored or precision,
        tiles,
    )


def guess_tiles(sources: Sequence[SlideSource], settings: ExtractSettings) -> int:
    """About how many tiles a run has, from the sizes of some of its slides; those that cannot be opened count 0."""
    sampled = sources[:: max(1, -(-len(sources) // _SAMPLED_SLIDES))]
    tiles = 0.0
    for source in sampled:
        try:
            with open_slide(source.path, source.mpp, settings.reader) as slide:
                sides = [
                    n * mpp / (settings.grid.mpp * settings.grid.step_px)
                    for n, mpp in zip(slide.dimensions, slide.mpp, strict=True)
                ]
        except WsiError:
            continue
        tiles += sides[0] * sides[1]
    share = 1.0 if settings.tissue is None else _TISSUE_SHARE
    return round(tiles * share * len(sources) / max(1, len(sampled)))
