"""State dicts that CLAM, DSMIL and TransMIL publish: told apart by their names, sizes read from their shapes.

Wrappers leave marks in names: DataParallel a leading ``module.`` or a ``.module`` within, Lightning a leading
``model.``. CLAM's attention stands at index 3 of its network, at 2 in models without dropout; its plain attention is
itself called ``module``, whose mark cannot be told from a wrapper's, so all are taken off and it is put back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from wsi_engine.models.heads.errors import CheckpointError

State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Published:
    """A published state dict, recognised.

    Attributes:
        name: the head it belongs to.
        in_dim: numbers per tile.
        n_classes: classes.
        options: settings told from the tensors.
        state: the tensors under the head's own names.
    """

    name: str
    in_dim: int
    n_classes: int
    options: dict[str, Any]
    state: State


def recognise(state: Mapping[str, Tensor], source: str) -> Published:
    """Find out whose state dict this is.

    Args:
        state: tensors by name.
        source: where it comes from, for messages.

    Raises:
        CheckpointError: of no layout known here, or a tensor that tells a size is missing or has the wrong rank.
    """
    clean = _unwrap(state, source)
    for mark, read in _LAYOUTS.items():
        stems = [name[: -len(mark)] for name in clean if name == mark or name.endswith(f".{mark}")]
        if len(stems) > 1:
            raise CheckpointError(
                f"{source} holds more than one head ({len(stems)} tensors {mark}); save one by itself"
            )
        if stems:
            inside = {name.removeprefix(stems[0]): value for name, value in clean.items() if name.startswith(stems[0])}
            return read(inside, source)
    raise CheckpointError(
        f"{source} has the layout of no head known here (its first tensor is {next(iter(state), 'none')}); "
        "give a head saved by this engine, or a state dict of CLAM, DSMIL or TransMIL"
    )


def _unwrap(state: Mapping[str, Tensor], source: str) -> State:
    """Names without the marks of wrappers, and without the buffers of CLAM's instance loss."""
    clean: State = {}
    for name, value in state.items():
        short = re.sub(r"(^|\.)(module\.)+", r"\1", name)
        if "instance_loss_fn." in short:
            continue
        if short in clean:
            raise CheckpointError(f"{source} holds {short} twice, with and without a wrapper's prefix; save it again")
        clean[short] = value
    return clean


def _read_clam(state: State, source: str) -> Published:
    size = _Sizes(state, source)
    index = next((i for i in (3, 2) if any(name.startswith(f"attention_net.{i}.") for name in state)), 3)
    gated = f"attention_net.{index}.attention_a.0.weight" in state
    renamed = {_rename_clam(name, index, gated): value for name, value in state.items()}
    first = "attention_net.3.attention_a.0.weight" if gated else "attention_net.3.module.0.weight"
    widths = (size("attention_net.0.weight", 2, 0), _Sizes(renamed, source)(first, 2, 0))
    many = "classifiers.0.weight" in state
    n_classes = _count(state, r"classifiers\.\d+\.weight") if many else size("classifiers.weight", 2, 0)
    options = {"size": {(512, 256): "small", (512, 384): "big"}.get(widths, widths), "gated": gated}
    in_dim = size("attention_net.0.weight", 2, 1)
    return Published("clam_mb" if many else "clam_sb", in_dim, n_classes, options, renamed)


def _rename_clam(name: str, index: int, gated: bool) -> str:
    """CLAM's attention at index 3, and the plain one under ``module`` with its last layer at 3."""
    stem = f"attention_net.{index}."
    if not name.startswith(stem):
        return name
    rest = name.removeprefix(stem)
    if not gated:
        rest = "module." + re.sub(r"^2\.", "3.", rest)
    return f"attention_net.3.{rest}"


def _read_dsmil(state: State, source: str) -> Published:
    renamed = {
        re.sub(r"^i_classifier\.fc\.(weight|bias)$", r"i_classifier.fc.0.\1", name): value
        for name, value in state.items()
        if not name.startswith("i_classifier.feature_extractor.")  # the encoder it was trained with
    }
    size = _Sizes(renamed, source)
    nonlinear = "b_classifier.q.0.weight" in renamed
    options = {
        "nonlinear": nonlinear,
        "passing_v": "b_classifier.v.1.weight" in renamed,
        "query": size("b_classifier.q.0.weight" if nonlinear else "b_classifier.q.weight", 2, 0),
    }
    in_dim, n_classes = (size("i_classifier.fc.0.weight", 2, axis) for axis in (1, 0))
    return Published("dsmil", in_dim, n_classes, options, renamed)


def _read_transmil(state: State, source: str) -> Published:
    size = _Sizes(state, source)
    options = {"dim": size("_fc1.0.weight", 2, 0), "heads": size("layer1.attn.res_conv.weight", 4, 0)}
    return Published("transmil", size("_fc1.0.weight", 2, 1), size("_fc2.weight", 2, 0), options, state)


_LAYOUTS: dict[str, Callable[[State, str], Published]] = {
    "attention_net.0.weight": _read_clam,
    "b_classifier.fcc.weight": _read_dsmil,
    "_fc1.0.weight": _read_transmil,
}
"""A tensor that only this layout has, and what reads the layout."""


class _Sizes:
    """Sizes of tensors by name, with an error where one is not as the layout has it."""

    def __init__(self, state: Mapping[str, Tensor], source: str) -> None:
        self.state, self.source = state, source

    def __call__(self, name: str, rank: int, axis: int) -> int:
        """Length of ``axis`` of the tensor ``name``, which must have ``rank`` axes."""
        if name not in self.state:
            raise CheckpointError(f"{self.source} lacks the tensor {name}; save the whole state dict again")
        shape = self.state[name].shape
        if len(shape) != rank:
            raise CheckpointError(
                f"{self.source} holds {name} with {len(shape)} axes where the layout has {rank}; save it again"
            )
        return shape[axis]


def _count(state: State, pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in state)
