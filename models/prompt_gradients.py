"""Exact gradients of a whole bag through its encoder, in the memory of one chunk of tiles.

Source: J. Zhang et al., "Prompt-MIL" (arXiv 2303.12214), section 2.3. The loss depends on the tiles only through their
features h, so dL/dP = Σ over chunks of (∂h/∂P)ᵀ dL/dh. Three passes: all chunks without a graph give h; the head gives
the loss and dL/dh; each chunk is encoded again with a graph, its slice of dL/dh is propagated back, and the graph goes.

A chunk's second run repeats the random numbers of its first (torch's generators of the CPU and of the device), so
dropout, drop-path and random augmentation are the same in both, and the whole is what one graph over all chunks gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from wsi_engine.models.heads.base import Head
from wsi_engine.models.heads.output import HeadOutput
from wsi_engine.models.prompt import PromptError
from wsi_engine.models.prompt_tiles import Normalise, Tiles, cut_blocks, hold_blocks

CHUNK_TILES = 32
LEAST_AGREEMENT = {True: 0.05, False: 0.01}
"""By how much, in norm, features of the second run may be off the first, below float32 and in it."""


@dataclass(frozen=True, eq=False)
class BagStep:
    """What a step over one bag of N tiles gave, apart from the gradients.

    Attributes:
        loss: of the head, before ``scale``.
        output: of the head, without its graph.
        features: (N, D), without a graph.
    """

    loss: float
    output: HeadOutput
    features: Tensor


@dataclass(frozen=True)
class _Runner:
    """Pixels to features, and the circumstances of it."""

    encoder: Callable[[Tensor], Tensor]
    prepare: Callable[[Tensor], Tensor]
    device: torch.device
    autocast: torch.dtype | None

    def precision(self) -> Any:
        """A context: autocast where asked for; else whatever the caller is in."""
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()

    def run(self, pixels: Tensor, learn: bool) -> Tensor:
        """(n, H, W, 3) uint8 to (n, D), with a graph or without."""
        torch.clear_autocast_cache()  # in older torch, weights cast without gradients stay cut off from them
        with torch.set_grad_enabled(learn), self.precision():
            features = self.encoder(self.prepare(pixels.to(self.device, non_blocking=True)))
        if features.ndim != 2 or len(features) != len(pixels):
            raise PromptError(
                f"the encoder gave features of shape {tuple(features.shape)} for {len(pixels)} tiles; "
                "it must give one row of numbers for each tile"
            )
        return features


def encode_bag(
    encoder: Callable[[Tensor], Tensor],
    tiles: Tiles,
    *,
    device: torch.device | str = "cpu",
    prepare: Callable[[Tensor], Tensor] | None = None,
    chunk: int = CHUNK_TILES,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """The features of a bag, without gradients: (N, D) on the device. Arguments as of :func:`bag_backward`.

    Raises:
        PromptError: no tiles, or not uint8 (n, H, W, 3); a bad setting.
    """
    runner = _Runner(encoder, prepare or Normalise(), torch.device(device), autocast)
    parts = [runner.run(pixels, learn=False) for pixels in cut_blocks(hold_blocks(tiles), _check_chunk(chunk))]
    return torch.cat(_check_bag(parts))


def bag_backward(
    encoder: Callable[[Tensor], Tensor],
    head: Head,
    tiles: Tiles,
    label: int | Tensor,
    *,
    prepare: Callable[[Tensor], Tensor] | None = None,
    chunk: int = CHUNK_TILES,
    scale: float = 1.0,
    autocast: torch.dtype | None = None,
) -> BagStep:
    """Loss of a bag, and its gradients added to ``.grad`` of the head's parameters and of the encoder's.

    As ``(scale * head.loss(head(features), label)).backward()`` over one graph of all tiles, in the memory of a
    chunk's graph or of the head's, whichever is larger, besides pixels and features. A bag of one chunk is encoded
    once. Head and encoder stay in the mode they are in, and torch's generators are left as one graph would leave them.

    Args:
        encoder: normalised tiles (n, 3, H, W) to features (n, D), each row from its own tile alone: a
            :class:`~wsi_engine.models.prompt.PromptedViT`, or any network to be tuned. An encoder with nothing to
            learn is not run a second time beyond one chunk.
        head: takes the features, on the encoder's device, where everything is computed.
        tiles: uint8 tiles, see :data:`Tiles`; they must stay as they are until this returns.
        label: as ``head.loss`` takes it.
        prepare: from uint8 (n, H, W, 3) on the device to what the encoder takes; may augment, with random numbers of
            torch's global generators. Default: ImageNet's mean and deviation.
        chunk: tiles in one run of the encoder, at most; blocks are cut into chunks, and none spans two blocks.
        scale: factor of the gradients: 1 / bags where steps accumulate, or a loss scale for float16.
        autocast: torch.bfloat16 or torch.float16 to run encoder and head under autocast; None: as the caller runs.

    Returns:
        The loss, the head's output and the features.

    Raises:
        PromptError: no tiles, or not uint8 (n, H, W, 3); a bad setting; an encoder whose second run gave other
            features than its first, which would make the gradients wrong.
        HeadError: the head does not take these features or this label.
    """
    if not 0 < scale < float("inf"):
        raise PromptError(f"scale must be a positive number, not {scale!r}")
    runner = _Runner(encoder, prepare or Normalise(), next(head.parameters()).device, autocast)
    blocks = hold_blocks(tiles)
    pieces = cut_blocks(blocks, _check_chunk(chunk))
    first = list(islice(pieces, 2))
    if len(first) == 1:
        features = runner.run(first[0], learn=True)
        step, gradient = _pass_head(runner, head, features, label, scale)
        if features.requires_grad:
            torch.autograd.backward(features, gradient)
        return step
    states, parts = [], []
    for pixels in chain(first, pieces):
        states.append(_random_state(runner.device))
        parts.append(runner.run(pixels, learn=False))
    features = torch.cat(_check_bag(parts))
    del first, parts
    step, gradient = _pass_head(runner, head, features, label, scale)
    after = _random_state(runner.device)
    try:
        _pass_back(runner, cut_blocks(blocks, chunk), states, step.features, gradient)
    finally:
        _set_random_state(after, runner.device)
    return step


def _pass_head(
    runner: _Runner, head: Head, features: Tensor, label: int | Tensor, scale: float
) -> tuple[BagStep, Tensor]:
    """The head on features (N, D): its step, its own gradients, and the loss's by the features (N, D)."""
    leaf = features.detach().requires_grad_()
    torch.clear_autocast_cache()
    with torch.enable_grad(), runner.precision():
        output = head(leaf)
        loss = head.loss(output, label)
    torch.autograd.backward(loss * scale)
    gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    said = output.instance_logits
    plain = HeadOutput(
        output.logits.detach(), output.attention.detach(), output.embedding.detach(),
        None if said is None else said.detach(),
    )  # fmt: skip
    return BagStep(float(loss.detach()), plain, features.detach()), gradient


