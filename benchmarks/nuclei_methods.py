"""Methods of finding nuclei side by side: AJI, Dice and PQ on labelled images, and speed.

    python -m benchmarks.nuclei_methods [--data FOLDER] [--methods student,stain] [--weights FILE]
                                        [--scale-attention FILE]

Each folder of labelled images holds ``NAME.png`` beside ``NAME_label.png`` (uint16 instances). All images are taken for
0.25 µm per pixel. Labels are read here and nowhere in training.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks._common import describe_machine
from wsi_engine.metrics.nuclei import aji, dice, panoptic_quality
from wsi_engine.nuclei.method import NucleiMethod, create_method
from wsi_engine.nuclei.segmentation import segment_nuclei

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "nuclei"
SETS = ("monuseg_train", "dsb2018_he", "nucls")
IMAGE_MPP = 0.25


@dataclass(frozen=True)
class Score:
    """Means over the images of a set, and megapixels (of the images) per second."""

    aji: float
    dice: float
    pq: float
    speed: float


def read_pairs(folder: Path) -> list[tuple[NDArray[np.uint8], NDArray[np.int32]]]:
    """Image and label image of every labelled image of a folder, in order of their names."""
    pairs = []
    for path in sorted(folder.glob("*_label.png")):
        image = np.asarray(Image.open(path.with_name(path.name.replace("_label", ""))).convert("RGB"))
        pairs.append((image, np.asarray(Image.open(path)).astype(np.int32)))
    return pairs


def score_method(method: NucleiMethod, pairs: list[tuple[NDArray[np.uint8], NDArray[np.int32]]]) -> Score:
    """Mean scores of a method on a set, as ``wsi nuclei`` finds them; the time is that of the nuclei alone."""
    segment_nuclei(pairs[0][0], method, IMAGE_MPP)  # compiles loops
    rows, seconds, pixels = [], 0.0, 0
    for image, true in pairs:
        start = time.perf_counter()
        nuclei = segment_nuclei(image, method, IMAGE_MPP)
        seconds += time.perf_counter() - start
        found = nuclei.labels()
        pixels += true.size
        rows.append((aji(true, found), dice(true, found), panoptic_quality(true, found)[2]))
    return Score(*(float(value) for value in np.mean(rows, axis=0)), speed=pixels / 1e6 / seconds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of folders of labelled images")
    parser.add_argument("--methods", default="student,stain", help="names, with commas between them")
    parser.add_argument("--weights", help="weights of the student; the built-in ones where not given")
    parser.add_argument("--scale-attention", help="weights of wsi train nuclei, to compare with")
    options = parser.parse_args()
    print(describe_machine())
    weights = {"student": options.weights, "scale-attention": options.scale_attention}
    names = [*options.methods.split(","), *(["scale-attention"] if options.scale_attention else [])]
    methods = {name: create_method(name, weights.get(name), "cpu") for name in names}
    print(f"{'set':15} {'images':>6} {'method':16} {'AJI':>6} {'Dice':>6} {'PQ':>6} {'Mpx/s':>7}")
    for name in SETS:
        pairs = read_pairs(options.data / name)
        if not pairs:
            print(f"{name:15} no labelled images in {options.data / name}")
            continue
        for called, method in methods.items():
            score = score_method(method, pairs)
            print(
                f"{name:15} {len(pairs):6} {called:16} {score.aji:6.3f} {score.dice:6.3f} {score.pq:6.3f} "
                f"{score.speed:7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
