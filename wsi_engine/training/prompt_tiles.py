"""Tiles of whole slides for training: decoded when a step needs them, kept while memory allows, turned at random."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wsi_engine.bags import prefetch
from wsi_engine.grid import TileGrid
from wsi_engine.inputs import SlideSource
from wsi_engine.memory import available_memory
from wsi_engine.models.prompt_gradients import encode_bag
from wsi_engine.slide import open_slide
from wsi_engine.stream import stream_tiles

Request: TypeAlias = tuple[int, "NDArray[np.int64] | None"]
"""Place of a slide, and which rows of its grid; None for all."""

_BATCH = 64
_TURNS = 8


class SlideTiles:
    """The tiles of many slides as pixels; safe from several threads.

    Args:
        sources: the slides.
        grids: their grids, of tiles of one size.
        reader: ``auto`` or one reader's name.
        workers: threads that decode a slide.
        keep_share: part of the memory available now that slides once decoded may take; pixels that were kept are the
            same as decoded anew.
    """

    def __init__(
        self,
        sources: Sequence[SlideSource],
        grids: Sequence[TileGrid],
        reader: str = "auto",
        workers: int | None = None,
        keep_share: float = 0.25,
    ) -> None:
        self._sources, self._grids, self._reader, self._workers = sources, grids, reader, workers
        self._left = int(available_memory() * keep_share)
        self._kept: dict[int, NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sources)

    def tiles(self, place: int) -> int:
        """Number of tiles of a slide."""
        return len(self._grids[place])

    def read(self, place: int, rows: NDArray[np.int64] | None = None) -> NDArray[np.uint8]:
        """Pixels uint8 (n, side, side, 3) of the rows of a slide's grid, ascending; None for all, which may be kept.

        Raises:
            SlideError: the slide cannot be read; the message names it.
        """
        with self._lock:
            kept = self._kept.get(place)
        if kept is not None:
            return kept if rows is None else kept[rows]
        pixels = self._decode(place, rows)
        with self._lock:
            if rows is None and place not in self._kept and pixels.nbytes <= self._left:
                self._kept[place] = pixels
                self._left -= pixels.nbytes
        return pixels

    def _decode(self, place: int, rows: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        source, grid = self._sources[place], self._grids[place]
        count = len(grid) if rows is None else len(rows)
        pixels = np.empty((count, grid.tile_px, grid.tile_px, 3), np.uint8)
        start = 0
        with open_slide(source.path, source.mpp, self._reader) as slide:
            for batch in stream_tiles(slide, grid, min(_BATCH, count), self._workers, rows):
                pixels[start : start + len(batch)] = batch.pixels
                start += len(batch)
        return pixels


@dataclass(frozen=True)
class _Requests:
    """Requests as a source of bags, to be loaded ahead."""

    tiles_of: SlideTiles
    wanted: Sequence[Request]
    dim: int = 0

    def __len__(self) -> int:
        return len(self.wanted)

    def tiles(self, place: int) -> int:
        """Number of tiles of a request."""
        slide, rows = self.wanted[place]
        return self.tiles_of.tiles(slide) if rows is None else len(rows)

    def load(self, place: int) -> NDArray[Any]:
        """Pixels of a request."""
        return self.tiles_of.read(*self.wanted[place])


def read_ahead(tiles: SlideTiles, wanted: Sequence[Request]) -> Generator[tuple[int, NDArray[np.uint8]]]:
    """Places and pixels in the order asked for; the next is decoded while one is used."""
    with closing(prefetch(_Requests(tiles, wanted), range(len(wanted)), workers=1, ahead=1)) as ahead:
        for number, pixels in ahead:
            found: NDArray[Any] = pixels
            yield wanted[number][0], found
            del pixels, found  # or two slides would be held beside the one that is under way


@dataclass(frozen=True)
class EncodedBags:
    """Slides as bags of features, encoded anew each time they are loaded; the encoder's mode is the caller's.

    Attributes:
        slides: where tiles come from.
        encoder: normalised tiles (n, 3, h, w) to features (n, dim).
        prepare: pixels to what the encoder takes.
        dim: numbers per tile.
        device: where it runs.
        chunk: tiles at a time.
        autocast: the type it computes in; None for that of its weights.
    """

    slides: SlideTiles
    encoder: nn.Module
    prepare: Callable[[Tensor], Tensor]
    dim: int
    device: torch.device
    chunk: int
    autocast: torch.dtype | None = None

    def __len__(self) -> int:
        return len(self.slides)

    def tiles(self, place: int) -> int:
        """Number of tiles of a slide."""
        return self.slides.tiles(place)

    def load(self, place: int) -> NDArray[np.float32]:
        """Features float32 (N, dim) of a slide."""
        return self._encode(self.slides.read(place))

    def load_ahead(self, places: Sequence[int]) -> Generator[tuple[int, NDArray[np.float32]]]:
        """Places and features in the order asked for; the next slide is decoded while one is encoded."""
        with closing(read_ahead(self.slides, [(place, None) for place in places])) as ahead:
            for place, pixels in ahead:
                yield place, self._encode(pixels)

    def _encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        features = encode_bag(
            self.encoder, pixels, device=self.device, prepare=self.prepare, chunk=self.chunk, autocast=self.autocast
        )
        found: NDArray[np.float32] = features.float().cpu().numpy()
        return found


def turn_tiles(pixels: Tensor) -> Tensor:
    """Mirror and turn each square tile by one of the eight ways that keep it square, drawn by torch's generator.

    uint8 (n, H, H, 3) to the same; a copy.
    """
    ways = torch.randint(_TURNS, (len(pixels),)).to(pixels.device)
    turned = torch.empty_like(pixels, memory_format=torch.contiguous_format)
    for way in range(_TURNS):
        own = ways == way
        tiles = pixels[own]
        turned[own] = torch.rot90(tiles.flip(1) if way >= _TURNS // 2 else tiles, way % 4, (1, 2))
    return turned
