"""Pictures of an evaluation as PNG: ROC curves, reliability diagram, confusion matrix. Nothing global is touched."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from wsi_engine.metrics import roc_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from wsi_engine.evaluation.figures import Evaluation
    from wsi_engine.metrics import Interval, ReliabilityBins
    from wsi_engine.metrics.checks import Floats, Ints

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart by colour-blind people (Okabe & Ito 2008; their yellow is too pale for lines)."""

STYLES = ("-", "--", ":", "-.")
"""A new style each time the colours are used up."""

_GREY = "#8a8a8a"
_DPI = 140
_LEGEND_ROWS = 8
"""Up to so many curves are named inside the axes; more beside them."""


def draw_roc(evaluation: Evaluation) -> bytes:
    """ROC curves as PNG: of class 1 for two classes, else of each class against the rest, AUROC in the legend."""
    cases = evaluation.cases
    numbers = [1] if len(cases.classes) == 2 else list(range(len(cases.classes)))
    beside = len(numbers) > _LEGEND_ROWS
    figure = _make_figure(7.4 + 3.2 * beside)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=(0, (2, 3)))
    for place, number in enumerate(numbers):
        alarms, hits, _ = roc_curve(cases.labels, cases.probabilities, number)
        if not np.isfinite([*alarms, *hits]).all():
            continue
        name = cases.classes[number]
        area = evaluation.by_class[name]["auroc"] if name in evaluation.by_class else evaluation.figures["auroc"]
        style = STYLES[place // len(COLOURS) % len(STYLES)]
        colour = COLOURS[place % len(COLOURS)]
        label = f"{_shorten(name, 28)}\n{_say(area)}"
        axes.plot(alarms, hits, color=colour, linestyle=style, linewidth=2, label=label)
    axes.set(xlabel="1 − specificity", ylabel="sensitivity", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.set_title(_title(evaluation, "ROC" if len(numbers) == 1 else "ROC, each class against the rest"))
    axes.set_aspect("equal")
    axes.grid(color="#e4e4e4", linewidth=0.8)
    if axes.get_legend_handles_labels()[0]:
        place_at = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)} if beside else {"loc": "lower right"}
        axes.legend(fontsize=9 if len(numbers) > 3 else 10.5, framealpha=0.9, labelspacing=0.7, **place_at)
    return _to_png(figure)


def draw_reliability(evaluation: Evaluation) -> bytes:
    """Reliability diagram as PNG: share predicted right by confidence, and how many slides each bin holds."""
    figure = _make_figure(7.4)
    grid = figure.add_gridspec(2, 1, height_ratios=[4, 1])
    upper = figure.add_subplot(grid[0])
    lower = figure.add_subplot(grid[1], sharex=upper)
    upper.tick_params(labelbottom=False)
    upper.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=(0, (2, 3)), label="as sure as right")
    before, after = evaluation.reliability_before, evaluation.reliability
    if before is not None:
        error = evaluation.figures["ece_before"].value
        _plot_bins(upper, before, COLOURS[1], "s--", f"before temperature, ECE {error:.3f}")
    label = "after temperature" if before is not None else "probabilities"
    _plot_bins(upper, after, COLOURS[0], "o-", f"{label}, ECE {evaluation.figures['ece'].value:.3f}")
    lowest = 1 / len(evaluation.cases.classes)
    lowest = max(0.0, np.floor(lowest * 10) / 10 - 0.02)
    upper.set(ylabel="share predicted right", ylim=(-0.02, 1.02), xlim=(lowest, 1.02))
    upper.set_title(_title(evaluation, "Reliability"))
    upper.legend(loc="best", fontsize=10.5, framealpha=0.9)
    width = np.diff(after.edges)
    lower.bar(after.edges[:-1], after.counts, width=width * 0.92, align="edge", color=COLOURS[0], alpha=0.75)
    lower.set(xlabel="probability of the predicted class", ylabel="slides")
    lower.locator_params(axis="y", integer=True, nbins=4)
    for one in (upper, lower):
        one.grid(color="#e4e4e4", linewidth=0.8)
        one.set_axisbelow(True)
    return _to_png(figure)


def draw_confusion(evaluation: Evaluation) -> bytes:
    """Confusion matrix as PNG: slides by true and most probable class, and their share of the true class."""
    table, classes = evaluation.confusion, evaluation.cases.classes
    count = len(classes)
    side = float(np.clip(2.2 + 0.95 * count, 7.4, 14))
    figure = _make_figure(side, side)
    axes = figure.add_subplot()
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    _write_cells(axes, table, shares, float(np.clip(22 - 1.2 * count, 7.5, 16)))
    names = ["\n".join(textwrap.wrap(_shorten(name, 36), 16)) for name in classes]
    small = 11 if count <= 6 else 9
    widest = max(len(line) for name in names for line in name.split("\n"))
    upright = widest * small * 0.65 / 72 < 0.7 * side / count  # inches of a line, and of a cell
    axes.set_xticks(range(count), names, rotation=0 if upright else 45, ha="center" if upright else "right",
                    rotation_mode="anchor" if not upright else "default", fontsize=small)  # fmt: skip
    axes.set_yticks(range(count), names, fontsize=small)
    axes.set(xlabel="most probable class", ylabel="true class")
    axes.set_title(_title(evaluation, "Confusion matrix"))
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("share of the true class")
    return _to_png(figure)


def _plot_bins(axes: Axes, bins: ReliabilityBins, colour: str, style: str, label: str) -> None:
    there = bins.counts > 0
    axes.plot(
        bins.confidence[there], bins.accuracy[there], style, color=colour, linewidth=2, markersize=6, label=label
    )  # fmt: skip


def _write_cells(axes: Axes, table: Ints, shares: Floats, size: float) -> None:
    for row, values in enumerate(table.tolist()):
        for column, value in enumerate(values):
            share = float(shares[row, column])
            axes.text(
                column, row, f"{value}\n{share:.0%}", ha="center", va="center", fontsize=size,
                color="white" if share > 0.55 else "black",
            )  # fmt: skip


def _make_figure(width: float, height: float = 7.4) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to load
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _to_png(figure: Figure) -> bytes:
    """The figure, with all that hangs over its sides."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", bbox_inches="tight", pad_inches=0.12, metadata={"Software": None})
    return stream.getvalue()


def _title(evaluation: Evaluation, what: str) -> str:
    return f"{what}\n{evaluation.size}"


def _say(interval: Interval) -> str:
    return f"AUROC {interval.value:.3f} ({interval.low:.3f}–{interval.high:.3f})"


def _shorten(name: str, most: int) -> str:
    """A name that fits, in one line, safe from the plot's own markup."""
    plain = " ".join(name.split())
    if len(plain) > most:  # names often differ in their last word
        kept = most - 1
        plain = f"{plain[: kept - kept // 2].rstrip()}…{plain[-(kept // 2) :].lstrip()}"
    return plain.replace("$", r"\$")


def name_pictures() -> Sequence[tuple[str, str]]:
    """Files of the pictures and what they show, in the order of a report."""
    return (
        ("roc.png", "ROC curves"),
        ("reliability.png", "Reliability diagram"),
        ("confusion.png", "Confusion matrix"),
    )
