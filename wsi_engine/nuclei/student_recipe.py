"""Make the student's weights: ``python -m wsi_engine.nuclei.student_recipe OUT SOURCE[@MPP][*WEIGHT] …``.

A source is an image, a slide, or a folder of images (files named ``*_label*`` or ``*_foreground*`` are passed over, so
that no label is ever read). ``@MPP`` gives micrometres per pixel where the file does not (0.25 for plain images);
``*WEIGHT`` says how often a megapixel of the source is drawn beside the others.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from wsi_engine.errors import InputError
from wsi_engine.models.nuclei_net import NucleiNet, load_nuclei_net, save_nuclei_net
from wsi_engine.nuclei.student_scenes import SCENE_MPP
from wsi_engine.nuclei.student_training import StudentTrainingSettings, TrainingImage, train_student
from wsi_engine.slide import open_slide

FIELD_PX = 512
"""Side of the pieces that a slide is read in, at 0.5 µm per pixel."""

PICTURES = (".png", ".jpg", ".jpeg", ".bmp")
_IMAGE_MPP = 0.25
_LEAST_COLOUR = 20
"""Range of R, G, B from which a pixel counts as stained."""


def read_source(text: str) -> list[TrainingImage]:
    """Pieces of tissue of a source ``PATH[@MPP][*WEIGHT]``.

    Raises:
        InputError: there is nothing at the path, or a number is none.
    """
    place, _, weight = text.partition("*")
    place, _, mpp = place.partition("@")
    path = Path(place)
    try:
        factor, given = float(weight or 1), float(mpp) if mpp else None
    except ValueError as error:
        raise InputError(f"the source {text!r} is not PATH[@MPP][*WEIGHT]; give numbers after @ and *") from error
    if not path.exists():
        raise InputError(f"there is nothing at {path}; check the path")
    files = [one for one in sorted(path.iterdir()) if one.suffix.lower() in PICTURES] if path.is_dir() else [path]
    files = [one for one in files if "_label" not in one.stem and "_foreground" not in one.stem]
    pieces = [piece for one in files for piece in _read_file(one, given)]
    return [dataclasses.replace(one, weight=factor * one.pixels.shape[0] * one.pixels.shape[1] / 1e6) for one in pieces]


def _read_file(path: Path, mpp: float | None) -> Iterator[TrainingImage]:
    """The pieces of a picture or slide that hold tissue, at 0.5 µm per pixel."""
    mpp = _IMAGE_MPP if mpp is None and path.suffix.lower() in PICTURES else mpp
    with open_slide(path, mpp=mpp) as slide:
        width, height = slide.dimensions
        step = FIELD_PX * SCENE_MPP / slide.mpp[0]
        for row in range(max(1, round(height / step))):
            for column in range(max(1, round(width / step))):
                left, top = round(column * step), round(row * step)
                wide = min(FIELD_PX, int((width - left) * slide.mpp[0] / SCENE_MPP))
                high = min(FIELD_PX, int((height - top) * slide.mpp[0] / SCENE_MPP))
                pixels = slide.read_region(left, top, wide, high, mpp=SCENE_MPP)
                if (np.ptp(pixels, axis=-1) > _LEAST_COLOUR).mean() > 0.2:
                    yield TrainingImage(pixels, SCENE_MPP, name=f"{path.name} {left},{top}")


def stage_file(out: Path, stage: int) -> Path:
    """Where the network of a stage is kept: beside the file of the weights."""
    return out.with_suffix(f".stage{stage}.safetensors")


def main() -> None:
    """Train and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="safetensors file to write")
    parser.add_argument("sources", nargs="*", help="images, slides and folders")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="sums differ in their last bits with their number")
    parser.add_argument("--licence", default="Apache-2.0", help="of the weights; the strictest of the sources'")
    parser.add_argument("--stages", action="store_true", help="keep the network of every stage beside OUT")
    parser.add_argument("--done", type=int, default=-1, help="go on after this stage, kept by --stages before")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = StudentTrainingSettings(seed=options.seed, device=options.device)
    images = [image for source in options.sources for image in read_source(source)]

    def keep(stage: int, network: NucleiNet) -> None:
        if options.stages:
            save_nuclei_net(network, stage_file(options.out, stage), SCENE_MPP)

    done = (options.done, load_nuclei_net(stage_file(options.out, options.done))[0]) if options.done >= 0 else None
    network = train_student(images, settings, lambda line: print(line, flush=True), keep, done)
    card = {
        "licence": options.licence,
        "summary": "foreground and depth of nuclei in H&E tissue, trained without labels",
        "sources": [Path(source.partition("*")[0].partition("@")[0]).name for source in options.sources],
        "settings": dataclasses.asdict(settings),
    }
    save_nuclei_net(network, options.out, SCENE_MPP, card)
    options.out.chmod(0o644)  # safetensors writes for the owner alone


if __name__ == "__main__":
    main()
