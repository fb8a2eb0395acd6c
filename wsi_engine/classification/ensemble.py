"""The heads of a training run as one classifier: calibrated, averaged over folds, and honest about its doubt.

The folds' probabilities p_f, each calibrated as softmax(log p / T_f) with the temperature its validation slides gave
(Guo et al., ICML 2017), are averaged with equal weight. Their mean's entropy is the doubt in all; the part of it that
comes from the folds contradicting each other, the mutual information H(mean p) − mean H(p), is the disagreement
(Lakshminarayanan et al., NeurIPS 2017; Depeweg et al., ICML 2018). Both are in units of ln C: 0 to 1.

Attention is averaged as weights, each fold's softmax over the slide's tiles: raw scores of two folds have no common
zero and no common scale, while weights all say "share of the slide's embedding" and still sum to 1 after averaging.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear

from wsi_engine.classification.prediction import Prediction, calibrate, measure_entropy
from wsi_engine.encoders.precision import Precision, arithmetic, choose_precision, lower_network
from wsi_engine.errors import ModelError, SettingsError
from wsi_engine.memory import keep_freed_memory
from wsi_engine.models import Head, HeadError, load_head, read_head_card
from wsi_engine.runs import FeatureOrigin, RunFolder
from wsi_engine.workers import usable_cores

LOWERED_HEADS = ("clam_sb", "clam_mb", "abmil")
"""Heads that ``auto`` computes in the device's fast type. DSMIL picks one critical tile per class, which rounding can
change, and TransMIL's pseudo-inverse amplifies rounding: both stay in fp32."""

_NARROW = 64
"""Layers of fewer outputs (scores, logits) stay in fp32, where they cost nothing: tiles keep distinct ranks."""

_CONVERTED_ROWS = 1024
"""Rows converted at a time: few enough to stay in the processor's cache."""


@dataclass(frozen=True, eq=False)
class FoldHead:
    """The head of one fold and its temperature."""

    head: Head
    temperature: float


