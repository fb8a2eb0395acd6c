"""The heads by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from wsi_engine.models.heads.abmil import Abmil, AbmilSettings
from wsi_engine.models.heads.base import Head, HeadSettings
from wsi_engine.models.heads.clam import ClamMB, ClamSB, ClamSettings
from wsi_engine.models.heads.dsmil import Dsmil, DsmilSettings
from wsi_engine.models.heads.errors import HeadError
from wsi_engine.models.heads.mean import Mean, MeanSettings
from wsi_engine.models.heads.transmil import Transmil, TransmilSettings

_HEADS: dict[str, tuple[type[Head], type[HeadSettings]]] = {
    "clam_sb": (ClamSB, ClamSettings),
    "clam_mb": (ClamMB, ClamSettings),
    "abmil": (Abmil, AbmilSettings),
    "dsmil": (Dsmil, DsmilSettings),
    "transmil": (Transmil, TransmilSettings),
    "mean": (Mean, MeanSettings),
}


def list_heads() -> list[str]:
    """The names that :func:`create_head` knows."""
    return list(_HEADS)


def head_lowers(name: str) -> bool:
    """Whether ``auto`` may compute the head of this name in 16 bits (:attr:`Head.lowers`); False for unknown names.

    DSMIL picks one critical tile per class, which rounding can change, TransMIL's pseudo-inverse amplifies rounding,
    and the mean has nothing to gain.
    """
    return name in _HEADS and _HEADS[name][0].lowers


def create_head(name: str, in_dim: int, n_classes: int, **options: Any) -> Head:
    """Build a head with fresh weights, drawn from torch's global generator: ``torch.manual_seed`` repeats them.

    Args:
        name: ``clam_sb``, ``clam_mb``, ``abmil``, ``dsmil``, ``transmil`` or ``mean``.
        in_dim: numbers per tile, as the encoder gives them.
        n_classes: classes; at least 2, or 1 for ``dsmil``.
        **options: the fields of the head's settings: ``ClamSettings``, ``AbmilSettings``, ``DsmilSettings``,
            ``TransmilSettings`` or ``MeanSettings``.

    Returns:
        The head on the CPU, in float32 and training mode.

    Raises:
        HeadError: the name or an option is unknown, or a value is out of range.

    Example:
        >>> import torch
        >>> head = create_head("clam_sb", in_dim=1024, n_classes=2, dropout=0.5).eval()
        >>> head(torch.zeros(7, 1024)).attention.shape
        torch.Size([7, 1])
    """
    if name not in _HEADS:
        raise HeadError(f"there is no head named {name!r}; choose one of {', '.join(_HEADS)}")
    build, settings = _HEADS[name]
    known = [field.name for field in fields(settings)]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise HeadError(f"{name} has no option {unknown[0]!r}; its options are {', '.join(known)}")
    return build(in_dim, n_classes, settings(**options))