def _pass_back(
    runner: _Runner, pieces: Iterator[Tensor], states: Sequence[Any], features: Tensor, gradient: Tensor
) -> None:
    """Encode chunk by chunk again, as the first time, and propagate each chunk's rows of the gradient (N, D)."""
    start, off = 0, torch.zeros((), device=features.device)
    for state, pixels in zip(states, pieces, strict=False):  # states first, so as to take no chunk beyond
        _set_random_state(state, runner.device)
        again = runner.run(pixels, learn=True)
        if not again.requires_grad:
            return  # nothing in the encoder learns
        rows = slice(start, start + len(again))
        was = features[rows].float()
        # fmax passes over NaN: features that are not finite are the caller's to find in the loss
        off = torch.fmax(off, (again.detach().float() - was).norm() / was.norm().clamp_min(1e-12))
        torch.autograd.backward(again, gradient[rows])
        del again  # or its graph would wait for the next to be built
        start = rows.stop
    if start != len(features) or next(pieces, None) is not None:
        raise PromptError(
            f"the bag gave {len(features)} tiles in one pass and another number in the next; keep them all"
        )
    reduced = features.dtype not in {torch.float32, torch.float64} or torch.is_autocast_enabled(runner.device.type)
    if float(off) > LEAST_AGREEMENT[reduced or runner.autocast is not None]:
        raise PromptError(
            f"the encoder's features of the same tiles differed by {float(off):.0%} from one pass to the other, so the "
            "gradients are wrong; draw random numbers from torch's global generators alone, and change no tile"
        )


def _check_chunk(chunk: int) -> int:
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise PromptError(f"chunk must be a whole number of at least 1 tile, not {chunk!r}")
    return chunk


def _check_bag(parts: list[Tensor]) -> list[Tensor]:
    if not parts:
        raise PromptError("the bag holds no tiles; leave out slides on which no tissue was found")
    return parts


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """State of torch's generators of the CPU and of the device."""
    if device.type == "cpu":
        return torch.get_rng_state(), None
    place = () if device.type == "mps" else (device,)
    return torch.get_rng_state(), torch.get_device_module(device).get_rng_state(*place)


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Put back what :func:`_random_state` gave."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        place = () if device.type == "mps" else (device,)
        torch.get_device_module(device).set_rng_state(state[1], *place)
