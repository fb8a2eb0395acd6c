"""Grey reconstruction. Pixels beyond the border neither raise nor limit others."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels.grey import as_grey


@compiled
def _raise_row(
    here: NDArray[Any], other: NDArray[Any], limit: NDArray[Any], diagonal: bool, best: NDArray[Any]
) -> None:
    """Raise the row ``here`` to its neighbours in the row ``other``, into ``best``, under the limit; all (W + 2,)."""
    for x in range(1, here.size - 1):
        value = max(here[x], other[x])
        if diagonal:
            value = max(value, other[x - 1], other[x + 1])
        best[x] = min(value, limit[x])


@compiled
def _sweep_down(out: NDArray[Any], limit: NDArray[Any], diagonal: bool) -> None:
    """Raise each pixel, in raster order, to the highest of the neighbours before it, under its limit."""
    best = np.empty(out.shape[1], out.dtype)
    for y in range(1, out.shape[0] - 1):
        here, under = out[y], limit[y]
        _raise_row(here, out[y - 1], under, diagonal, best)
        value = here[0]
        for x in range(1, here.size - 1):
            value = max(best[x], min(value, under[x]))
            here[x] = value


@compiled
def _sweep_up(out: NDArray[Any], limit: NDArray[Any], diagonal: bool, queue: NDArray[np.int32]) -> int:
    """The same against raster order; queues the pixels that can still raise a neighbour after them, returns how many.

    ``room`` keeps, of the row and of the one below, the pixels that are under their limit, and infinity elsewhere.
    """
    width = out.shape[1]
    best = np.empty(width, out.dtype)
    room = np.full((2, width), np.inf, out.dtype)
    queued = 0
    for y in range(out.shape[0] - 2, 0, -1):
        here, under = out[y], limit[y]
        _raise_row(here, out[y + 1], under, diagonal, best)
        value = here[width - 1]
        for x in range(width - 2, 0, -1):
            value = max(best[x], min(value, under[x]))
            here[x] = value
        below, beside = room[(y + 1) % 2], room[y % 2]
        for x in range(1, width - 1):
            beside[x] = here[x] if here[x] < under[x] else np.inf
        for x in range(1, width - 1):
            lowest = min(below[x], beside[x + 1])
            if diagonal:
                lowest = min(lowest, below[x - 1], below[x + 1])
            if lowest < here[x]:
                queue[queued] = y * width + x
                queued += 1
    return queued


@compiled
def _spread_loop(
    out: NDArray[Any], limit: NDArray[Any], steps: NDArray[np.int64], queue: NDArray[np.int32], queued: int
) -> None:
    """Raise neighbours of queued pixels until none is left; ``out`` and ``limit`` flat, the queue a ring.

    A pixel waits in the queue at most once, so the ring never needs more places than there are pixels.
    """
    waits = np.zeros(out.size, np.bool_)
    for k in range(queued):
        waits[queue[k]] = True
    head, tail = 0, queued % queue.size
    while queued > 0:
        p = queue[head]
        head = head + 1 if head + 1 < queue.size else 0
        queued -= 1
        waits[p] = False
        for step in steps:
            q = p + step
            if out[q] < out[p] and out[q] < limit[q]:
                out[q] = min(out[p], limit[q])
                if not waits[q]:
                    waits[q] = True
                    queue[tail] = q
                    tail = tail + 1 if tail + 1 < queue.size else 0
                    queued += 1


@compiled
def _reconstruct_loop(out: NDArray[Any], limit: NDArray[Any], diagonal: bool) -> None:
    """Reconstruct by dilation in place; both (H + 2, W + 2), with −∞ around the border."""
    width = out.shape[1]
    queue = np.empty(out.size, np.int32)
    _sweep_down(out, limit, diagonal)
    queued = _sweep_up(out, limit, diagonal, queue)
    steps = np.array([-width, -1, 1, width, -width - 1, -width + 1, width - 1, width + 1])
    _spread_loop(out.reshape(-1), limit.reshape(-1), steps[: 8 if diagonal else 4], queue, queued)


def reconstruct(
    seed: NDArray[Any],
    mask: NDArray[Any],
    *,
    method: Literal["dilation", "erosion"] = "dilation",
    connectivity: Literal[4, 8] = 8,
) -> NDArray[Any]:
    """Reconstruct ``mask`` from ``seed``: the seed dilated again and again, never above the mask, until it is stable.

    By erosion: the seed eroded, never below the mask. The values equal those of
    ``skimage.morphology.reconstruction``, which returns floats.

    Args:
        seed: bool, integers of up to 32 bits, float32 or float64 (H, W), without NaN; nowhere above the mask (by
            erosion: nowhere below).
        mask: the same.
        method: ``"dilation"`` or ``"erosion"``.
        connectivity: neighbours of a pixel, 4 or 8.

    Returns:
        (H, W) of the dtype that holds both (``np.result_type``); empty for empty images.

    Raises:
        TypeError: ``seed`` or ``mask`` has another dtype.
        ValueError: the shapes differ, are not (H, W) or hold 2³¹ pixels or more, there is NaN, the seed lies beyond
            the mask, or ``method`` or ``connectivity`` is something else.

    Time: two sweeps over H · W, and what is left to spread, which is little unless the mask winds like a spiral.
    Source: L. Vincent, "Morphological grayscale reconstruction in image analysis", IEEE Trans. Image Processing 2
    (1993), section IV.D (fast hybrid).
    """
    start, limit = as_grey(seed, "reconstruct"), as_grey(mask, "reconstruct")
    if start.shape != limit.shape:
        raise ValueError(f"reconstruct takes a seed and a mask of one shape, not {start.shape} and {limit.shape}")
    if (start.shape[0] + 2) * (start.shape[1] + 2) >= 2**31:
        raise ValueError(f"reconstruct takes images of fewer than 2**31 pixels, not {start.shape}")
    if method not in ("dilation", "erosion"):
        raise ValueError(f'reconstruct knows the methods "dilation" and "erosion", not {method!r}')
    if connectivity not in (4, 8):
        raise ValueError(f"connectivity must be 4 or 8, not {connectivity!r}")
    if (start > limit if method == "dilation" else start < limit).any():
        where = "above" if method == "dilation" else "below"
        raise ValueError(f"reconstruct by {method} takes a seed that is nowhere {where} the mask")
    dtype = np.result_type(seed, mask)
    if start.size == 0:
        return np.empty(start.shape, dtype)
    working = np.result_type(start, limit)
    sign = np.negative if method == "erosion" else np.positive  # erosion is dilation upside down
    padded = np.full((2, start.shape[0] + 2, start.shape[1] + 2), -np.inf, working)
    inner = padded[:, 1:-1, 1:-1]
    sign(start, out=inner[0])
    sign(limit, out=inner[1])
    _reconstruct_loop(padded[0], padded[1], connectivity == 8)
    return np.asarray(sign(inner[0])).astype(dtype)
