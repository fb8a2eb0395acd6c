"""``wsi status``: what is done, running, failed and pending in a folder of stores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from wsi_engine.cli import console

if TYPE_CHECKING:
    from wsi_engine.cohorts.states import CohortStatus, JobState

_SHOWN = 20
"""Slides listed of those that failed and of those that are running, unless all are asked for."""


def status(
    folder: Annotated[
        str, typer.Argument(metavar="DIR|URL", help="Folder of the stores.", show_default=False)
    ],
    cohort: Annotated[
        Path | None,
        typer.Option(metavar="COHORT.csv", help="The slides there should be; without it, those that left a trace.",
                     show_default=False),
    ] = None,
    jobs: Annotated[
        list[str] | None,
        typer.Option("--job", help="What there should be of each slide, as features/resnet50 or nuclei/stain; "
                     "may be given several times.", show_default=False),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="List every slide that failed or is running.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:  # fmt: skip
    """Show how far the slides of a folder are: features, attention and nuclei, and why some failed.

    Only looks; safe while others write there. Exit code 0 whatever is found.
    """
    from wsi_engine.cohorts.roster import Roster  # noqa: PLC0415 - a light command line starts fast
    from wsi_engine.cohorts.states import read_status  # noqa: PLC0415

    found = read_status(folder, None if cohort is None else Roster.read(cohort), jobs or ())
    if as_json:
        console.print_json(found.to_json())
        return
    _print_counts(found)
    most = len(found.states) if everything else _SHOWN
    _print_states("running", "by", found.having("running"), most)
    _print_states("failed", "why", found.having("failed"), most)


def _print_counts(found: CohortStatus) -> None:
    from wsi_engine.cohorts.findings import count, list_some  # noqa: PLC0415
    from wsi_engine.cohorts.states import STATES  # noqa: PLC0415

    console.out.print(f"{count(len(found.slides), 'slide')} in {found.folder}", markup=False)
    if found.others:
        what = f"{count(len(found.others), 'other slide')} there, not in the cohort: {list_some(found.others)}"
        console.out.print(what, markup=False)
    if not found.jobs:
        console.out.print("nothing was begun yet")
        return
    table = console.make_table("job", *STATES)
    for column in table.columns[1:]:
        column.justify = "right"
    for job, numbers in found.counts().items():
        table.add_row(Text(job), *(str(numbers[state] or "–") for state in STATES))
    console.out.print(table)


def _print_states(heading: str, what: str, states: Sequence[JobState], most: int) -> None:
    """The slides that are in one state, and what there is to say of each."""
    if not states:
        return
    table = console.make_table(heading, "job", what)
    for one in states[:most]:
        table.add_row(Text(one.slide_id), Text(one.job), Text(one.detail.removeprefix("by ")))
    console.out.print(table)
    if len(states) > most:
        console.out.print(f"and {len(states) - most} more: --all lists them")
