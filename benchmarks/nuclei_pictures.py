"""Pictures of nuclei on real tissue for the documentation: ``python -m benchmarks.nuclei_pictures [--data FOLDER]``.

Shown are pictures in the public domain (CC0) alone: OpenSlide's CMU-1-Small-Region, the Data Science Bowl and NuCLS.
Outlines are green for the methods and yellow for the truth.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from benchmarks.nuclei_methods import IMAGE_MPP, read_pairs
from wsi_engine.kernels import trace_contours
from wsi_engine.metrics.nuclei import aji
from wsi_engine.nuclei.overlay import OUTLINE
from wsi_engine.nuclei.segmentation import segment_nuclei
from wsi_engine.picture import draw_scale_bar
from wsi_engine.slide import open_slide

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
OUT = Path(__file__).resolve().parents[1] / "docs" / "images"
TRUTH = (255, 215, 0)
FIELDS = ((820, 1180), (1480, 2380))
"""Corners of the fields of the slide, in its pixels."""

_FIELD_PX, _SCALE, _GAP = 340, 2, 8
_QUALITY = 75


def outline(image: NDArray[np.uint8], labels: NDArray[np.int32], colour: tuple[int, int, int]) -> Image.Image:
    """The image enlarged, with the outlines of its nuclei; labels may be of a finer scale."""
    height, width = image.shape[:2]
    picture = Image.fromarray(image).resize((width * _SCALE, height * _SCALE), Image.Resampling.BICUBIC)
    contours, pen = trace_contours(labels), ImageDraw.Draw(picture)
    for begin, end in zip(contours.offsets[:-1], contours.offsets[1:], strict=True):
        ring = (contours.points[begin:end] * (_SCALE * width / labels.shape[1])).tolist()
        pen.line([*map(tuple, ring), tuple(ring[0])], fill=colour, width=2)
    return picture


def write_caption(picture: Image.Image, text: str) -> Image.Image:
    """The picture with a line of text on white at its top."""
    pen = ImageDraw.Draw(picture)
    box = pen.textbbox((8, 6), text, font_size=18)
    pen.rectangle((box[0] - 4, box[1] - 3, box[2] + 4, box[3] + 3), fill=(255, 255, 255))
    pen.text((8, 6), text, fill=(0, 0, 0), font_size=18)
    return picture


def join_pictures(rows: list[list[Image.Image]]) -> Image.Image:
    """Rows of pictures of one size on white."""
    width, height = rows[0][0].size
    page = Image.new("RGB", (len(rows[0]) * (width + _GAP) - _GAP, len(rows) * (height + _GAP) - _GAP), (255, 255, 255))
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            page.paste(picture, (column * (width + _GAP), row * (height + _GAP)))
    return page


def compare_methods(folder: Path, chosen: tuple[int, ...], methods: tuple[str, ...]) -> Image.Image:
    """A row for each chosen image: truth, then each method with its AJI."""
    pairs, rows = read_pairs(folder), []
    for k in chosen:
        image, true = pairs[k]
        row = [write_caption(outline(image, true, TRUTH), "labels")]
        for method in methods:
            found = segment_nuclei(image, method, IMAGE_MPP).labels()
            row.append(write_caption(outline(image, found, OUTLINE), f"{method}: AJI {aji(true, found):.2f}"))
        rows.append(row)
    return join_pictures(rows)


def draw_fields(path: Path) -> Image.Image:
    """Fields of a slide with the nuclei of the default method."""
    pictures = []
    with open_slide(path) as slide:
        nuclei = segment_nuclei(slide)
        for x, y in FIELDS:
            labels = nuclei.labels((2 * _FIELD_PX, 2 * _FIELD_PX), (x, y, _FIELD_PX, _FIELD_PX))
            picture = outline(slide.read_region(x, y, _FIELD_PX, _FIELD_PX), labels, OUTLINE)
            draw_scale_bar(picture, slide.mpp[0] / _SCALE)
            pictures.append(picture)
    return join_pictures([pictures])


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of slides/ and nuclei/")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    methods = ("stain", "student", "scale-attention")
    pages = {
        "nuclei-slide": draw_fields(options.data / "slides" / "CMU-1-Small-Region.svs"),
        "nuclei-dsb2018": compare_methods(options.data / "nuclei" / "dsb2018_he", (20, 60), methods),
        "nuclei-nucls": compare_methods(options.data / "nuclei" / "nucls", (3, 8), methods),
    }
    for name, page in pages.items():
        path = options.out / f"{name}.jpg"
        page.save(path, quality=_QUALITY)
        print(f"{path}: {page.size[0]} × {page.size[1]}, {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
