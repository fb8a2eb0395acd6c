"""Peak memory of an extraction from a thousand tiles to two hundred thousand: ``python -m benchmarks.memory``."""

from __future__ import annotations

import subprocess
import sys
import tempfile

import numpy as np
from numpy.typing import NDArray

from benchmarks._common import describe_machine, peak_memory
from benchmarks.slides import big_slide
from wsi_engine import TissueMask, extract
from wsi_engine.encoders.base import EncoderCard

STRIDE_PX = 36
BANDS_PX = (328, 16_384)
"""Heights of tissue at 0.25 mpp, 16,384 px wide: of tiles that overlap, a thousand and two hundred thousand."""


class MeanEncoder:
    """As good as free: the mean colour, repeated to 1,024 numbers."""

    precision = "fp32"
    card = EncoderCard("mean", "timm", "mean", 0, 1024, "none", "open", weights="none", weights_digest="0" * 64)

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Mean of every 16th pixel: float32 (B, 1024)."""
        mean = pixels[:, ::16, ::16].reshape(len(pixels), -1, 3).mean(axis=1, dtype=np.float32)
        return np.tile(mean, (1, 342))[:, :1024]


def main() -> None:
    """Run each in a process of its own and print its peak."""
    if len(sys.argv) > 1:
        mask = np.zeros((512, 512), bool)  # of 8 µm
        mask[: int(sys.argv[1]) // 32] = True
        with tempfile.TemporaryDirectory() as out:
            settings = {"mpp": 0.25, "stride_px": STRIDE_PX, "min_tissue": 0.9}
            report = extract(big_slide(), out, MeanEncoder(), tissue=TissueMask(mask, 8.0), **settings)
        peak = peak_memory()
        print(f"{report.tiles} {peak:.0f} {report.wall_seconds:.1f}")
        return
    print(describe_machine())
    first = 0.0
    for height in BANDS_PX:
        command = [sys.executable, "-m", "benchmarks.memory", str(height)]
        tiles, peak, wall = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        first = first or float(peak)
        print(f"| {int(tiles):,} tiles | {peak} MiB | {float(peak) / first:.2f} of the first | {wall} s |", flush=True)


if __name__ == "__main__":
    main()
