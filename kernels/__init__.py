"""Kernels: plain loops on arrays, compiled by Numba. Arrays in, arrays out; each name loads on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsi_engine.kernels._threads import set_thread_count, thread_count
    from wsi_engine.kernels.contours import Contours, trace_contours
    from wsi_engine.kernels.distance import distance_transform
    from wsi_engine.kernels.filters import median_blur, rgb_saturation, summed_area
    from wsi_engine.kernels.labels import fill_holes, label, relabel, remove_small
    from wsi_engine.kernels.macenko import estimate_stains
    from wsi_engine.kernels.maxima import local_maxima
    from wsi_engine.kernels.morphology import close_disk, dilate, erode, open_disk
    from wsi_engine.kernels.nuclei import nuclei_from_attention
    from wsi_engine.kernels.otsu import otsu_threshold
    from wsi_engine.kernels.reconstruction import reconstruct
    from wsi_engine.kernels.regions import RegionTable, measure_regions
    from wsi_engine.kernels.resample import resample_area
    from wsi_engine.kernels.smoothing import gaussian, local_threshold
    from wsi_engine.kernels.stains import unmix_stains
    from wsi_engine.kernels.summits import h_maxima
    from wsi_engine.kernels.watersheds import watershed

_HOMES = {
    "Contours": "contours",
    "RegionTable": "regions",
    "close_disk": "morphology",
    "dilate": "morphology",
    "distance_transform": "distance",
    "erode": "morphology",
    "estimate_stains": "macenko",
    "fill_holes": "labels",
    "gaussian": "smoothing",
    "h_maxima": "summits",
    "label": "labels",
    "local_maxima": "maxima",
    "local_threshold": "smoothing",
    "measure_regions": "regions",
    "median_blur": "filters",
    "nuclei_from_attention": "nuclei",
    "open_disk": "morphology",
    "otsu_threshold": "otsu",
    "reconstruct": "reconstruction",
    "relabel": "labels",
    "remove_small": "labels",
    "resample_area": "resample",
    "rgb_saturation": "filters",
    "set_thread_count": "_threads",
    "summed_area": "filters",
    "thread_count": "_threads",
    "trace_contours": "contours",
    "unmix_stains": "stains",
    "watershed": "watersheds",
}

__all__ = [
    "Contours",
    "RegionTable",
    "close_disk",
    "dilate",
    "distance_transform",
    "erode",
    "estimate_stains",
    "fill_holes",
    "gaussian",
    "h_maxima",
    "label",
    "local_maxima",
    "local_threshold",
    "measure_regions",
    "median_blur",
    "nuclei_from_attention",
    "open_disk",
    "otsu_threshold",
    "reconstruct",
    "relabel",
    "remove_small",
    "resample_area",
    "rgb_saturation",
    "set_thread_count",
    "summed_area",
    "thread_count",
    "trace_contours",
    "unmix_stains",
    "watershed",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'wsi_engine.kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"wsi_engine.kernels.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
