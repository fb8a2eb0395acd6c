"""``wsi evaluate``: how good a run is, how sure that is, and whether another one is better."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from wsi_engine.cli import console
from wsi_engine.cli.evaluate_nuclei import evaluate_nuclei

if TYPE_CHECKING:
    from wsi_engine.evaluation import Comparison, Evaluation


class _RunByDefault(TyperGroup):
    """``wsi evaluate RUN`` is short for ``wsi evaluate run RUN``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


evaluate_app = typer.Typer(
    name="evaluate",
    help="Measure a run or predictions of classes (wsi evaluate RUN), or nuclei (wsi evaluate nuclei).",
    cls=_RunByDefault,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def evaluate(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|PREDICTIONS.csv",
            help="Folder of wsi train, or a table of predictions of wsi train or wsi classify.",
            show_default=False,
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(metavar="RUN|CSV", help="Another run or table to compare with.", show_default=False),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(metavar="COHORT.csv", help="True classes, for a table without them.", show_default=False),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Column of --truth; a run knows its own.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Folder of the report; evaluation/ beside it if not given.",
                     show_default=False),
    ] = None,
    resamples: Annotated[int, typer.Option(help="Resamples of patients, at least 1000.")] = 1000,
    seed: Annotated[int, typer.Option(help="Same seed, same intervals.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:  # fmt: skip
    """Measure a run on the slides its folds held out, with 95 % intervals over patients.

    Temperatures and thresholds are those that training fitted on validation slides; nothing is fitted here.
    Writes report.md, report.json, roc.png, reliability.png and confusion.png.
    """
    from wsi_engine import evaluation  # noqa: PLC0415 - a light command line starts fast
    from wsi_engine.evaluation.report import to_json  # noqa: PLC0415

    found = evaluation.evaluate_run(source, resamples=resamples, seed=seed, truth=truth, label=label)
    other = None
    if against is not None:
        other = evaluation.compare_runs(source, against, resamples=resamples, seed=seed, truth=truth, label=label)
    report = evaluation.write_evaluation(found, out or evaluation.evaluation_folder(source), other)
    if as_json:
        console.print_json(to_json(found, other) | {"report": str(report)})
        return
    _print_figures(found)
    if other is not None:
        _print_differences(other)
    for warning in dict.fromkeys((*found.warnings, *(other.warnings if other else ()))):
        console.err.print(Text(f"warning: {warning}", style="yellow"))
    console.out.print(f"report: {report}", markup=False)


def _print_figures(found: Evaluation) -> None:
    from wsi_engine.evaluation.columns import TITLES  # noqa: PLC0415
    from wsi_engine.evaluation.tables import format_range  # noqa: PLC0415

    cases = found.cases
    console.out.print(f"{found.size}; classes {', '.join(cases.classes)}", markup=False)
    table = _make_table("figure", "value", "95 % interval")
    for name, one in found.figures.items():
        table.add_row(TITLES[name], _format(one.value), format_range(one))
    for name, measured in found.by_class.items():
        table.add_row(Text(f"AUROC of {name}"), _format(measured["auroc"].value), format_range(measured["auroc"]))
    console.out.print(table)
    mean, spread = found.fold_auroc
    if spread == spread:  # noqa: PLR0124 - NaN alone differs from itself
        console.out.print(f"AUROC over {len(found.folds)} folds: {mean:.3f} ± {spread:.3f}")


def _print_differences(other: Comparison) -> None:
    from wsi_engine.cohorts.findings import count  # noqa: PLC0415
    from wsi_engine.evaluation.columns import TITLES  # noqa: PLC0415
    from wsi_engine.evaluation.tables import format_range  # noqa: PLC0415

    console.out.print(
        f"\nagainst {other.second}, on {count(other.slides, 'slide')} of {count(other.patients, 'patient')} that both "
        "hold:",
        markup=False,
    )
    table = _make_table("figure", "first", "second", "second − first", "95 % interval", "p")
    for name, one in other.differences.items():
        table.add_row(
            TITLES[name], _format(one.first), _format(one.second), _format(one.value, "+"), format_range(one),
            _format(one.p_value),
        )  # fmt: skip
    console.out.print(table)


def _make_table(*columns: str) -> Table:
    """A table whose first column is text and whose others are figures."""
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _format(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if value == value else "n/a"  # noqa: PLR0124 - NaN alone differs from itself


evaluate_app.command("run")(console.reporting(evaluate))
evaluate_app.command("nuclei")(console.reporting(evaluate_nuclei))
