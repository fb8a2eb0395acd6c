"""The heads of a training run as one classifier: calibrated, averaged over folds, and honest about its doubt.

The folds' probabilities p_f, each calibrated as softmax(log p / T_f) with the temperature its validation slides gave
(Guo et al., ICML 2017), are averaged with equal weight. Their mean's entropy is the doubt in all; the part of it that
comes from the folds contradicting each other, the mutual information H(mean p) − mean H(p), is the disagreement
(Lakshminarayanan et al., NeurIPS 2017; Depeweg et al., ICML 2018). Both are in units of ln C: 0 to 1.

Attention is averaged as weights, each fold's softmax over the slide's tiles: raw scores of two folds have no common
zero and no common scale, while weights all say "share of the slide's embedding" and still sum to 1 after averaging.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear

from wsi_engine.classification.prediction import Prediction, calibrate, measure_entropy
from wsi_engine.classification.targets import FeatureSource
from wsi_engine.encoders.precision import Precision, arithmetic, choose_precision, lower_network
from wsi_engine.errors import ModelError, SettingsError
from wsi_engine.memory import explain_memory, keep_freed_memory
from wsi_engine.models import Head, HeadError, load_head, read_head_card
from wsi_engine.runs import FeatureOrigin, RunFolder, RunRecord, digest_heads
from wsi_engine.tissue import TissueSettings
from wsi_engine.workers import usable_cores

_NARROW = 64
"""Layers of fewer outputs (scores, logits) stay in fp32, where they cost nothing: tiles keep distinct ranks."""

_CONVERTED_ROWS = 1024
"""Rows converted at a time: few enough to stay in the processor's cache."""


@dataclass(frozen=True, eq=False)
class FoldHead:
    """The head of one fold, its temperature, and which of the ensemble's kinds of features it takes."""

    head: Head
    temperature: float
    source: int = 0


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
        sources: Sequence[FeatureSource] = (),
    ) -> None:
        """Move the heads to a device and into a precision; :func:`load_ensemble` explains the arguments."""
        self.name = name
        """Name of the run."""
        self.classes = classes
        """Classes in the order of probabilities."""
        self.features = features
        """What it takes; of several kinds the first."""
        self.sources = tuple(sources) or (FeatureSource(features),)
        """Kinds of features: one for all folds, or one for each where each has prompts of its own."""
        self.digest = digest
        """SHA-256 over the bytes of the head files in the order of folds, calibration included."""
        self._device = _choose_device(device)
        if self._device.type == "cpu":
            keep_freed_memory()
            torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
        self._precision = _choose_precision(precision, self._device, folds[0].head)
        self._folds = tuple(
            replace(fold, head=_lower(fold.head, self._precision, self._device)) for fold in folds
        )  # fmt: skip

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
        self, features: NDArray[Any] | Sequence[NDArray[Any]], grid_digest: str = "", where: str = "the slide"
    ) -> Prediction:
        """Classify one slide.

        Args:
            features: float16 or float32 (N, D) of its tiles, by the encoder that :attr:`features` names; a sequence
                of such, one for each of :attr:`sources`, where there are several. Not changed.
            grid_digest: of the tiles, kept in the prediction.
            where: names the slide in messages.

        Raises:
            ModelError: there is no tile, the features are of another width or kind, one is not finite, or memory runs
                out.
        """
        given = [features] if isinstance(features, np.ndarray) else list(features)
        if len(given) != len(self.sources) or len({len(one) for one in given}) > 1:
            raise ModelError(
                f"{where}: the model takes features of {len(self.sources)} encoders, all of the same tiles, and got "
                f"{len(given)}; extract with the prompts of each fold"
            )
        given = [_check_features(one, self.features.dim, where) for one in given]
        too_large = (
            f"{where} ({len(given[0]):,} tiles) does not fit in the memory of {self.device}: end what else runs there, "
            "or use another device"
        )
        with explain_memory(ModelError, too_large):
            return self._predict(given, grid_digest, where)

    def _predict(self, features: list[NDArray[Any]], grid_digest: str, where: str) -> Prediction:
        """The prediction of checked features, one array for each of :attr:`sources`."""
        bags = [self._to_device(one, where) for one in features]
        probabilities, weights = [], None
        for fold in self._folds:
            found, attention = self._run_fold(fold, bags[fold.source], where)
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
            natively for heads whose ``lowers`` says so, fp32 for others.

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
    classes = expected.classes if expected is not None else loaded[0].classes
    for file, fold in zip(files, loaded, strict=True):
        if fold.classes != classes:
            raise ModelError(
                f"{file} was trained for the classes {', '.join(fold.classes)} and the run is for "
                f"{', '.join(classes)}: keep the heads of one run together"
            )
    names = {one.fold.head.name for one in loaded}
    if len(names) > 1:
        raise ModelError(f"{path} mixes the heads {' and '.join(sorted(names))}: keep the heads of one run together")
    sources = _find_sources(files, loaded, expected)
    folds = tuple(
        replace(one.fold, source=number if len(sources) > 1 else 0) for number, one in enumerate(loaded)
    )  # fmt: skip
    return Ensemble(name, folds, classes, sources[0].origin, digest_heads(files), device, precision, sources)


