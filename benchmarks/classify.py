"""Slides a second from features on disk: ``python -m benchmarks.classify``.

Stores of 5,000 tiles in float16, heads with fresh weights (speed does not depend on them). Each way is measured in one
process, the median of three passes over the stores: reading alone, the heads alone, and ``classify`` as a whole with
nothing written but the table, and with the attention kept. Then bf16 against fp32: probabilities and attention.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from benchmarks._common import describe_machine, write_random_store
from wsi_engine.bags import StoredBags
from wsi_engine.classification.ensemble import load_ensemble
from wsi_engine.classification.explanation import ExplainSettings
from wsi_engine.classification.slides import classify
from wsi_engine.models import create_head, save_head
from wsi_engine.runs import FeatureOrigin, RunFolder, RunRecord
from wsi_engine.store import FeatureStore
from wsi_engine.version import __version__

TILES = 5000
SLIDES = 24
REPEATS = 3
CASES = (("clam_sb", 1024, 1), ("clam_sb", 1024, 5), ("abmil", 384, 1), ("abmil", 384, 5), ("dsmil", 1024, 1))
"""Head, numbers per tile, folds."""

BARE = ExplainSettings(attention=False, heatmaps=False, geojson=False, sheets=False)
KEPT = ExplainSettings(attention=True, heatmaps=False, geojson=False, sheets=False)


def write_run(path: Path, origin: FeatureOrigin, head: str, folds: int) -> Path:
    """A run of heads with fresh weights."""
    folder = RunFolder(path)
    for fold in range(folds):
        torch.manual_seed(fold)
        card = {"features": asdict(origin), "classes": ["a", "b"], "calibration": {"temperature": 1.0}}
        folder.fold(fold).mkdir(parents=True, exist_ok=True)
        save_head(create_head(head, origin.dim, 2), folder.head_file(fold), card)
    folder.write_record(RunRecord("label", ("a", "b"), head, {}, folds, origin, {}, __version__, complete=True))
    return path


def rate(work: Callable[[], object], slides: int) -> float:
    """Slides a second, median after one unmeasured pass."""
    work()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return slides / statistics.median(seconds)


def measure(folder: Path, head: str, dim: int, folds: int) -> None:
    """Print one line of rates, and what bf16 changes."""
    stores = folder / f"noise{dim}"
    if not stores.exists():
        for number in range(SLIDES):
            write_random_store(stores / f"s{number}.zarr", TILES, dim, number)
    paths = sorted(stores.glob("*.zarr"))
    origin = FeatureOrigin.of(FeatureStore.open(paths[0]))
    run = write_run(folder / f"{head}-{dim}-{folds}", origin, head, folds)
    model, exact = load_ensemble(run, "cpu"), load_ensemble(run, "cpu", "fp32")
    bags = StoredBags(paths)
    bag = bags.load(0)
    rates = (
        rate(lambda: [bags.load(place) for place in range(len(paths))], len(paths)),
        rate(lambda: [exact.predict(bag) for _ in range(4)], 4),
        rate(lambda: [model.predict(bag) for _ in range(12)], 12),
        rate(lambda: classify(paths, model, folder / run.name / "bare", settings=BARE), len(paths)),
        rate(lambda: classify(paths, model, folder / run.name / "kept", settings=KEPT), len(paths)),
    )
    print(f"| {head} {dim}-d, {folds} fold{'s' if folds > 1 else ''}, {model.precision} | "
          + " | ".join(f"{one:.1f}" for one in rates) + " |", flush=True)  # fmt: skip
    a, b = exact.predict(bag), model.predict(bag)
    x, y = a.attention[:, 0].astype(float), b.attention[:, 0].astype(float)
    cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    ranks = np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1]
    if model.precision != "fp32":
        change = np.abs(a.probabilities - b.probabilities).max()
        print(f"|   {model.precision} against fp32: probabilities within {change:.1e}, attention cosine {cosine:.6f}, "
              f"correlation of ranks {ranks:.5f} |", flush=True)  # fmt: skip


def main() -> None:
    """All cases, or those whose head is named."""
    print(describe_machine())
    print("| slides/s of 5,000 tiles | reading | heads, fp32 | heads | classify | with attention kept |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for head, dim, folds in CASES:
            if len(sys.argv) < 2 or head in sys.argv[1:]:
                measure(Path(folder), head, dim, folds)


if __name__ == "__main__":
    main()
