"""Precision: which arithmetic a network runs in, and the check that its features stay the same.

A precision is written as its type, ``fp32``, ``bf16`` or ``fp16``, followed by ``+compile`` where torch compiles the
network, since compiled code rounds at other places.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from wsi_engine.errors import EncoderError, SettingsError

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("auto", *(name + suffix for name in TYPES for suffix in ("", "+compile")))

COMPILE_FROM_TILES = 20_000
"""Tiles from which compiling pays: it takes 10-60 s and saves a tenth of the time on a CPU, more on a GPU."""

LEAST_COSINE = 0.999
"""Least cosine, tile by tile, between features in a lower precision and in fp32."""

_PROBE_CORNERS = ((0, 0), (256, 40), (30, 250), (250, 256))


@dataclass(frozen=True)
class Precision:
    """Arithmetic of a network: ``type`` is a name of :data:`TYPES`."""

    type: str = "fp32"
    compiled: bool = False

    def __str__(self) -> str:
        return self.type + ("+compile" if self.compiled else "")

    @classmethod
    def parse(cls, name: str) -> Precision:
        """The precision of a name such as ``bf16+compile``.

        Raises:
            SettingsError: there is no such precision.
        """
        if name == "auto" or name not in PRECISIONS:
            raise SettingsError(f"precision {name!r} is unknown; use one of {', '.join(PRECISIONS)}")
        kind, _, suffix = name.partition("+")
        return cls(kind, bool(suffix))


def choose_precision(name: str, device: torch.device, tiles: int | None = None) -> Precision:
    """The precision of a name on a device; ``auto`` is the fastest that the device computes in natively.

    Args:
        name: one of :data:`PRECISIONS`.
        device: where the network runs.
        tiles: how many tiles are to be encoded, about; decides whether ``auto`` compiles. None: not.

    Raises:
        SettingsError: there is no such precision.
        EncoderError: the device cannot compute in it, or there is no compiler.
    """
    native = _native_types(device)
    if name == "auto":
        return Precision(native[-1], bool(tiles and tiles >= COMPILE_FROM_TILES and can_compile(device)))
    wanted = Precision.parse(name)
    if wanted.type not in native:
        raise EncoderError(f"{device} does not compute in {wanted.type}; use --precision {native[-1]} or auto")
    if wanted.compiled and not can_compile(device):
        raise EncoderError(
            f"--precision {name} needs a C++ compiler, and none was found; use --precision {wanted.type}"
        )
    return wanted


def _native_types(device: torch.device) -> tuple[str, ...]:
    """Types in which a device is fast, best last."""
    if device.type == "cuda":
        return ("fp32", "fp16", "bf16") if torch.cuda.get_device_capability(device)[0] >= 8 else ("fp32", "fp16")
    if device.type == "cpu" and _cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"}:
        return ("fp32", "bf16")
    return ("fp32",)


def _cpu_flags() -> frozenset[str]:
    """What the processor says it can do; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.lower().startswith(("flags", "features"))), "").split())


def can_compile(device: torch.device) -> bool:
    """Whether torch can compile for a device here."""
    if device.type not in ("cpu", "cuda"):
        return False
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++"))


def lower_network(network: nn.Module, precision: Precision) -> nn.Module:
    """A copy of a network with its products in the precision's type; compiled on its first call if so wanted.

    Batch norms are folded into the convolutions before them (exact but for rounding). Weights of convolutions and
    linear layers are converted once; sums, norms and softmax stay with autocast (:func:`arithmetic`).
    """
    lowered = _fold_batch_norms(network)
    if precision.type != "fp32":
        for module in lowered.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(TYPES[precision.type])
    lowered = lowered.to(memory_format=torch.channels_last)
    if precision.compiled:
        lowered = torch.compile(lowered, options={"freezing": True})  # type: ignore[assignment]
    return lowered


def _fold_batch_norms(network: nn.Module) -> nn.Module:
    """A copy with each batch norm folded into its convolution, or a plain copy where torch cannot see through it."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return copy.deepcopy(network)
    try:
        folded: nn.Module = fuse(network)
    except Exception:  # torch.fx raises what the network's own code raises when traced
        return copy.deepcopy(network)
    return folded


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Run a network in a precision; fp32 is full float32, also where the device would round products (TF32)."""
    if precision.type != "fp32":
        with torch.autocast(device.type, TYPES[precision.type]):
            yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def probe_tiles(side: int) -> NDArray[np.uint8]:
    """A few tiles of real tissue to try a precision on: uint8 (4, side, side, 3).

    They come from scikit-image's immunohistochemistry picture (colon, H-DAB, 512 x 512), repeated for larger tiles.
    """
    from skimage.data import immunohistochemistry  # noqa: PLC0415 - only for this

    picture = immunohistochemistry()  # type: ignore[no-untyped-call]
    repeats = -(-(side + 256) // 512)
    wide = np.tile(picture, (repeats, repeats, 1))
    return np.stack([wide[y : y + side, x : x + side] for x, y in _PROBE_CORNERS])


def least_cosine(features: Tensor, reference: Tensor) -> float:
    """Least cosine between the rows of two (B, D); 0 where one is not finite."""
    cosine = torch.cosine_similarity(features.double(), reference.double(), dim=1)
    return float(torch.nan_to_num(cosine, nan=0.0).min())
