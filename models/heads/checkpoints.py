"""Heads on disk: ours, one safetensors file with a card, and the state dicts that others publish.

Files are read without running anything in them: safetensors hold tensors only, and pickled files are opened with
``weights_only=True``, which refuses every other object.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsi_engine.models.cards import CardFile
from wsi_engine.models.heads.base import Head
from wsi_engine.models.heads.errors import CheckpointError, HeadError
from wsi_engine.models.heads.published import recognise
from wsi_engine.models.heads.table import create_head

CARD_KEY = "wsi_engine.head"
"""Key of the card, as JSON text, in the metadata of a safetensors file."""

NESTS = ("state_dict", "model_state_dict", "model")
HEAD_FILE = CardFile(
    what="a head",
    key=CARD_KEY,
    version=1,
    entries={"name": str, "in_dim": object, "n_classes": object, "options": dict},
    writer="save_head",
    refused=HeadError,
    unreadable=CheckpointError,
)


def save_head(head: Head, path: str | os.PathLike[str], card: Mapping[str, Any] | None = None) -> None:
    """Write a head as one safetensors file, replacing ``path`` in one step.

    Args:
        head: any head of ``create_head``.
        path: the file to write.
        card: what else to keep beside the tensors (encoder, calibration, training summary), anything JSON takes; the
            entries version, name, in_dim, n_classes and options are the head's own.

    Raises:
        HeadError: the card claims an entry that is the head's own, or holds what JSON cannot.
        OSError: the file cannot be written.
    """
    own = {"name": head.name, "in_dim": head.in_dim, "n_classes": head.n_classes, "options": head.options}
    HEAD_FILE.write(path, head.state_dict(), own, card)


def read_head_card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The card of a head that :func:`save_head` wrote, without its tensors.

    Raises:
        CheckpointError: no such file, not readable as safetensors, or without a card.
    """
    return HEAD_FILE.read_card(path)


def load_head(source: str | os.PathLike[str] | Mapping[str, Tensor], **options: Any) -> Head:
    """Read a head: one of ours, or a published state dict of CLAM, DSMIL or TransMIL with sizes told from its shapes.

    Args:
        source: a file (safetensors, or saved by ``torch.save``), or a state dict.
        **options: settings that tensors do not tell, in place of those in the card or the head's defaults; for CLAM
            ``subtyping``, ``k``, ``dropout`` and ``bag_weight``.

    Returns:
        The head on the CPU, in float32 and eval mode.

    Raises:
        CheckpointError: no such file, unreadable, of an unknown layout, or with tensors that do not fit.
        HeadError: an option is unknown or out of range.
    """
    card: dict[str, Any] | None = None
    if isinstance(source, Mapping):
        where, state = "the state dict", _find_tensors(source, "the state dict")
    else:
        path = HEAD_FILE.find(source)
        where = str(path)
        state, card = _read_file(path)
    if card is None:
        found = recognise(state, where)
        sizes: tuple[str, int, int] = (found.name, found.in_dim, found.n_classes)
        known, state = found.options, found.state
    else:
        sizes, known = (card["name"], card["in_dim"], card["n_classes"]), card["options"]
    try:
        _build_on_meta(*sizes, known)
    except (HeadError, TypeError) as error:
        raise CheckpointError(f"{where} describes a head that cannot be built: {error}") from error
    head = _build_on_meta(*sizes, known | options)
    head.load_state_dict(HEAD_FILE.fit(state, head.state_dict(), where), assign=True)
    return head.eval()


def _build_on_meta(name: str, in_dim: int, n_classes: int, options: Mapping[str, Any]) -> Head:
    """A head without memory: its shapes, and no random numbers drawn."""
    with torch.device("meta"):
        return create_head(name, in_dim, n_classes, **options)


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors by name, and the card where the file has one."""
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:] == b"{":
        return HEAD_FILE.read(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged or holds Python objects other than tensors, which are refused because they could run "
            "code; save the state dict alone"
        ) from error
    return _find_tensors(content, str(path)), None


def _find_tensors(content: Any, source: str) -> dict[str, Tensor]:
    """The innermost mapping of names to tensors.

    Raises:
        CheckpointError: no mapping, an empty one, or one with anything but tensors in it.
    """
    while isinstance(content, Mapping):
        nested = next((content[key] for key in NESTS if isinstance(content.get(key), Mapping)), None)
        if nested is None:
            break
        content = nested
    if not isinstance(content, Mapping) or not content:
        kind = "an empty mapping" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise CheckpointError(f"{source} holds {kind} where tensors by name are needed; save the head's state dict")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{source} holds a {type(value).__name__} under {name!r} where a tensor is needed; "
                "save the state dict alone"
            )
    return dict(content)
