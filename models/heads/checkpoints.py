"""Heads on disk: ours, one safetensors file with a card, and the state dicts that others publish.

Files are read without running anything in them: safetensors hold tensors only, and pickled files are opened with
``weights_only=True``, which refuses every other object.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from wsi_engine.models.heads.base import Head
from wsi_engine.models.heads.errors import CheckpointError, HeadError
from wsi_engine.models.heads.published import recognise
from wsi_engine.models.heads.table import create_head

CARD_KEY = "wsi_engine.head"
"""Key of the card, as JSON text, in the metadata of a safetensors file."""

CARD_VERSION = 1
NESTS = ("state_dict", "model_state_dict", "model")
OWN_ENTRIES = ("version", "name", "in_dim", "n_classes", "options")


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
    extra = dict(card or {})
    own = {
        "version": CARD_VERSION, "name": head.name, "in_dim": head.in_dim, "n_classes": head.n_classes,
        "options": json.loads(json.dumps(head.options)),
    }  # fmt: skip
    taken = [key for key in OWN_ENTRIES if key in extra and extra[key] != own[key]]
    if taken:
        raise HeadError(f"the card gives {taken[0]} as {extra[taken[0]]!r}, and the head's own is {own[taken[0]]!r}")
    try:
        text = json.dumps(extra | own, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise HeadError(f"the card cannot be written as JSON ({error}); give plain values") from error
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        save_file(state, partial, metadata={CARD_KEY: text})
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def read_head_card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The card of a head that :func:`save_head` wrote, without its tensors.

    Raises:
        CheckpointError: no such file, not readable as safetensors, or without a card.
    """
    source = _existing(Path(path))
    with _open_safetensors(source) as file:
        card = _parse_card(file.metadata(), source)
    if card is None:
        raise CheckpointError(f"{source} holds tensors but no card of a head; give a file that save_head wrote")
    return card


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
        path = _existing(Path(source))
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
    head.load_state_dict(_fit(state, head.state_dict(), where), assign=True)
    return head.eval()


def _build_on_meta(name: str, in_dim: int, n_classes: int, options: Mapping[str, Any]) -> Head:
    """A head without memory: its shapes, and no random numbers drawn."""
    with torch.device("meta"):
        return create_head(name, in_dim, n_classes, **options)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"there is no file of a head at {path}; give a .safetensors or .pt file")
    return path


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors by name, and the card where the file has one."""
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:] == b"{":
        with _open_safetensors(path) as tensors:
            card = _parse_card(tensors.metadata(), path)
            return {name: tensors.get_tensor(name) for name in tensors.keys()}, card  # noqa: SIM118 - not a mapping
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged or holds Python objects other than tensors, which are refused because they could run "
            "code; save the state dict alone"
        ) from error
    return _find_tensors(content, str(path)), None


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} cannot be read as safetensors ({reason[0]}); copy or save it again") from error


def _parse_card(metadata: Mapping[str, str] | None, path: Path) -> dict[str, Any] | None:
    """The card in a file's metadata, None where there is none."""
    if not metadata or CARD_KEY not in metadata:
        return None
    try:
        card = json.loads(metadata[CARD_KEY])
    except ValueError as error:
        raise CheckpointError(f"the card in {path} is not JSON; save the head again") from error
    if not isinstance(card, dict) or any(key not in card for key in OWN_ENTRIES) or not _is_plain(card):
        raise CheckpointError(f"the card in {path} lacks one of {', '.join(OWN_ENTRIES)}; save the head again")
    if card["version"] != CARD_VERSION:
        raise CheckpointError(
            f"the card in {path} is of version {card['version']!r} and this engine reads version {CARD_VERSION}; "
            "use the engine that wrote it"
        )
    return card


def _is_plain(card: dict[str, Any]) -> bool:
    return isinstance(card["name"], str) and isinstance(card["options"], dict)


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


def _fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors as the head takes them, float32; every one checked for presence, shape, kind and values."""
    missing = [name for name in expected if name not in state]
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} of the {len(expected)} tensors of the head, the first is {missing[0]}; "
            "save the whole state dict again"
        )
    unknown = [name for name in state if name not in expected]
    if unknown:
        raise CheckpointError(
            f"{source} holds {len(unknown)} tensors that the head has no place for, the first is {unknown[0]}; "
            "give the state dict of the head alone"
        )
    fitted = {}
    for name, wanted in expected.items():
        tensor = state[name]
        if tensor.shape != wanted.shape:
            raise CheckpointError(
                f"{source} holds {name} of shape {tuple(tensor.shape)} where its other tensors ask for "
                f"{tuple(wanted.shape)}; save the head again"
            )
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"{source} holds {name} as {tensor.dtype}, {tensor.layout}; save plain floating weights"
            )
        fitted[name] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        if not fitted[name].isfinite().all():
            raise CheckpointError(
                f"{source} holds NaN or infinite weights in {name}; the training diverged or it is damaged"
            )
    return fitted
