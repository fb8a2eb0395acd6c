"""What the methods of a cohort hand on to the engine's functions, which describe it; a test holds the two together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from wsi_engine.classification.explanation import ExplainSettings
    from wsi_engine.classification.slides import ClassifyProgress
    from wsi_engine.cluster.session import Cluster
    from wsi_engine.cohorts.splits import SplitSettings
    from wsi_engine.extraction import Progress
    from wsi_engine.grid import TissueChoice
    from wsi_engine.nuclei.segmentation import NucleiSettings
    from wsi_engine.nuclei.slides import NucleiOutputs, NucleiProgress
    from wsi_engine.training.report import TrainProgress
    from wsi_engine.training.settings import TrainSettings


class ExtractOptions(TypedDict, total=False):
    """Of :func:`~wsi_engine.extraction.extract`."""

    weights: str | os.PathLike[str] | None
    prompts: str | os.PathLike[str] | None
    mpp: float
    tile_px: int
    stride_px: int | None
    tissue: TissueChoice
    min_tissue: float
    slide_mpp: float | None
    device: str
    precision: str
    dtype: Literal["float16", "float32"]
    batch_size: int
    workers: int | None
    reader: str
    exact_resample: bool
    progress: Progress | None
    cluster: Cluster | None


class TrainOptions(TypedDict, total=False):
    """Of :func:`~wsi_engine.training.run.train_head`."""

    options: Mapping[str, Any] | None
    encoder: str | None
    splits: SplitSettings | None
    settings: TrainSettings | None
    progress: TrainProgress | None


class ClassifyOptions(TypedDict, total=False):
    """Of :func:`~wsi_engine.classification.slides.classify`."""

    weights: str | os.PathLike[str] | None
    slide_mpp: float | None
    settings: ExplainSettings | None
    device: str
    precision: str
    batch_size: int
    workers: int | None
    reader: str
    progress: ClassifyProgress | None
    extract_progress: Progress | None
    cluster: Cluster | None


class NucleiOptions(TypedDict, total=False):
    """Of :func:`~wsi_engine.nuclei.slides.segment_slides`."""

    weights: str | os.PathLike[str] | None
    device: str
    slide_mpp: float | None
    settings: NucleiSettings | None
    outputs: NucleiOutputs | None
    reader: str
    progress: NucleiProgress | None
    cluster: Cluster | None
