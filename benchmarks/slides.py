"""Slides to measure with, written once into ``benchmarks/.slides`` and kept there."""

from __future__ import annotations

from pathlib import Path

from wsi_engine.synthetic import write_ihc_slide
from wsi_engine.tiffwriter import TiffLayout

FOLDER = Path(__file__).parent / ".slides"
LAYOUT = TiffLayout(level_step=4)
"""As scanners write them: JPEG tiles of 256 px, levels 1, 4, 16 …"""


def big_slide(side: int = 16_384) -> Path:
    """A slide of ``side``² px at 0.25 mpp with the texture of scikit-image's immunohistochemistry picture."""
    return _written(FOLDER / f"ihc-{side}.svs", side, 0)


def small_slides(count: int = 20, side: int = 4_096) -> Path:
    """A folder of small slides of the same texture."""
    folder = FOLDER / f"small-{count}x{side}"
    for number in range(count):
        _written(folder / f"small-{number:02d}.svs", side, number)
    return folder


def _written(path: Path, side: int, seed: int) -> Path:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_ihc_slide(path, side, side, layout=LAYOUT, seed=seed)
    return path
