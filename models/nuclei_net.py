"""The student: a small U-Net that tells nuclei from the rest and how deep inside its nucleus each pixel lies.

Source of the shape: O. Ronneberger et al., "U-Net", MICCAI 2015; of the depth head: P. Naylor et al., "Segmentation of
nuclei in histopathology images by deep regression of the distance map", IEEE TMI 2019.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsi_engine.models.cards import CardFile

MEAN = (0.70, 0.55, 0.68)
"""Mean of R, G, B of H&E tissue, 0 … 1: an order of magnitude, the same for every picture."""

SPREAD = 0.22
"""Deviation that inputs are divided by."""

FINEST_MPP, COARSEST_MPP = 0.1, 2.0
"""Micrometres per pixel between which a network may work."""


@dataclass(frozen=True)
class NucleiNetSettings:
    """Shape of the network.

    Attributes:
        widths: channels at full resolution, half, a quarter and so on; two or more.
    """

    widths: tuple[int, ...] = (16, 32, 64, 96)

    def __post_init__(self) -> None:
        widths = tuple(self.widths)
        if len(widths) < 2 or not all(isinstance(w, int) and not isinstance(w, bool) and w > 0 for w in widths):
            raise ValueError(f"the network needs two or more widths of at least 1 channel, not {self.widths}")
        object.__setattr__(self, "widths", widths)


class NucleiNet(nn.Module):
    """Pictures to foreground and depth.

    Every step is a convolution, a norm with fixed statistics (in inference), a maximum or a nearest neighbour: an
    output pixel depends on the input within :attr:`reach` pixels and on nothing else. Pieces whose corners are whole
    multiples of :attr:`stride` apart, with that margin, therefore give what the whole picture gives.
    """

    def __init__(self, settings: NucleiNetSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or NucleiNetSettings()
        widths = self.settings.widths
        self.down = nn.ModuleList()
        before = 3
        for width in widths:
            self.down.append(nn.Sequential(*_convolve(before, width), *_convolve(width, width)))
            before = width
        self.up = nn.ModuleList()
        for width in reversed(widths[:-1]):
            self.up.append(nn.Sequential(*_convolve(before + width, width)))
            before = width
        self.head = nn.Conv2d(before, 2, 1)

    @property
    def stride(self) -> int:
        """Inputs must have sides that are multiples of this, in pixels."""
        return int(2 ** (len(self.settings.widths) - 1))

    @property
    def reach(self) -> int:
        """How far, in pixels, an input pixel can influence the output, at most."""
        deepest = len(self.settings.widths) - 1
        down = sum(2 * 2**level for level in range(deepest + 1))  # two convolutions a level
        pools = sum(2**level for level in range(deepest))
        up = sum(2**level + 2 ** (level + 1) - 1 for level in range(deepest))  # one convolution, and the repeat
        return int(down + pools + up)

    def forward(self, pixels: Tensor) -> Tensor:
        """Outputs of a batch.

        Args:
            pixels: floating (B, 3, H, W), 0 … 255; H and W multiples of :attr:`stride`.

        Returns:
            (B, 2, H, W): the logit of being in a nucleus, and the depth (0 at the outline, 1 at the innermost).
        """
        mean = torch.tensor(MEAN, dtype=pixels.dtype, device=pixels.device).view(1, 3, 1, 1)
        x = (pixels / 255 - mean) / SPREAD
        kept = []
        for level, block in enumerate(self.down):
            x = block(nn.functional.max_pool2d(x, 2) if level else x)
            kept.append(x)
        for block, beside in zip(self.up, reversed(kept[:-1]), strict=True):
            x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, beside], dim=1))
        out: Tensor = self.head(x)
        return out


def _convolve(before: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]


class NucleiNetError(ValueError):
    """A student network cannot be built, written or read."""


NUCLEI_FILE = CardFile(
    what="a nuclei network",
    key="wsi_engine.nuclei_net",
    version=1,
    entries={"widths": list, "mpp": float},
    writer="save_nuclei_net",
    refused=NucleiNetError,
    unreadable=NucleiNetError,
)


def save_nuclei_net(
    network: NucleiNet, path: str | os.PathLike[str], mpp: float, card: Mapping[str, Any] | None = None
) -> None:
    """Write a network as one safetensors file of float16 weights, replacing ``path`` in one step.

    Args:
        network: any.
        path: the file to write.
        mpp: micrometres per pixel of the pictures it was trained on.
        card: what else to keep (data, recipe, licence), anything JSON takes.

    Raises:
        NucleiNetError: the card claims one of the network's own entries, or holds what JSON cannot.
        OSError: the file cannot be written.
    """
    state = {name: tensor.half() for name, tensor in _floats(network).items()}
    NUCLEI_FILE.write(path, state, {"widths": list(network.settings.widths), "mpp": float(mpp)}, card)


def load_nuclei_net(path: str | os.PathLike[str]) -> tuple[NucleiNet, dict[str, Any]]:
    """Read a network: on the CPU, float32, in eval mode, and its card (``mpp`` and ``widths`` among its entries).

    Raises:
        NucleiNetError: no such file, not readable as safetensors, damaged, or of another kind of model.
    """
    tensors, found = NUCLEI_FILE.read(path)
    card = NUCLEI_FILE.require(found, Path(path))
    if not FINEST_MPP <= card["mpp"] <= COARSEST_MPP:
        raise NucleiNetError(
            f"the card in {path} gives {card['mpp']} µm per pixel, and nuclei are told at {FINEST_MPP}–{COARSEST_MPP}; "
            "save the network with its true mpp"
        )
    try:
        settings = NucleiNetSettings(tuple(card["widths"]))
        wanted = sum(9 * width**2 for width in settings.widths)  # of each level's second convolution
        if wanted > max(1 << 20, 2 * sum(tensor.numel() for tensor in tensors.values())):
            raise ValueError(f"widths {list(settings.widths)} are not those of its tensors")
        network = NucleiNet(settings)
    except (TypeError, ValueError) as error:
        raise NucleiNetError(f"the card in {path} describes no network that can be built ({error})") from error
    network.load_state_dict(NUCLEI_FILE.fit(tensors, _floats(network), str(path)), strict=False)
    return network.eval(), card


def _floats(network: NucleiNet) -> dict[str, Tensor]:
    """Weights and running statistics, without the counters of batches."""
    return {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
