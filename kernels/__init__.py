"""Kernels: plain loops on arrays, compiled by Numba. Arrays in, arrays out; each name loads on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsi_engine.kernels.filters import median_blur, rgb_saturation, summed_area
    from wsi_engine.kernels.otsu import otsu_threshold
    from wsi_engine.kernels.resample import resample_area
    from wsi_engine.kernels.stains import unmix_stains

_HOMES = {
    "median_blur": "filters",
    "otsu_threshold": "otsu",
    "resample_area": "resample",
    "rgb_saturation": "filters",
    "summed_area": "filters",
    "unmix_stains": "stains",
}

__all__ = ["median_blur", "otsu_threshold", "resample_area", "rgb_saturation", "summed_area", "unmix_stains"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'wsi_engine.kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"wsi_engine.kernels.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
