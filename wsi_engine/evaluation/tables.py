"""A report in Markdown: plain tables that people read and diff."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite

from wsi_engine.cohorts.findings import count
from wsi_engine.evaluation.cases import Cases
from wsi_engine.evaluation.columns import TITLES
from wsi_engine.evaluation.comparison import Comparison
from wsi_engine.evaluation.figures import Evaluation
from wsi_engine.metrics import Interval
from wsi_engine.metrics.checks import Ints


def write_markdown(evaluation: Evaluation, pictures: Iterable[tuple[str, str]], against: Comparison | None) -> str:
    """The report as Markdown.

    Args:
        evaluation: its figures.
        pictures: files beside the report, and what they show.
        against: a comparison with another run, where there is one.
    """
    cases = evaluation.cases
    parts = [
        f"# Evaluation of {_cell(cases.source)}\n\n{_introduce(evaluation)}",
        _list_warnings(evaluation.warnings),
        f"## Figures\n\n{_tabulate_figures(evaluation.figures)}\n\n{explain_figures(evaluation)}",
        _tabulate_classes(evaluation),
        _tabulate_confusion(evaluation),
        _tabulate_folds(evaluation),
        _tabulate_comparison(against) if against else "",
        "## Pictures\n\n" + "\n\n".join(f"![{what}]({file})" for file, what in pictures),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def format_interval(interval: Interval) -> str:
    """``0.912 (0.871–0.944)``; n/a where undefined."""
    if not isfinite(interval.value):
        return "n/a"
    return f"{interval.value:z.3f} ({format_range(interval)})"


def format_range(interval: Interval) -> str:
    """``0.871–0.944``; ``to`` in place of the dash where an end is negative; n/a where undefined."""
    if not (isfinite(interval.low) and isfinite(interval.high)):
        return "n/a"
    return f"{interval.low:z.3f}{'–' if interval.low >= 0 else ' to '}{interval.high:z.3f}"


def explain_decision(cases: Cases) -> str:
    """How sensitivity and specificity were decided."""
    positive = cases.classes[1]
    if cases.thresholds_known:
        return f"Sensitivity and specificity for {positive} are at the threshold of each fold's validation slides."
    return f"Sensitivity and specificity for {positive} are of the most probable class: there is no fitted threshold."


def explain_figures(evaluation: Evaluation) -> str:
    """What the figures rest on."""
    cases, settings = evaluation.cases, evaluation.settings
    many = len(cases.classes) > 2
    lines = [
        f"Intervals hold {settings.level:.0%} of {settings.resamples} resamples of patients with replacement, each "
        f"with all of their slides (seed {settings.seed}); the same resamples for all figures.",
        f"AUROC and AUPRC {'are means over the classes, each against the rest' if many else f'are for {cases.classes[1]}'}"  # noqa: E501
        "; accuracy, balanced accuracy, F1 and kappa take the most probable class.",
    ]
    if not many:
        lines.append(explain_decision(cases))
    if cases.kind == "run":
        lines.append(
            "A fold's temperature and threshold were fitted on its validation slides only, never on those it held out."
        )
    lines.append("Lower is better for ECE, Brier score and log-likelihood; ECE is biased upwards on few slides.")
    return "\n".join(f"- {line}" for line in lines)


def _introduce(evaluation: Evaluation) -> str:
    cases = evaluation.cases
    what = {
        "run": "Held-out predictions of all folds, each calibrated by its fold's temperature.",
        "folds": "Predictions of folds as they stand in a table.",
        "ensemble": "Predictions of an ensemble as they stand in a table.",
    }[cases.kind]
    what_counts = "slides" if evaluation.slides == len(cases) else "predictions"
    rows = []
    for number, name in enumerate(cases.classes):
        own = cases.labels == number
        patients = {patient for patient, is_own in zip(cases.patients, own, strict=True) if is_own}
        rows.append((_cell(name), str(int(own.sum())), str(len(patients))))
    label = f" Label: {_cell(cases.label)}." if cases.label else ""
    table = _lay_table(("class", what_counts, "patients"), rows)
    return f"{what}{label} {evaluation.size}.\n\n{table}"


def _list_warnings(warnings: Sequence[str]) -> str:
    return "## Warnings\n\n" + "\n".join(f"- {_cell(text)}" for text in warnings) if warnings else ""


def _tabulate_figures(figures: dict[str, Interval]) -> str:
    rows = [
        (TITLES[name], f"{one.value:z.3f}" if isfinite(one.value) else "n/a", format_range(one), str(one.resamples),
         str(one.skipped))
        for name, one in figures.items()
    ]  # fmt: skip
    return _lay_table(("figure", "value", "95 % interval", "resamples", "skipped"), rows)


def _tabulate_classes(evaluation: Evaluation) -> str:
    if not evaluation.by_class:
        return ""
    rows = [
        (_cell(name), *(format_interval(found[what]) for what in ("auroc", "sensitivity", "precision")))
        for name, found in evaluation.by_class.items()
    ]
    return "## Classes, each against the rest\n\n" + _lay_table(("class", "AUROC", "sensitivity", "precision"), rows)


def _tabulate_confusion(evaluation: Evaluation) -> str:
    classes = evaluation.cases.classes
    text = "## Confusion\n\nSlides by most probable class (columns) and true class (rows).\n\n"
    text += _tabulate_counts(evaluation.confusion, classes)
    if evaluation.confusion_at_threshold is not None:
        text += "\n\nThe same by the thresholds of the folds.\n\n"
        text += _tabulate_counts(evaluation.confusion_at_threshold, classes)
    return text


def _tabulate_counts(table: Ints, classes: Sequence[str]) -> str:
    rows = [(_cell(name), *map(str, counts)) for name, counts in zip(classes, table.tolist(), strict=True)]
    return _lay_table(("true class", *map(_cell, classes)), rows)


def _tabulate_folds(evaluation: Evaluation) -> str:
    if not evaluation.folds:
        return ""
    rows = [
        (
            str(one.fold), str(one.slides), str(one.patients), f"{one.auroc:.3f}" if isfinite(one.auroc) else "n/a",
            f"{one.temperature:.3f}", "–" if one.threshold is None else f"{one.threshold:.3f}",
        )
        for one in evaluation.folds
    ]  # fmt: skip
    mean, spread = evaluation.fold_auroc
    told = f"AUROC {mean:.3f} ± {spread:.3f} (mean and standard deviation over folds)" if isfinite(spread) else ""
    header = ("fold", "slides", "patients", "AUROC", "temperature", "threshold")
    return "\n\n".join(part for part in ("## Folds", _lay_table(header, rows), told) if part)


def _tabulate_comparison(against: Comparison) -> str:
    rows = [
        (
            TITLES[name], f"{one.first:.3f}", f"{one.second:.3f}", f"{one.value:+.3f}", format_range(one),
            f"{one.p_value:.3f}" if isfinite(one.p_value) else "n/a",
        )
        for name, one in against.differences.items()
    ]  # fmt: skip
    size = f"{count(against.slides, 'slide')} of {count(against.patients, 'patient')}"
    text = (
        f"## Against {_cell(against.second)}\n\nOn the {size} that both hold, the same resamples of patients for both. "
        f"Left out: {count(against.only_first, 'slide')} that only the first holds, and "
        f"{count(against.only_second, 'slide')} that only the second holds.\n\n"
    )
    text += _lay_table(("figure", "first", "second", "second − first", "95 % interval", "p"), rows)
    if against.warnings:
        text += "\n\n" + "\n".join(f"- {_cell(one)}" for one in against.warnings)
    return text


def _lay_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    ruler = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows))


def _cell(text: str) -> str:
    """Text that breaks no table, and no markup beside it."""
    flat = " ".join(text.split())
    return "".join(f"\\{sign}" if sign in r"\|`*_<[" else sign for sign in flat)