class Ensemble:
    """All folds of a run, ready to predict. Made by :func:`load_ensemble`; one caller at a time."""

    def __init__(
        self,
        name: str,
        folds: tuple[FoldHead, ...],
        classes: tuple[str, ...],
        features: FeatureOrigin,
        digest: str,
        device: str = "auto",
        precision: str = "auto",
    ) -> None:
        """Move the heads to a device and into a precision; :func:`load_ensemble` explains the arguments."""
        self.name = name
        """Name of the run."""
        self.classes = classes
        """Classes in the order of probabilities."""
        self.features = features
        """What it takes."""
        self.digest = digest
        """SHA-256 over the bytes of the head files in the order of folds, calibration included."""
        self._device = _choose_device(device)
        if self._device.type == "cpu":
            keep_freed_memory()
            torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
        self._precision = _choose_precision(precision, self._device, folds[0].head.name)
        self._folds = tuple(FoldHead(_lower(fold.head, self._precision, self._device), fold.temperature)
                            for fold in folds)  # fmt: skip

    @property
    def folds(self) -> int:
        """How many heads are averaged."""
        return len(self._folds)

    @property
    def head(self) -> str:
        """Name of the heads, such as ``clam_sb``."""
        return self._folds[0].head.name

    @property
    def precision(self) -> str:
        """Arithmetic of the heads."""
        return str(self._precision)

    @property
    def device(self) -> str:
        """Where the heads run, by torch's name."""
        return str(self._device)

    def predict(
        self, features: NDArray[np.float16] | NDArray[np.float32], grid_digest: str = "", where: str = "the slide"
    ) -> Prediction:
        """Classify one slide.

        Args:
            features: float16 or float32 (N, D) of its tiles, by the encoder that :attr:`features` names; not changed.
            grid_digest: of the tiles, kept in the prediction.
            where: names the slide in messages.

        Raises:
            ModelError: there is no tile, the features are of another width or kind, or one is not finite.
        """
        bag = self._to_device(_check_features(features, self.features.dim, where), where)
        probabilities, weights = [], None
        for fold in self._folds:
            found, attention = self._run_fold(fold, bag, where)
            probabilities.append(found)
            weights = attention if weights is None else weights + attention
        assert weights is not None
        return self._summarise(np.stack(probabilities), (weights / self.folds).cpu().numpy(), grid_digest)

    def _run_fold(self, fold: FoldHead, bag: Tensor, where: str) -> tuple[NDArray[np.float64], Tensor]:
        """Calibrated probabilities (C,) and attention weights (N, K) of one head."""
        try:
            with torch.inference_mode(), arithmetic(self._precision, self._device):
                output = fold.head(bag)
                probabilities = fold.head.probabilities(output.logits).cpu().numpy()
                weights = output.weights()
        except HeadError as error:
            raise ModelError(f"{where}: {error}") from error
        if not np.isfinite(probabilities).all():
            raise ModelError(
                f"the model gave probabilities that are not finite for {where}: look at its features, which may be "
                "far out of the range that it was trained on"
            )
        return calibrate(probabilities, fold.temperature), weights

    def _to_device(self, features: NDArray[Any], where: str) -> Tensor:
        """The bag (N, D) on the device in the type that its first layer takes, checked to be finite."""
        given = torch.from_numpy(features)
        dtype = torch.bfloat16 if self._precision.type == "bf16" else torch.float32
        bag = torch.empty(given.shape, dtype=dtype, device=self._device)
        for start in range(0, len(given), _CONVERTED_ROWS):
            rows = given[start : start + _CONVERTED_ROWS].to(self._device).float()
            # a sum is as fast as memory; only where it is not finite is there a need to look closer
            if not rows.sum().isfinite() and not rows.isfinite().all():
                row = start + int((~rows.isfinite().all(dim=1)).nonzero()[0])
                raise ModelError(f"the features of {where} are not finite (tile {row}): extract them again")
            bag[start : start + len(rows)] = rows
        return bag

    def _summarise(
        self, folds: NDArray[np.float64], attention: NDArray[np.float32], grid_digest: str
    ) -> Prediction:  # fmt: skip
        mean = folds.mean(axis=0)
        entropy = measure_entropy(mean)
        disagreement = max(0.0, entropy - float(np.mean([measure_entropy(one) for one in folds])))
        return Prediction(self.classes, mean, folds, entropy, disagreement, attention, grid_digest, self.digest)

    def __repr__(self) -> str:
        classes = ", ".join(self.classes)
        return f"<Ensemble {self.name}: {self.folds} × {self.head} on {self.features.encoder}, classes {classes}>"


def load_ensemble(run: str | os.PathLike[str], device: str = "auto", precision: str = "auto") -> Ensemble:
    """Load the heads of a training run, or a single head.

    Args:
        run: folder of ``wsi train``, or one head file (.safetensors) of such a run.
        device: ``auto`` (a CUDA device where there is one) or a device by torch's name.
        precision: ``fp32``, ``bf16``, ``fp16`` (on a GPU), or ``auto``: the fastest that the device computes in
            natively for :data:`LOWERED_HEADS`, fp32 for other heads.

    Raises:
        ModelError: it is no run, is not finished, a head is missing or damaged, or its folds do not agree in classes,
            width or features.
        SettingsError: the precision is unknown.
        EncoderError: the device is absent or cannot compute in the precision.
    """
    path = Path(run)
    if path.is_file() or path.suffix == ".safetensors":
        files, name, expected = [path], path.stem, None
    else:
        folder = RunFolder(path)
        expected = folder.read_record()
        if not expected.complete:
            raise ModelError(f"the training run {path} is not finished: run the same wsi train command again")
        files, name = [folder.head_file(number) for number in range(expected.folds)], path.resolve().name
    if not files:
        raise ModelError(f"the training run {path} has no fold: train again")
    loaded = [_load_fold(file) for file in files]
    classes, features = loaded[0][1], loaded[0][2]
    if expected is not None:
        classes, features = expected.classes, expected.features
    for file, (_, its_classes, its_features) in zip(files, loaded, strict=True):
        if its_classes != classes:
            raise ModelError(
                f"{file} was trained for the classes {', '.join(its_classes)} and the run is for {', '.join(classes)}: "
                "keep the heads of one run together"
            )
        features.check(its_features, f"the training set of {file}")
    names = {fold.head.name for fold, _, _ in loaded}
    if len(names) > 1:
        raise ModelError(f"{path} mixes the heads {' and '.join(sorted(names))}: keep the heads of one run together")
    folds = tuple(fold for fold, _, _ in loaded)
    return Ensemble(name, folds, classes, features, _digest_files(files), device, precision)


