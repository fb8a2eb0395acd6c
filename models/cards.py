"""Trained parts on disk: a safetensors file of tensors with a card, JSON in its metadata, that says what they are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class CardFile:
    """A kind of file: how its card is called and what it must hold.

    Attributes:
        what: what the tensors are, with its article: ``a head``.
        key: the card's key in the metadata of the safetensors file.
        version: of the card's layout; a file of another version is refused.
        entries: names and kinds of the entries that the engine writes; the rest of a card is the caller's.
        writer: the function that writes such files, for messages.
        refused: raised for a card that cannot be written.
        unreadable: raised for a file that cannot be read.
    """

    what: str
    key: str
    version: int
    entries: Mapping[str, type]
    writer: str
    refused: type[ValueError]
    unreadable: type[ValueError]

    @property
    def the(self) -> str:
        """What the tensors are, when they are known: ``the head``."""
        return f"the {self.what.removeprefix('a ')}"

    def write(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, Tensor],
        own: Mapping[str, Any],
        card: Mapping[str, Any] | None = None,
    ) -> None:
        """Write tensors and card, replacing ``path`` in one step.

        Args:
            path: the file to write.
            tensors: what to keep, on any device.
            own: the values of ``entries``.
            card: what else to keep, anything JSON takes.

        Raises:
            ValueError: as ``refused``: the card claims one of the own entries, or holds what JSON cannot.
            OSError: the file cannot be written.
        """
        extra, fixed = dict(card or {}), json.loads(json.dumps({"version": self.version, **own}))
        taken = [name for name in fixed if name in extra and extra[name] != fixed[name]]
        if taken:
            name = taken[0]
            owner = f"{self.the}'s own" if self.the[-1] != "s" else f"{self.the}' own"
            raise self.refused(f"the card gives {name} as {extra[name]!r}, and {owner} is {fixed[name]!r}")
        try:
            text = json.dumps(extra | fixed, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise self.refused(f"the card cannot be written as JSON ({error}); give plain values") from error
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            save_file(state, partial, metadata={self.key: text})
            os.replace(partial, target)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(str(error)) from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def find(self, path: str | os.PathLike[str]) -> Path:
        """The path, if there is a file; ``unreadable`` otherwise."""
        if not Path(path).is_file():
            raise self.unreadable(f"there is no file of {self.what} at {path}; check the path")
        return Path(path)

    def find_card(self, path: str | os.PathLike[str]) -> dict[str, Any] | None:
        """The card alone, without the tensors, None where the file has none of this kind; errors as in ``read``."""
        source = self.find(path)
        with self._open(source) as file:
            return self._parse(file.metadata(), source)

    def read_card(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """The card alone, without the tensors; ``unreadable`` where there is no file, no card, or not this kind's."""
        return self.require(self.find_card(path), Path(path))

    def read(self, path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """Tensors by name, and the card, None where the file has none of this kind.

        Raises:
            ValueError: as ``unreadable``: there is no file, or it is damaged.
        """
        source = self.find(path)
        with self._open(source) as file:
            card = self._parse(file.metadata(), source)
            try:
                return {name: file.get_tensor(name) for name in file.keys()}, card  # noqa: SIM118 - not a mapping
            except Exception as error:  # a type that torch does not know, a size that no memory holds
                reason = str(error).strip().splitlines() or [type(error).__name__]
                raise self.unreadable(f"a tensor in {source} cannot be read ({reason[0]}); save it again") from error

    def require(self, card: dict[str, Any] | None, source: Path) -> dict[str, Any]:
        """The card, where the file must have one."""
        if card is None:
            raise self.unreadable(
                f"{source} holds tensors but no card of {self.what}; give a file that {self.writer} wrote"
            )
        return card

    def fit(self, state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        """The tensors as the module takes them, float32; checked for presence, shape, kind and values."""
        missing = [name for name in expected if name not in state]
        if missing:
            raise self.unreadable(
                f"{source} lacks {len(missing)} of the {len(expected)} tensors of {self.the}, the first is "
                f"{missing[0]}; save the whole state dict again"
            )
        unknown = [name for name in state if name not in expected]
        if unknown:
            raise self.unreadable(
                f"{source} holds {len(unknown)} tensors that {self.the} has no place for, the first is {unknown[0]}; "
                f"give the state dict of {self.the} alone"
            )
        return {name: self._fit_one(name, state[name], wanted, source) for name, wanted in expected.items()}

    def _fit_one(self, name: str, tensor: Tensor, wanted: Tensor, source: str) -> Tensor:
        if tensor.shape != wanted.shape:
            raise self.unreadable(
                f"{source} holds {name} of shape {tuple(tensor.shape)} where its other tensors ask for "
                f"{tuple(wanted.shape)}; save {self.the} again"
            )
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            raise self.unreadable(
                f"{source} holds {name} as {tensor.dtype}, {tensor.layout}; save plain floating weights"
            )
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise self.unreadable(
                f"{source} declares {tensor.numel()} numbers in {name} and holds fewer; save it again"
            )
        fitted = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        if not fitted.isfinite().all():
            raise self.unreadable(
                f"{source} holds NaN or infinite weights in {name}; the training diverged or it is damaged"
            )
        return fitted

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise self.unreadable(
                f"{path} cannot be read as safetensors ({reason[0]}); copy or save it again"
            ) from error

    def _parse(self, metadata: Mapping[str, str] | None, path: Path) -> dict[str, Any] | None:
        """The card in a file's metadata, None where there is none."""
        if not metadata or self.key not in metadata:
            return None
        try:
            card = json.loads(metadata[self.key])
        except (ValueError, RecursionError) as error:
            raise self.unreadable(f"the card in {path} is not JSON; save {self.the} again") from error
        kinds = {"version": object, **self.entries}
        if not isinstance(card, dict) or not all(
            name in card and isinstance(card[name], kind) for name, kind in kinds.items()
        ):
            raise self.unreadable(f"the card in {path} lacks one of {', '.join(kinds)}; save {self.the} again")
        if card["version"] != self.version:
            raise self.unreadable(
                f"the card in {path} is of version {card['version']!r} and this engine reads version {self.version}; "
                "use the engine that wrote it"
            )
        return card
