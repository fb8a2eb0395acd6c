"""``wsi check``: whether stores and runs are whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import TextColumn
from rich.text import Text

from wsi_engine.cli import console
from wsi_engine.cli.display import BarDisplay, make_bar

if TYPE_CHECKING:
    from wsi_engine.integrity import CheckReport

_STYLES = {"damaged": "bold red", "unfinished": "yellow", "running": "cyan", "leftover": "dim"}


def check(
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR|URL...", help="Folders of stores and training runs, or stores.", show_default=False
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Verify the checksums and digests of every store and training run in folders; nothing is changed.

    Names what is damaged, unfinished, being written, or left by killed runs, and what to do with each. Ends with 1 if
    anything is damaged.
    """
    from wsi_engine.integrity import check_stores  # noqa: PLC0415 - loads Zarr

    with CheckDisplay(console.err) as display:
        report = check_stores(folders, progress=display)
    if as_json:
        console.print_json(report.to_json())
    else:
        _print_report(report)
    if report.damaged:
        raise typer.Exit(console.EXIT_FAILED)


class CheckDisplay(BarDisplay):
    """Shows a check on a terminal; a context manager and a :class:`~wsi_engine.integrity.CheckProgress`."""

    def __init__(self, target: Console) -> None:
        super().__init__(target, make_bar(target, TextColumn("checking"), TextColumn("{task.fields[said]}")))
        self._task = self._bar.add_task("", total=None, said="") if self._bar else None
        self._found = 0

    def run_started(self, parts: int) -> None:
        """So many stores and runs were found."""
        if self._bar and self._task is not None:
            self._bar.update(self._task, total=parts)

    def part_finished(self, path: str, findings: int) -> None:
        """One is checked."""
        self._found += findings
        if self._bar and self._task is not None:
            self._bar.update(self._task, advance=1, said=f"{self._found} findings" if self._found else "")


def _print_report(report: CheckReport) -> None:
    """A table of what was found, if anything, and one line."""
    if report.findings:
        table = console.make_table("", "where", "what", "what to do")
        for one in report.findings:
            table.add_row(Text(one.kind, _STYLES[one.kind]), Text(one.path), Text(one.what), Text(one.cure))
        console.out.print(table)
    counts = [f"{len(report.of(kind))} {kind}" for kind in ("damaged", "unfinished", "running", "leftover")]
    from wsi_engine.cohorts.findings import count  # noqa: PLC0415

    there = f"{count(report.stores, 'store')} and {count(report.runs, 'run')}"
    there += f", {_in_units(report.bytes)} in {count(report.files, 'file')}"
    console.out.print(f"{there}: {', '.join(counts)}")


def _in_units(size: int) -> str:
    """Bytes as a person reads them."""
    power = min(3, max(0, len(str(size)) - 1) // 3)
    return f"{size / 1000**power:,.3g} {('bytes', 'kB', 'MB', 'GB')[power]}"
