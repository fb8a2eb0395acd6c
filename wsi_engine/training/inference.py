"""A head over many bags without gradients: losses, probabilities, and standard scores of the features."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsi_engine.encoders.precision import Precision
from wsi_engine.errors import ModelError
from wsi_engine.models import Head, HeadError, HeadOutput
from wsi_engine.training.hardware import Hardware
from wsi_engine.training.keeping import PassedBags

if TYPE_CHECKING:
    from wsi_engine.bags import BagSource

_CPU = torch.device("cpu")

_SERIAL = 2**15
"""Numbers up to which torch works in the calling thread; each loading thread would start a team of its own."""

_ROWS = 4096
"""Tiles turned into float64 at a time for mean and spread."""


@runtime_checkable
class SelfLoading(Protocol):
    """Bags that know best how they are loaded ahead."""

    def load_ahead(self, places: Sequence[int]) -> Generator[tuple[int, NDArray[Any]]]:
        """Places and bags in the order asked for."""


class LoweredBags(PassedBags):
    """Bags in bfloat16, turned into it where they are loaded instead of in every step.

    What a head's first layer computes is the same, for it would round them so itself. NumPy has no such type: the bytes
    travel as int16, and :func:`to_tensor` knows them.
    """

    def load(self, place: int) -> NDArray[Any]:
        """The bytes of a bag (N, D) in bfloat16, as int16."""
        features = to_tensor(self._source.load(place), _CPU)
        lowered = torch.empty(features.shape, dtype=torch.bfloat16)
        rows = max(1, _SERIAL // features.shape[1])
        for start in range(0, len(features), rows):  # so little at a time that torch starts no threads for it
            lowered[start : start + rows] = features[start : start + rows]
        plain: NDArray[Any] = lowered.view(torch.int16).numpy()
        return plain


def to_tensor(features: NDArray[Any], device: torch.device) -> Tensor:
    """A bag on a device, in the type it is stored in; shares memory on the CPU."""
    if not features.flags.writeable:  # torch warns of memory that it could write to and must not
        features = features.copy()
    tensor = torch.from_numpy(features)
    return (tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor).to(device)


def _load_bags(bags: BagSource, places: Sequence[int], workers: int) -> Generator[tuple[int, NDArray[Any]]]:
    """Places and bags in their order, loaded ahead as the bags do it themselves, or by so many threads."""
    from wsi_engine.bags import prefetch  # noqa: PLC0415

    if isinstance(bags, SelfLoading):
        return bags.load_ahead(places)
    return prefetch(bags, places, workers)


def run_head(
    head: Head, bags: BagSource, places: Sequence[int], hardware: Hardware, names: Sequence[str], workers: int
) -> Iterator[tuple[int, HeadOutput]]:
    """What a head in eval mode says of each bag, one after the other; ``workers`` threads load ahead.

    Raises:
        ModelError: a bag does not fit the head; the message names its slide.
    """
    head.eval()
    with closing(_load_bags(bags, places, workers)) as ahead:
        for place, features in ahead:
            with torch.inference_mode(), hardware.arithmetic():
                try:
                    output = head(to_tensor(features, hardware.device))
                except HeadError as error:
                    raise ModelError(f"{names[place]}: {error}") from error
            yield place, output


def predict_bags(
    head: Head, bags: BagSource, places: Sequence[int], hardware: Hardware, names: Sequence[str], workers: int = 2
) -> NDArray[np.float64]:
    """Probabilities float64 (n, C) of bags in fp32, before calibration; each row sums to 1.

    DSMIL's sigmoids are divided by their sum.

    Raises:
        ModelError: a bag does not fit the head, or a probability is not finite.
    """
    exact = Hardware(hardware.device, Precision("fp32"))
    found = np.empty((len(places), head.n_classes))
    for row, (place, output) in enumerate(run_head(head, bags, places, exact, names, workers)):
        with torch.inference_mode():
            found[row] = head.probabilities(output.logits).double().cpu().numpy()
        if not np.isfinite(found[row]).all():
            raise ModelError(f"the trained head gives no finite probabilities for {names[place]}: look at its features")
    found = np.maximum(found, np.finfo(np.float32).tiny)  # what underflowed is not impossible
    normal: NDArray[np.float64] = found / found.sum(axis=1, keepdims=True)
    return normal


def mean_bag_loss(
    head: Head,
    bags: BagSource,
    places: Sequence[int],
    labels: NDArray[np.int64],
    hardware: Hardware,
    names: Sequence[str],
    workers: int = 2,
) -> float:
    """Mean bag loss over slides, which early stopping watches; NaN where one is not finite."""
    losses = []
    for place, output in run_head(head, bags, places, hardware, names, workers):
        with torch.inference_mode():
            losses.append(float(head.bag_loss(output, int(labels[place]))))
    return float(np.mean(losses))


def fit_standard(head: Head, bags: BagSource, places: Sequence[int], workers: int = 2) -> None:
    """Give a head with ``standardise`` the mean and spread of the training tiles; others are left alone.

    Sums of chunks are joined in float64 (Chan, Golub & LeVeque 1983), in the order of ``places``.
    """
    if head.standard is None:
        return
    count, mean, squares = 0, np.zeros(bags.dim), np.zeros(bags.dim)
    with closing(_load_bags(bags, places, workers)) as ahead:
        for _, features in ahead:
            for start in range(0, len(features), _ROWS):
                rows = features[start : start + _ROWS].astype(np.float64)
                own = rows.mean(axis=0)
                step = own - mean
                total = count + len(rows)
                squares += ((rows - own) ** 2).sum(axis=0) + step**2 * (count * len(rows) / total)
                mean += step * (len(rows) / total)
                count = total
    try:
        head.standard.fit(torch.from_numpy(mean).float(), torch.from_numpy(np.sqrt(squares / count)).float())
    except HeadError as error:
        raise ModelError(str(error)) from error
