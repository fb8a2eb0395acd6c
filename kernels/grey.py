"""The check of grey images that the kernels on them share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def as_grey(image: NDArray[Any], caller: str, *, finite: bool = False) -> NDArray[Any]:
    """``image`` as C-contiguous float32 or float64 (H, W) that holds every value exactly, without a copy if it is one.

    Bool and integers of up to 16 bits become float32, integers of 32 bits float64; so a kernel is compiled for two
    dtypes at most.

    Raises:
        TypeError: ``image`` is not bool, an integer of up to 32 bits, float16, float32 or float64.
        ValueError: ``image`` is not (H, W), or holds NaN, or with ``finite`` infinity.
    """
    image = np.asarray(image)
    kind, bytes_ = image.dtype.kind, image.dtype.itemsize
    if not ((kind in "bui" and bytes_ <= 4) or (kind == "f" and bytes_ <= 8)):
        raise TypeError(
            f"{caller} takes an image of bool, integers of up to 32 bits, float32 or float64, not {image.dtype}"
        )
    if image.ndim != 2:
        raise ValueError(f"{caller} takes an image of shape (H, W), not {image.shape}")
    grey = np.ascontiguousarray(image, np.float64 if bytes_ > (4 if kind == "f" else 2) else np.float32)
    if kind == "f" and grey.size:
        low, high = grey.min(), grey.max()  # NaN if there is one
        if np.isnan(low):
            raise ValueError(f"{caller} takes an image without NaN")
        if finite and not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError(f"{caller} takes a finite image, and this one holds infinity")
    return grey