def _find_sources(
    files: list[Path], loaded: list[_Loaded], expected: RunRecord | None
) -> tuple[FeatureSource, ...]:  # fmt: skip
    """What the folds take: one kind of features for all, or one for each where each has its own tuned encoder."""
    if any(one.source.tuned for one in loaded):
        first = loaded[0].source.origin
        shape = (first.dim, first.mpp, first.tile_px, first.stride_px)
        for file, one in zip(files, loaded, strict=True):
            origin = one.source.origin
            if not one.source.tuned or (origin.dim, origin.mpp, origin.tile_px, origin.stride_px) != shape:
                raise ModelError(
                    f"{file} takes features of another kind than {files[0]}: keep the heads of one run together"
                )
        return tuple(one.source for one in loaded)
    features = expected.features if expected is not None else loaded[0].source.origin
    for file, one in zip(files, loaded, strict=True):
        features.check(one.source.origin, f"the training set of {file}")
    return (replace(loaded[0].source, origin=features),)


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


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A head, the classes that it tells apart, and what it takes."""

    fold: FoldHead
    classes: tuple[str, ...]
    source: FeatureSource


def _load_fold(file: Path) -> _Loaded:
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
        source = _read_source(card, features, file.parent)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ModelError(
            f"{file} does not tell which features and classes it was trained on ({type(error).__name__}: {error}): "
            "give a run of wsi train, or a head saved by one"
        ) from error
    if features.dim != head.in_dim or len(classes) != max(2, head.n_classes):
        raise ModelError(
            f"{file} holds a head of {head.in_dim} numbers per tile and {head.n_classes} classes, and its card says "
            f"{features.dim} and {len(classes)}: train again"
        )
    return _Loaded(FoldHead(head, temperature), classes, source)


def _read_source(card: Mapping[str, Any], origin: FeatureOrigin, folder: Path) -> FeatureSource:
    """What a head takes; how tissue is found where its training says so, which one on stored features does not."""
    source = FeatureSource(origin, folder / str(card["tuned"]) if card.get("tuned") else None)
    said = card.get("training", {}).get("settings", {})
    if "tissue" not in said:
        return source
    tissue = said["tissue"]
    if tissue is not None:
        tissue = TissueSettings(**{**tissue, "otsu_range": tuple(tissue["otsu_range"])})
    return replace(source, tissue=tissue, min_tissue=float(said["min_tissue"]))


def _read_temperature(card: Mapping[str, Any]) -> float:
    """The temperature of a card; 1 where none was fitted."""
    temperature = float((card.get("calibration") or {}).get("temperature") or 1.0)
    if not 0 < temperature < np.inf:
        raise ValueError(f"temperature {temperature}")
    return temperature


def _choose_device(name: str) -> torch.device:
    from wsi_engine.encoders.deep import choose_device  # noqa: PLC0415 - loads timm

    return choose_device(name)


def _choose_precision(name: str, device: torch.device, head: Head) -> Precision:
    """The precision of a name; ``auto`` is fp32 for heads that rounding can turn."""
    if name.endswith("+compile"):
        raise SettingsError(f"heads are not compiled: use {name.partition('+')[0]} or auto, not {name}")
    if name == "auto" and not head.lowers:
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
