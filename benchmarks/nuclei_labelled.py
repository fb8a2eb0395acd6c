"""What the student's network reaches when it is shown labels: a yardstick for training without them.

    python -m benchmarks.nuclei_labelled [--data FOLDER] [--set NAME] [--steps N]

In two folds the built-in weights are trained on the labels of every second picture of a set and measured on the others.
Nothing of it is kept: the engine ships no weights that saw a label.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks._common import describe_machine
from benchmarks.nuclei_methods import DATA, IMAGE_MPP, read_pairs, score_method
from wsi_engine.models.nuclei_net import NucleiNet, load_nuclei_net, save_nuclei_net
from wsi_engine.nuclei.images import resample_image, resample_labels
from wsi_engine.nuclei.student_batches import Batcher, Field, make_field
from wsi_engine.nuclei.student_inference import SplitSettings
from wsi_engine.nuclei.student_method import BUILTIN_WEIGHTS, StudentMethod
from wsi_engine.nuclei.student_scenes import SCENE_MPP
from wsi_engine.nuclei.student_training import StudentTrainingSettings, optimise

TILES, RATE = 6, 1.2e-3
SPLITS = (SplitSettings(), SplitSettings(threshold=0.5, least_score=0.6))
"""The built-in weights' settings, and what suits a network whose labels have no doubtful pixels."""


def label_field(image: NDArray[np.uint8], labels: NDArray[np.int32]) -> Field:
    """A picture with its true labels, at the network's scale."""
    pixels = resample_image(image, IMAGE_MPP, SCENE_MPP)
    return make_field(pixels, resample_labels(labels, *pixels.shape[:2]))


def train_on(fields: list[Field], steps: int, seed: int) -> NucleiNet:
    """The built-in network after some steps on labelled pictures."""
    settings = StudentTrainingSettings(seed=seed)
    torch.manual_seed(seed)
    network = load_nuclei_net(BUILTIN_WEIGHTS)[0].to(memory_format=torch.channels_last)
    optimise(network, [Batcher(fields, settings.side, seed)], (TILES,), steps, RATE, settings, lambda line: None)
    return network


def main() -> None:
    """Print the AJI on the pictures that were held out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of labelled sets")
    parser.add_argument("--set", default="monuseg_train", help="which of them")
    parser.add_argument("--steps", type=int, default=1200)
    options = parser.parse_args()
    print(describe_machine())
    pairs = read_pairs(options.data / options.set)
    sums = np.zeros(len(SPLITS))
    for fold in range(2):
        fields = [label_field(*pair) for number, pair in enumerate(pairs) if number % 2 != fold]
        held_out = pairs[fold::2]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "labelled.safetensors")
            save_nuclei_net(train_on(fields, options.steps, fold), path, SCENE_MPP)
            scores = [score_method(StudentMethod(path, settings=split), held_out).aji for split in SPLITS]
        sums += np.array(scores) * len(held_out)
        print(f"fold {fold}, {len(held_out)} pictures: " + ", ".join(f"{score:.3f}" for score in scores), flush=True)
    for split, total in zip(SPLITS, sums / len(pairs), strict=True):
        print(f"threshold {split.threshold:g}, least score {split.least_score:g}: AJI {total:.3f}")


if __name__ == "__main__":
    main()
