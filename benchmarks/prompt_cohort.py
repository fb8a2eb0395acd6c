"""Do prompts beat frozen features where what decides is not what the backbone tells? On drawn slides with known truth.

    python -m benchmarks.prompt_cohort [FOLDER] [--seeds 3] [--epochs 12] [--jobs 2] [--json FILE]

Warms up a small transformer (benchmarks/prompt_warmup.py), draws a cohort for each seed (benchmarks/prompt_scenes.py),
and trains the same head on it in the three modes of ``wsi train prompt``, each run in a process of its own with one
thread. Held-out patients alone are judged. Intervals are of a bootstrap over patients within each cohort, the same
patients for all modes. What is in FOLDER already is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._common import describe_machine
from benchmarks.prompt_scenes import TILE, SceneSpec, write_scenes
from wsi_engine.metrics import auroc
from wsi_engine.predictions import PredictionTable
from wsi_engine.runs import RunFolder

MODES = ("conventional", "prompt", "finetune")
RATES = {"conventional": 1e-2, "prompt": 3e-2, "finetune": 3e-4}
"""Learning rates; with that of the others the whole network does not learn."""

TIMES = {"conventional": 5, "prompt": 1, "finetune": 1}
"""How many times ``--epochs`` a mode gets; on frozen features an epoch costs next to nothing."""

HEAD, OPTIONS = "mean", {"hidden": (), "dropout": 0.0, "standardise": True}
RESAMPLES = 2000


def train_one(folder: Path, seed: int, mode: Any, epochs: int) -> None:
    """One run in this process."""
    import torch  # noqa: PLC0415 - the process that gathers needs none of it

    from benchmarks.prompt_warmup import CARD  # noqa: PLC0415
    from wsi_engine.cohorts.splits import SplitSettings  # noqa: PLC0415
    from wsi_engine.encoders.deep import DeepEncoder  # noqa: PLC0415
    from wsi_engine.training import PromptSettings, train_prompt  # noqa: PLC0415

    torch.set_num_threads(1)
    epochs *= TIMES[mode]
    settings = PromptSettings(
        epochs=epochs, least_epochs=epochs, learning_rate=RATES[mode], least_rate=1e-5, bags_per_step=4, chunk=64,
        device="cpu", precision="fp32", seed=seed,
    )  # fmt: skip
    train_prompt(
        folder / f"cohort-{seed}" / "cohort.csv", "label", folder / f"run-{seed}-{mode}",
        encoder=DeepEncoder(CARD, str(folder / "backbone.safetensors"), "cpu", "fp32"), head=HEAD, options=OPTIONS,
        mode=mode, tile_px=TILE, tissue=None, splits=SplitSettings("column"), settings=settings,
    )  # fmt: skip


def measure(tables: Sequence[PredictionTable]) -> tuple[float, float]:
    """AUROC and accuracy, means over cohorts."""
    figures = [
        (auroc(one.labels, one.probabilities[:, 1]), float((one.probabilities.argmax(1) == one.labels).mean()))
        for one in tables
    ]
    mean: tuple[float, float] = tuple(np.mean(figures, axis=0).tolist())
    return mean


def resample(tables: dict[str, list[PredictionTable]]) -> dict[str, NDArray[np.float64]]:
    """AUROC and accuracy (RESAMPLES, 2) of each mode on patients drawn anew, the same for all modes."""
    rng = np.random.default_rng(0)
    found: dict[str, list[tuple[float, float]]] = {mode: [] for mode in tables}
    sizes = [len(one.labels) for one in next(iter(tables.values()))]
    for _ in range(RESAMPLES):
        rows = [rng.integers(0, size, size) for size in sizes]
        for mode, own in tables.items():
            found[mode].append(measure([_take(one, row) for one, row in zip(own, rows, strict=True)]))
    return {mode: np.array(values) for mode, values in found.items()}


def _take(table: PredictionTable, rows: NDArray[np.int64]) -> PredictionTable:
    return PredictionTable(
        table.classes, tuple(table.slide_ids[row] for row in rows), tuple(table.patients[row] for row in rows),
        table.labels[rows], table.folds[rows], table.probabilities[rows],
    )  # fmt: skip


def print_table(folder: Path, seeds: int) -> list[dict[str, Any]]:
    """A row for each mode, and the differences to the conventional one; returned as plain values."""
    names = [slide.split(",") for slide in (folder / "cohort-0" / "cohort.csv").read_text().splitlines()[1:]]
    tables: dict[str, list[PredictionTable]] = {}
    costs: dict[str, list[dict[str, Any]]] = {}
    for mode in MODES:
        runs = [RunFolder(folder / f"run-{seed}-{mode}") for seed in range(seeds)]
        tables[mode] = [PredictionTable.read(run.predictions_file) for run in runs]
        costs[mode] = [run.read_record().summary["tuning"] for run in runs]
        assert all(len(one.labels) == sum(name[4] == "test" for name in names) for one in tables[mode])
    drawn = resample(tables)
    rows = []
    print("| mode | AUROC | accuracy | parameters of the encoder that learn | peak memory | an epoch |")
    print("|---|---|---|---|---|---|")
    for mode in MODES:
        (area, right), spread = measure(tables[mode]), np.quantile(drawn[mode], (0.025, 0.975), axis=0)
        cost = costs[mode]
        memory = float(np.median([one["peak_memory_mb"] for one in cost]))
        seconds = float(np.median([one["seconds_per_epoch"] for one in cost]))
        print(
            f"| {mode} | {area:.3f} ({spread[0, 0]:.3f}–{spread[1, 0]:.3f}) | {right:.3f} ({spread[0, 1]:.3f}–"
            f"{spread[1, 1]:.3f}) | {cost[0]['encoder_parameters']:,} | {memory:.0f} MiB | {seconds:.2f} s |"
        )
        each = [measure([one])[0] for one in tables[mode]]
        rows.append({"mode": mode, "auroc": area, "accuracy": right, "interval": spread.tolist(), "each": each,
                     "parameters": cost[0]["encoder_parameters"], "head": cost[0]["head_parameters"],
                     "memory_mb": memory, "seconds": seconds})  # fmt: skip
    for mode in MODES[1:]:
        gain = drawn[mode] - drawn["conventional"]
        low, high = np.quantile(gain, (0.025, 0.975), axis=0)
        area, right = np.subtract(measure(tables[mode]), measure(tables["conventional"]))
        print(f"{mode} over conventional: AUROC {area:+.3f} ({low[0]:+.3f} to {high[0]:+.3f}), "
              f"accuracy {right:+.3f} ({low[1]:+.3f} to {high[1]:+.3f})")  # fmt: skip
        rows.append({"mode": f"{mode} over conventional", "auroc": area, "accuracy": right,
                     "interval": [low.tolist(), high.tolist()]})  # fmt: skip
    print("AUROC in each cohort:", "; ".join(f"{r['mode']} " + ", ".join(f"{v:.3f}" for v in r["each"])
                                             for r in rows if "each" in r))  # fmt: skip
    return rows


def run_all(folder: Path, seeds: int, epochs: int, jobs: int) -> None:
    """Backbone, cohorts and runs; those there already are kept."""
    from benchmarks.prompt_warmup import write_backbone  # noqa: PLC0415 - loads torch

    start = time.perf_counter()
    write_backbone(folder / "backbone.safetensors")
    print(f"warm-up: {time.perf_counter() - start:.0f} s", flush=True)
    for seed in range(seeds):
        if not (folder / f"cohort-{seed}" / "cohort.csv").exists():
            write_scenes(folder / f"cohort-{seed}", SceneSpec(seed=seed))

    def run(task: tuple[str, int]) -> None:
        mode, seed = task
        command = [sys.executable, "-m", "benchmarks.prompt_cohort", str(folder), "--epochs", str(epochs),
                   "--one", str(seed), mode]  # fmt: skip
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            raise SystemExit(f"{mode}, seed {seed} failed:\n{done.stderr}")
        print(f"{mode}, seed {seed}: {time.perf_counter() - start:.0f} s since the start", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, product(MODES, range(seeds))))


def main() -> None:
    """Run all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("SEED", "MODE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        train_one(given.folder, int(given.one[0]), given.one[1], given.epochs)
        return
    print(describe_machine())
    with tempfile.TemporaryDirectory() as kept:
        folder = given.folder or Path(kept)
        run_all(folder, given.seeds, given.epochs, given.jobs)
        rows = print_table(folder, given.seeds)
    if given.json:
        given.json.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
