"""How near features of the fast ways come to those of the exact ones: ``python -m benchmarks.fidelity [SLIDE …]``.

Cosines tile by tile, on the slides given or on a slide of real texture, for shrinking while decoding and for bf16.
"""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray

from benchmarks.slides import big_slide
from wsi_engine import create_encoder, lay_grid, open_slide, stream_tiles
from wsi_engine.bench import some_tiles
from wsi_engine.encoders.base import Encoder

ENCODERS = ("resnet50", "vit_small_patch16_224", "texture")
SCALES = (0.5, 1.0, 2.0)


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of each row of two (N, D)."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    return (x * y).sum(axis=1) / np.maximum(np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1), 1e-12)


def features(encoder: Encoder, path: str, mpp: float, exact: bool, tiles: int = 96) -> NDArray[np.float32] | None:
    """Features of some tiles with tissue; None where the slide gives no choice of resampling at this scale."""
    with open_slide(path) as slide:
        if slide.sampling(mpp).reduce == 1 or mpp / slide.mpp[0] * 256 > max(slide.dimensions):
            return None
        grid = some_tiles(slide, lay_grid(slide, mpp=mpp), tiles)
        return np.concatenate([encoder.encode(batch.pixels) for batch in stream_tiles(slide, grid, 32, exact=exact)])


def report(path: str, encoder: str, mpp: float, what: str, near: NDArray[np.float64]) -> None:
    """One line of the table: median and least cosine."""
    name = path.rsplit("/", 1)[-1]
    print(f"| {name} | {encoder} | {mpp} | {what} | {np.median(near):.5f} | {near.min():.5f} |", flush=True)


def main() -> None:
    """Print a line for each slide, encoder and scale."""
    for path in sys.argv[1:] or [str(big_slide())]:
        for name in ENCODERS:
            weights = None if name == "texture" else "random:0"
            exact = create_encoder(name, weights, "cpu", "fp32")
            for mpp in SCALES:
                plain, fast = (features(exact, path, mpp, choice) for choice in (True, False))
                if plain is None or fast is None:
                    continue
                near = cosines(plain, fast)
                report(path, name, mpp, "DCT scaling", near)
            with open_slide(path) as slide:
                pixels = next(iter(stream_tiles(slide, some_tiles(slide, lay_grid(slide, mpp=0.5), 32), 32))).pixels
            if name != "texture":
                low = create_encoder(name, weights, "cpu")
                near = cosines(exact.encode(pixels), low.encode(pixels))
                report(path, name, 0.5, low.precision, near)


if __name__ == "__main__":
    main()
