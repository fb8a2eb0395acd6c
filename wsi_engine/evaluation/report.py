"""An evaluation on disk: ``report.md`` for people, ``report.json`` for programs, and pictures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from wsi_engine.errors import InputError
from wsi_engine.evaluation.comparison import Comparison
from wsi_engine.evaluation.figures import Evaluation
from wsi_engine.evaluation.plots import draw_confusion, draw_reliability, draw_roc, name_pictures
from wsi_engine.evaluation.tables import write_markdown
from wsi_engine.version import __version__

REPORT_VERSION = 1


def evaluation_folder(source: str | os.PathLike[str]) -> Path:
    """Where the report of a run or a table of predictions goes unless told otherwise: ``evaluation`` in its folder."""
    path = Path(source)
    if path.is_dir():
        return path / "evaluation"
    return path.parent / ("evaluation" if path.stem == "predictions" else f"evaluation-{path.stem}")


def write_evaluation(
    evaluation: Evaluation, folder: str | os.PathLike[str], against: Comparison | None = None
) -> Path:  # fmt: skip
    """Write ``report.md``, ``report.json``, ``roc.png``, ``reliability.png`` and ``confusion.png``.

    Each file is replaced in one step, ``report.md`` last.

    Args:
        evaluation: what to report.
        folder: where to; made where there is none.
        against: a comparison with another run to report along.

    Returns:
        The path of ``report.md``.

    Raises:
        InputError: the folder cannot be written.
    """
    target = Path(folder)
    pictures = tuple(name_pictures())
    for (file, _), draw in zip(pictures, (draw_roc, draw_reliability, draw_confusion), strict=True):
        _replace(target / file, draw(evaluation))
    _replace(target / "report.json", (json.dumps(to_json(evaluation, against), indent=2) + "\n").encode())
    report = target / "report.md"
    _replace(report, write_markdown(evaluation, pictures, against).encode())
    return report


def to_json(evaluation: Evaluation, against: Comparison | None = None) -> dict[str, Any]:
    """All numbers as plain JSON values; what is undefined is null."""
    cases = evaluation.cases
    mean, spread = evaluation.fold_auroc
    value = {
        "version": REPORT_VERSION,
        "engine_version": __version__,
        "source": cases.source,
        "kind": cases.kind,
        "label": cases.label or None,
        "classes": cases.classes,
        "slides": evaluation.slides,
        "predictions": len(cases),
        "patients": evaluation.patients,
        "predictions_by_class": np.bincount(cases.labels, minlength=len(cases.classes)),
        "bootstrap": asdict(evaluation.settings),
        "figures": {name: asdict(one) for name, one in evaluation.figures.items()},
        "by_class": [
            {"class": name} | {what: asdict(one) for what, one in found.items()}
            for name, found in evaluation.by_class.items()
        ],
        "decision": "validation threshold" if cases.thresholds_known else "most probable class",
        "confusion": evaluation.confusion,
        "confusion_at_threshold": evaluation.confusion_at_threshold,
        "reliability": asdict(evaluation.reliability),
        "reliability_before": asdict(evaluation.reliability_before) if evaluation.reliability_before else None,
        "folds": [asdict(one) for one in evaluation.folds],
        "fold_auroc": {"mean": mean, "sd": spread},
        "warnings": evaluation.warnings,
        "against": _compare_to_json(against) if against else None,
    }
    found: dict[str, Any] = _plain(value)
    return found


def _compare_to_json(against: Comparison) -> dict[str, Any]:
    named = ("first", "second", "slides", "patients", "only_first", "only_second", "warnings")
    values = {name: getattr(against, name) for name in named}
    return values | {"differences": {name: asdict(one) for name, one in against.differences.items()}}


def _plain(value: Any) -> Any:
    """Lists for arrays and tuples, null for NaN and infinities."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_bytes(content)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error
