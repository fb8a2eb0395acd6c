"""Label images of nuclei on disk, compared with true ones image by image."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import InputError, WsiError, first_line
from wsi_engine.metrics.nuclei import NucleiScores, score_nuclei

_ENDINGS = (".png", ".tif", ".tiff", ".npy")
_MARKS = ("_label", "_labels", ".labels")
"""What a file's stem ends in where pictures lie beside their label images."""


@dataclass(frozen=True)
class ScoredImage:
    """One image: its ``scores``, or ``problem``, why it has none."""

    name: str
    scores: NucleiScores | None = None
    problem: str = ""


@dataclass(frozen=True)
class NucleiComparison:
    """Every true image in order of their names; ``unused`` are predictions without truth."""

    images: tuple[ScoredImage, ...]
    unused: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[ScoredImage, ...]:
        """Images that could not be compared."""
        return tuple(image for image in self.images if image.scores is None)

    def means(self) -> dict[str, float]:
        """Mean of each score over the images; of distances over those where they are defined; of counts, the sums."""
        scored = [image.scores for image in self.images if image.scores is not None]
        out = {}
        for one in fields(NucleiScores):
            values = np.array([getattr(scores, one.name) for scores in scored], np.float64)
            values = values[~np.isnan(values)]
            mean = values.mean() if len(values) else math.nan
            out[one.name] = float(values.sum() if one.type == "int" else mean)
        return out

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain JSON values; what is not defined is null."""
        images = [
            {"name": image.name, "problem": image.problem or None}
            | _plain(asdict(image.scores) if image.scores else {})
            for image in self.images
        ]
        return {"images": images, "mean": _plain(self.means()), "unused": list(self.unused)}


def compare_nuclei(
    predicted: str | os.PathLike[str],
    truth: str | os.PathLike[str],
    progress: Callable[[ScoredImage], None] | None = None,
) -> NucleiComparison:
    """Compare predicted nuclei with true ones, image by image.

    Args:
        predicted: a label image (PNG, TIFF or NPY, whole numbers, 0 outside nuclei), or a folder of them.
        truth: the same. Images of folders are matched by name, without ``_label``, ``_labels`` or ``.labels`` and
            without the method that ``wsi nuclei`` adds; where a folder holds files marked so, the others, pictures,
            are passed over. Two single images need not have the same name.
        progress: told of each image.

    Returns:
        an entry for each true image, also where there is no prediction for it.

    Raises:
        InputError: there is nothing at a path, or a folder holds no label image or two of one name.
    """
    ours, theirs = list_label_images(Path(predicted)), list_label_images(Path(truth))
    if Path(truth).is_file() and Path(predicted).is_file():
        ours = dict(zip(theirs, ours.values(), strict=True))
    images = []
    for image in _score_all(ours, theirs):
        images.append(image)
        if progress:
            progress(image)
    return NucleiComparison(tuple(images), tuple(sorted(ours.keys() - theirs.keys())))


def _score_all(ours: dict[str, Path], theirs: dict[str, Path]) -> Iterator[ScoredImage]:
    for name, path in sorted(theirs.items()):
        if name not in ours:
            yield ScoredImage(name, problem="no predicted image of this name; predict it, or take it out of the truth")
            continue
        try:
            yield ScoredImage(name, score_nuclei(read_labels(path), read_labels(ours[name])))
        except WsiError as error:
            yield ScoredImage(name, problem=str(error))


def list_label_images(path: Path) -> dict[str, Path]:
    """Label images by name: a file, or those of a folder.

    Raises:
        InputError: there is nothing at the path, or a folder holds no label image or two of one name.
    """
    if path.is_file():
        return {_name(path): path}
    if not path.is_dir():
        raise InputError(f"there is nothing at {path}; name a label image or a folder of them")
    files = [one for one in sorted(path.iterdir()) if one.suffix.lower() in _ENDINGS and not one.name.startswith(".")]
    marked = [one for one in files if one.stem.endswith(_MARKS)]
    found: dict[str, Path] = {}
    for one in marked or files:
        name = _name(one)
        if name in found:
            raise InputError(f"{path} holds two label images of {name}: {found[name].name} and {one.name}; keep one")
        found[name] = one
    if not found:
        raise InputError(f"{path} holds no label images (PNG, TIFF or NPY); name their folder")
    return found


def _name(path: Path) -> str:
    """Name of the picture that a label image belongs to."""
    from wsi_engine.nuclei.method import METHOD_HOMES  # noqa: PLC0415

    for mark in _MARKS:
        if path.stem.endswith(mark):
            stem = path.stem.removesuffix(mark)
            head, _, method = stem.rpartition(".")
            return head if head and method in METHOD_HOMES else stem
    return path.stem


def read_labels(path: Path) -> NDArray[np.integer[Any]]:
    """A label image: integer (H, W).

    Raises:
        InputError: the file cannot be read, or holds no whole numbers in one channel.
    """
    try:
        values = _read(path)
    except Exception as error:  # every decoder has errors of its own
        raise InputError(f"cannot read the label image {path} ({first_line(error)}); write it again") from error
    if values.dtype == bool:
        values = values.astype(np.uint8)
    if values.ndim != 2 or values.dtype.kind not in "iu":
        raise InputError(
            f"{path} holds {values.dtype} {values.shape} and no label image; give one channel of whole numbers, a "
            "number for each nucleus"
        )
    return values


def _read(path: Path) -> NDArray[Any]:
    if path.suffix.lower() == ".npy":
        return np.asarray(np.load(path, allow_pickle=False))
    if path.suffix.lower() in (".tif", ".tiff"):
        from tifffile import imread  # noqa: PLC0415

        return np.asarray(imread(path))
    from PIL import Image  # noqa: PLC0415

    with Image.open(path) as image:
        return np.asarray(image)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}
