"""What all subcommands share: where text goes, how errors end, and machine-readable results."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from wsi_engine.errors import InputError, SettingsError, WsiError

P = ParamSpec("P")
R = TypeVar("R")

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

out = Console(highlight=False, soft_wrap=True)
"""Results go here (standard output)."""

err = Console(stderr=True, highlight=False, soft_wrap=True)
"""Progress, warnings and errors go here (standard error), so that results can be piped."""

_debug = False


def start(*, debug: bool) -> None:
    """Set up warnings and remember whether errors show their traceback."""
    global _debug  # noqa: PLW0603 - one process runs one command
    _debug = debug
    logger = logging.getLogger("wsi_engine")
    logger.handlers = [_ToConsole()]
    logger.propagate = False


def make_table(*headings: str) -> Table:
    """A plain table whose cells are wrapped; words that are too long, such as paths, are broken and never cut."""
    table = Table(*headings, box=None, padding=(0, 2, 0, 0))
    for column in table.columns:
        column.overflow = "fold"
    return table


def reporting(command: Callable[P, R]) -> Callable[P, R]:
    """A command whose errors end in one sentence and the right exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except WsiError as error:
            if _debug:
                raise
            print_error(str(error))
            wrong_usage = isinstance(error, SettingsError | InputError)
            raise typer.Exit(EXIT_USAGE if wrong_usage else EXIT_FAILED) from None
        except KeyboardInterrupt:
            print_error("interrupted: what was finished is kept; run the same command again to go on")
            raise typer.Exit(EXIT_INTERRUPTED) from None

    return run


def print_error(message: str) -> None:
    """One error sentence on standard error."""
    err.print(f"[bold red]error:[/] {_plain(message)}")


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _plain(message: str) -> str:
    """Text that Rich prints as it is."""
    return message.replace("[", r"\[")


class _ToConsole(logging.Handler):
    """The engine's warnings, printed so that a running progress bar stays whole."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        err.print(f"[{style}]{record.levelname.lower()}:[/] {_plain(record.getMessage())}")
