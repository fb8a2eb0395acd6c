"""Commands that are made of tables: parameters as values, shared by several commands, under one signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class Parameter:
    """One parameter of a command, as typer reads it from a signature; ``default`` ``...`` for none."""

    name: str
    type: Any
    default: Any = ...

    def to_signature(self) -> inspect.Parameter:
        """For ``__signature__``."""
        default = inspect.Parameter.empty if self.default is ... else self.default
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=self.type)


def make_option(name: str, kind: Any, default: Any, text: str, *flags: str, panel: str | None = None) -> Parameter:
    """An option with its help; the default is shown where there is one to show."""
    shown = default is not None and default is not ... and kind is not bool
    option = typer.Option(*flags, help=text, show_default=shown, rich_help_panel=panel)
    return Parameter(name, Annotated[kind, option], default)


def give_signature(run: Callable[..., None], parameters: Sequence[Parameter]) -> Callable[..., None]:
    """A function of any keywords as a command that takes these parameters; the function itself is changed."""
    run.__annotations__ = {one.name: one.type for one in parameters}
    run.__signature__ = inspect.Signature([one.to_signature() for one in parameters])  # type: ignore[attr-defined]
    return run
