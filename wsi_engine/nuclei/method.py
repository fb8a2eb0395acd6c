"""What a method that finds nuclei provides, so that a slide's nuclei do not depend on how it is cut into tiles.

A method looks at slides at one scale. What adapts to the slide (thresholds, stain vectors) is found once, from samples
of its tissue. After that, maps are pixelwise: each depends on no pixel further away than the margin. The mask of the
maps is cleaned within a known reach, and divided into nuclei one connected component at a time.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import ModelError, SettingsError, first_line
from wsi_engine.kernels import close_disk, distance_transform, gaussian, label, local_maxima, open_disk, watershed


class FittedMethod(Protocol):
    """A method that has seen samples of the slide; everything it does from here on is the same everywhere.

    Its methods are called from two threads: :meth:`foreground` from one, the others from another.
    """

    def foreground(self, windows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Maps of some windows.

        Args:
            windows: uint8 (N, h + 2 m, w + 2 m, 3), m the method's ``margin_px``.

        Returns:
            float32 (N, C, d · h, d · w), d the method's ``detail``: map 0 says how surely a pixel is nucleus, further
            ones are the method's own.
        """
        ...

    def mask(self, maps: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Where nuclei are, cleaned: float32 (C, h, w) to bool (h, w), pixels of maps.

        A pixel may depend on maps up to ``clean_px`` pixels of the windows away; beyond the array is no nucleus.
        """
        ...

    def split(self, maps: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Nuclei of whole connected components.

        Args:
            maps: float32 (C, H, W), 0 outside of the components.
            mask: bool (H, W): one component or several (8-connected), at least ``gap_px`` from one another and from
                the border. None may influence another, nor may it matter where a component lies.

        Returns:
            int32 (H, W): 0 background, else the number of the nucleus; numbers need not be without gaps.
        """
        ...

    def to_json(self) -> dict[str, Any]:
        """What was found in the samples, as plain JSON values."""
        ...


@runtime_checkable
class NucleiMethod(Protocol):
    """A way to find nuclei on slides of any size.

    Attributes:
        name: as the user calls it, and under which its nuclei are stored.
        mpp: micrometres per pixel of the windows that it takes.
        detail: pixels of its maps along one pixel of its windows; outlines follow the pixels of the maps.
        margin_px: how far, in pixels of the windows, a map looks beyond its window.
        clean_px: how far :meth:`FittedMethod.mask` looks, in pixels of the windows.
        gap_px: how far apart, in pixels of the maps, components must lie for :meth:`FittedMethod.split` to treat each
            for itself.
        window_px: side of the windows given to :meth:`FittedMethod.foreground`, for methods whose rounding hangs on
            the shape of their input, as that of a network does: windows then lie on one lattice of the slide. A picture
            smaller than that gets smaller ones, whose side divides by 64 and by what divides both ``window_px`` and
            ``margin_px``. None for methods that take any.
    """

    name: str
    mpp: float
    detail: int
    margin_px: int
    clean_px: int
    gap_px: int
    window_px: int | None

    def fit(self, samples: Sequence[NDArray[np.uint8]]) -> FittedMethod:
        """Adapt to a slide: ``samples`` are uint8 (h, w, 3) pictures of its tissue, the same whatever the tiles."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Everything that changes its results, as plain JSON values: settings, digest of the weights."""
        ...


DEFAULT_METHOD = "student"
"""What ``model="builtin"`` stands for."""

METHOD_HOMES = {
    "student": "wsi_engine.nuclei.student_method:StudentMethod",
    "stain": "wsi_engine.nuclei.stain_method:StainMethod",
    "scale-attention": "wsi_engine.nuclei.scale_method:ScaleMethod",
}
"""Module and class of each method; the class takes ``weights``, a file or None, and ``device``."""

_CARD_KEYS = {"wsi_engine.nuclei_net": "student", "wsi_engine.scale_attention": "scale-attention"}
"""Keys of the cards in files of weights, and the methods that they belong to."""

LARGEST_HOLE_UM2 = 25.0
"""Holes of up to so many µm² are filled: larger ones lie between nuclei, not in them."""


_DISTANCE_SIGMA = 1.0
"""Of the Gaussian that smooths distances, in pixels."""


def gaussian_reach(sigma: float) -> int:
    """How far, in pixels, :func:`~wsi_engine.kernels.gaussian` of ``sigma`` pixels looks: four deviations."""
    return int(4.0 * sigma + 0.5)


def split_by_distance(mask: NDArray[np.bool_], peak_radius: int) -> NDArray[np.int32]:
    """Divide a mask (H, W) where the smoothed distance to its outline has several summits: int32 (H, W).

    Summits closer than ``peak_radius`` pixels are one nucleus.

    Source: M. Sahasrabudhe et al., MICCAI 2020, section 2.4.
    """
    smoothed = gaussian(distance_transform(mask), _DISTANCE_SIGMA)
    markers = label(local_maxima(smoothed, peak_radius, mask=mask))
    return watershed(np.negative(smoothed, out=smoothed), markers, mask)


def distance_gap(peak_radius: int) -> int:
    """Pixels between components from which :func:`split_by_distance` treats each for itself."""
    return 1 + max(gaussian_reach(_DISTANCE_SIGMA), peak_radius)


def clean_mask(mask: NDArray[np.bool_], radii: Sequence[int]) -> NDArray[np.bool_]:
    """Open and close a mask by disks of these radii in turn: bool (H, W) to bool (H, W)."""
    for radius in radii:
        mask = close_disk(open_disk(mask, radius), radius)
    return mask


def clean_reach(radii: Sequence[int]) -> int:
    """How far, in pixels, :func:`clean_mask` looks: four operations for each radius."""
    return 4 * sum(radii)


def create_method(
    model: str | os.PathLike[str] | NucleiMethod,
    weights: str | os.PathLike[str] | None = None,
    device: str = "auto",
) -> Any:
    """The method that a name or a file of weights stands for; one that is a method already comes back as it is.

    Args:
        model: ``builtin``, a name of :data:`METHOD_HOMES`, a file of weights, whose card tells the method, or a
            :class:`NucleiMethod`.
        weights: a file of weights for a method that has some; None for those that come with the engine. Under
            ``builtin`` its card tells the method.
        device: where networks run: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.

    Returns:
        a :class:`NucleiMethod`.

    Raises:
        SettingsError: there is no such method, or it has no weights.
        ModelError: the weights are missing, damaged or of another model.
        EncoderError: there is no such device.
    """
    if not isinstance(model, str | os.PathLike):
        if isinstance(model, NucleiMethod):
            return model
        raise SettingsError(f"a model of nuclei is a name, a file or a method, not {type(model).__name__}")
    name = os.fspath(model)
    if weights is None and name not in METHOD_HOMES and (Path(name).suffix or Path(name).exists()):
        name, weights = "builtin", name
    if name == "builtin":
        name = DEFAULT_METHOD if weights is None else _tell_method(Path(weights))
    if name not in METHOD_HOMES:
        raise SettingsError(
            f"there is no method {name!r} to find nuclei; use builtin, {', '.join(METHOD_HOMES)}, or a file of weights"
        )
    module, _, kind = METHOD_HOMES[name].partition(":")
    return getattr(importlib.import_module(module), kind)(weights=weights, device=device)


def _tell_method(path: Path) -> str:
    """The method that a file of weights belongs to, by its card."""
    from safetensors import safe_open  # noqa: PLC0415

    if not path.is_file():
        raise ModelError(f"there is no file of weights at {path}; check the path, or name a method")
    try:
        with safe_open(path, framework="np") as file:
            keys = file.metadata() or {}
    except Exception as error:
        raise ModelError(
            f"{path} cannot be read as safetensors ({first_line(error)}); give weights that find nuclei"
        ) from error
    for key, name in _CARD_KEYS.items():
        if key in keys:
            return name
    raise ModelError(f"{path} holds weights of another model; give the student's, or those that wsi train nuclei wrote")
