"""What is kept of a prediction beside its numbers: attention in the slide's store, and pictures of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.classification.ensemble import Ensemble
from wsi_engine.classification.heatmap import HeatmapText, draw_heatmap, rank_percentiles, write_tiles_geojson
from wsi_engine.classification.prediction import Prediction
from wsi_engine.classification.sheet import draw_sheet
from wsi_engine.classification.targets import Target
from wsi_engine.errors import InputError, MismatchError, SettingsError
from wsi_engine.grid import TileGrid
from wsi_engine.lease import hold_lease
from wsi_engine.picture import save_picture
from wsi_engine.slide import Slide, open_slide
from wsi_engine.slide_record import SlideRecord
from wsi_engine.store import FeatureStore, features_key
from wsi_engine.version import __version__


@dataclass(frozen=True)
class ExplainSettings:
    """What is written of each slide.

    Attributes:
        attention: the attention into its store, ``attention/<run>/values``.
        heatmaps: ``heatmaps/<slide_id>.png``.
        geojson: ``heatmaps/<slide_id>.geojson``, tiles for QuPath.
        sheets: ``tiles/<slide_id>.png``, the most and least attended tiles.
        top: tiles in a row of a sheet, at most.
        long_side: pixels along the longer side of the slide in a heatmap.
    """

    attention: bool = True
    heatmaps: bool = True
    geojson: bool = True
    sheets: bool = True
    top: int = 8
    long_side: int = 1600

    def __post_init__(self) -> None:
        if self.top < 1:
            raise SettingsError(f"--top must be at least 1, not {self.top}")
        if self.long_side < 16:
            raise SettingsError(f"a heatmap's long side must be at least 16 pixels, not {self.long_side}")

    @property
    def pictures(self) -> bool:
        """Whether anything is drawn."""
        return self.heatmaps or self.geojson or self.sheets


@dataclass(frozen=True)
class Explained:
    """What was written: paths by kind (``heatmap``, ``geojson``, ``tiles``), and why something was left out."""

    files: dict[str, str]
    note: str = ""


def attention_job(run: str) -> str:
    """What the attention of a run is called where jobs are told apart: its place in a store."""
    return f"attention/{features_key(run)}"


def make_folders(out: Path, settings: ExplainSettings) -> None:
    """Make the folders that results go to.

    Raises:
        InputError: they cannot be made.
    """
    wanted = [out]
    wanted += [out / "heatmaps"] if settings.heatmaps or settings.geojson else []
    wanted += [out / "tiles"] if settings.sheets else []
    for folder in wanted:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to the output folder {folder}: {error.strerror or error}") from error


def explain_prediction(
    target: Target, prediction: Prediction, model: Ensemble, out: Path, settings: ExplainSettings
) -> Explained:
    """Write what is wanted of one slide's prediction. Safe to call from several threads for several slides.

    Raises:
        MismatchError: the slide's file is not the one that the features were made from.
        StoreError: the attention cannot be written.
        SlideError: the slide cannot be read, or a picture not be written.
    """
    if not (settings.attention or settings.pictures):
        return Explained({})
    store = FeatureStore.open(target.store)
    if settings.attention:
        _keep_attention(target, store, prediction, model)
    if not settings.pictures:
        return Explained({})
    grid = store.grid(store.provenance(model.features.encoder)["grid"])
    record = store.slide
    if target.slide is None:
        return _draw(target, store, grid, None, prediction, out, settings)
    with open_slide(target.slide.path, record.mpp) as slide:
        _check_slide(slide, record, target)
        return _draw(target, store, grid, slide, prediction, out, settings)


def _keep_attention(target: Target, store: FeatureStore, prediction: Prediction, model: Ensemble) -> None:
    """Attention into the store, held against other writers."""
    one_map = prediction.attention.shape[1] == 1
    record: dict[str, Any] = {
        "run": model.name,
        "model_digest": prediction.model_digest,
        "head": model.head,
        "folds": model.folds,
        "precision": model.precision,
        "encoder": model.features.encoder,
        "grid": store.provenance(model.features.encoder)["grid"],
        "grid_digest": prediction.grid_digest,
        "classes": list(prediction.classes),
        "columns": ["attention"] if one_map else list(prediction.classes),
        "features": asdict(model.features),
        "engine_version": __version__,
    }
    with hold_lease(target.store.parent / f".{target.slide_id}.lease", attention_job(model.name)):
        FeatureStore.create(store.path, store.slide).write_attention(model.name, prediction.attention, record)


def _check_slide(slide: Slide, record: SlideRecord, target: Target) -> None:
    """Refuse to draw on another slide than the one that was classified; imported features know only its size."""
    differs = slide.fingerprint != record.fingerprint if record.fingerprint else slide.dimensions != record.dimensions
    if differs:
        raise MismatchError(
            f"the features in {target.store} were made from another slide than {slide.path}: delete them, or give "
            "another folder of features"
        )


def _draw(
    target: Target,
    store: FeatureStore,
    grid: TileGrid,
    slide: Slide | None,
    prediction: Prediction,
    out: Path,
    settings: ExplainSettings,
) -> Explained:
    """The pictures of one slide."""
    attention: NDArray[np.float32] = prediction.attention[:, prediction.map_shown]
    percentiles = rank_percentiles(attention)
    files, note = {}, ""
    if settings.heatmaps:
        text = HeatmapText(f"{target.slide_id}: {prediction.label} ({prediction.probabilities.max():.2f})")
        tissue = None if slide else store.tissue()
        picture = draw_heatmap(percentiles, grid, store.slide, slide, tissue, text, settings.long_side)
        files["heatmap"] = str(out / "heatmaps" / f"{target.slide_id}.png")
        save_picture(picture, files["heatmap"])
    if settings.geojson:
        files["geojson"] = str(out / "heatmaps" / f"{target.slide_id}.geojson")
        write_tiles_geojson(files["geojson"], grid, attention, percentiles, prediction.label)
    if settings.sheets and slide:
        files["tiles"] = str(out / "tiles" / f"{target.slide_id}.png")
        save_picture(draw_sheet(slide, grid, percentiles, settings.top, target.slide_id), files["tiles"])
    elif settings.sheets:
        note = (
            "no sheet of tiles: the slide's file is not at hand; name the slide itself, and its store with --features"
        )
    return Explained(files, note)