class _NarrowLinear(nn.Module):
    """A linear layer that computes in fp32 inside autocast."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias

    def forward(self, rows: Tensor) -> Tensor:
        """(…, in) to float32 (…, out)."""
        with torch.autocast(rows.device.type, enabled=False):
            return linear(rows.float(), self.weight, self.bias)


def _lower(head: Head, precision: Precision, device: torch.device) -> Head:
    """A copy of a head on the device whose wide layers compute in the precision."""
    head = head.eval().requires_grad_(False).to(device)
    if precision.type == "fp32":
        return head
    linears = [(name, layer) for name, layer in head.named_modules() if isinstance(layer, nn.Linear)]
    for name, layer in linears:
        if layer.out_features < _NARROW:
            parent, _, own = name.rpartition(".")
            setattr(head.get_submodule(parent), own, _NarrowLinear(layer))
    lowered = lower_network(head, precision)
    assert isinstance(lowered, Head)
    return lowered


def _load_fold(file: Path) -> tuple[FoldHead, tuple[str, ...], FeatureOrigin]:
    """A head with its temperature, classes and features; ModelError where the file does not tell or they disagree."""
    try:
        card = read_head_card(file)
        head = load_head(file)
    except HeadError as error:
        raise ModelError(str(error)) from error
    try:
        classes = tuple(str(name) for name in card["classes"])
        features = FeatureOrigin(**card["features"])
        temperature = _read_temperature(card)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{file} does not tell which features and classes it was trained on ({type(error).__name__}: {error}): "
            "give a run of wsi train, or a head saved by one"
        ) from error
    if features.dim != head.in_dim or len(classes) != max(2, head.n_classes):
        raise ModelError(
            f"{file} holds a head of {head.in_dim} numbers per tile and {head.n_classes} classes, and its card says "
            f"{features.dim} and {len(classes)}: train again"
        )
    return FoldHead(head, temperature), classes, features


def _read_temperature(card: Mapping[str, Any]) -> float:
    """The temperature of a card; 1 where none was fitted."""
    temperature = float((card.get("calibration") or {}).get("temperature") or 1.0)
    if not 0 < temperature < np.inf:
        raise ValueError(f"temperature {temperature}")
    return temperature


def _digest_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _choose_device(name: str) -> torch.device:
    from wsi_engine.encoders.deep import choose_device  # noqa: PLC0415 - loads timm

    return choose_device(name)


def _choose_precision(name: str, device: torch.device, head: str) -> Precision:
    """The precision of a name; ``auto`` is fp32 for heads that rounding can turn."""
    if name.endswith("+compile"):
        raise SettingsError(f"heads are not compiled: use {name.partition('+')[0]} or auto, not {name}")
    if name == "auto" and head not in LOWERED_HEADS:
        return Precision()
    return choose_precision(name, device)


def _check_features(features: NDArray[Any], dim: int, where: str) -> NDArray[Any]:
    """Features as a contiguous array that torch can take.

    Raises:
        ModelError: they are no features (N, ``dim``), or there is no tile.
    """
    if features.ndim != 2 or features.dtype not in (np.float16, np.float32):
        raise ModelError(
            f"the features of {where} must be float16 or float32 of shape (tiles, {dim}), not {features.dtype} of "
            f"shape {features.shape}"
        )
    if len(features) == 0:
        raise ModelError(f"{where} has no tile: no tissue was found on it, so there is nothing to classify")
    if features.shape[1] != dim:
        raise ModelError(
            f"the features of {where} have {features.shape[1]} numbers per tile and the model takes {dim}: extract "
            "with the encoder it was trained on"
        )
    features = np.ascontiguousarray(features)
    return features if features.flags.writeable else features.copy()
