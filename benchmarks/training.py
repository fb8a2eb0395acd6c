"""An epoch of CLAM-SB against a plain loop over HDF5 files: ``python -m benchmarks.training``.

Both train the same head on the same bags of random features, each bag once an epoch, with Adam. The plain loop is what
most scripts do: load a bag from HDF5 as float32, forward, backward, step, all in fp32 with torch's own dropout. Ours is
what ``wsi train`` runs by default; once with features that are read from the stores in every epoch, and once with
features that stay in memory after the first, as they do where they fit. The plain loop runs in a process of its own, as
it stands, and once more in ours, where freed memory is kept, which it gains from. All are timed in turns; figures are
medians. Options: ``--bags``, ``--tiles``, ``--repeats``, ``--json FILE``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import h5py
import numpy as np
import torch

from benchmarks._common import describe_machine, write_random_store
from wsi_engine.bags import StoredBags
from wsi_engine.cohorts.splits import Fold
from wsi_engine.memory import keep_freed_memory
from wsi_engine.models import create_head
from wsi_engine.training.fold import FoldTraining
from wsi_engine.training.hardware import choose_hardware
from wsi_engine.training.plan import HeadPlan
from wsi_engine.training.settings import TrainSettings

DIM = 1024
TARGET = 3.0
SETTINGS = TrainSettings(balanced=False, device="cpu")


def write_bags(folder: Path, bags: int, tiles: int) -> None:
    """The same random features as stores (float16) and as HDF5 (float32, contiguous, which h5py reads fastest)."""
    for number in range(bags):
        features = write_random_store(folder / f"{number}.zarr", tiles, DIM, number)
        with h5py.File(folder / f"{number}.h5", "w") as file:
            file["features"] = features.astype(np.float32)


def plain_loop(folder: Path, bags: int, labels: np.ndarray) -> Callable[[], object]:
    """An epoch as scripts write it."""
    torch.manual_seed(0)
    head = create_head("clam_sb", DIM, 2)
    optimiser = torch.optim.Adam(head.parameters(), lr=2e-4, weight_decay=1e-5)

    def epoch() -> None:
        head.train()
        for number in range(bags):
            with h5py.File(folder / f"{number}.h5") as file:
                features = torch.from_numpy(file["features"][:])
            optimiser.zero_grad()
            head.loss(head(features), int(labels[number])).backward()  # type: ignore[no-untyped-call]
            optimiser.step()

    return epoch


class PlainProcess:
    """The plain loop in a process of its own, which waits while others are timed."""

    def __init__(self, folder: Path, bags: int, labels: np.ndarray) -> None:
        context = get_context("spawn")
        self._pipe, far = context.Pipe()
        context.Process(target=_serve_epochs, args=(far, folder, bags, labels), daemon=True).start()

    def epoch(self) -> None:
        """Run one."""
        self._pipe.send(True)
        self._pipe.recv()


def _serve_epochs(pipe: Connection, folder: Path, bags: int, labels: np.ndarray) -> None:
    epoch = plain_loop(folder, bags, labels)
    with suppress(EOFError):  # the other end is closed when all is measured
        while pipe.recv():
            pipe.send(epoch())


def our_epoch(folder: Path, bags: int, labels: np.ndarray, limit: int | None) -> tuple[str, Callable[[], object]]:
    """An epoch of this engine, and the precision it chose; ``limit`` is the memory for them."""
    source = StoredBags([folder / f"{number}.zarr" for number in range(bags)])
    hardware = choose_hardware(SETTINGS, "clam_sb", float(source.tiles(0) * DIM))
    names = [str(number) for number in range(bags)]
    fold = Fold(tuple(range(bags)), (), ())
    training = FoldTraining(source, labels, fold, HeadPlan("clam_sb", DIM, 2), SETTINGS, 0, names, hardware, limit)

    def epoch() -> None:
        with hardware.repeatable():
            training.epoch()

    return str(hardware.precision), epoch


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bags", type=int, default=8)
    parser.add_argument("--tiles", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    options = parser.parse_args()
    keep_freed_memory()
    labels = np.arange(options.bags) % 2
    print(f"{describe_machine()}\ntorch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_bags(folder, options.bags, options.tiles)
        precision, kept = our_epoch(folder, options.bags, labels, None)
        ways = {
            "plain loop over HDF5, fp32": PlainProcess(folder, options.bags, labels).epoch,
            "the same, freed memory kept": plain_loop(folder, options.bags, labels),
            f"ours, {precision}, features read in every epoch": our_epoch(folder, options.bags, labels, 0)[1],
            f"ours, {precision}, features kept in memory": kept,
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(options.repeats + 1):
            for way, epoch in ways.items():
                start = time.perf_counter()
                epoch()
                if turn:  # the first turn warms up
                    seconds[way].append(time.perf_counter() - start)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    plain = next(iter(medians.values()))
    print(f"| an epoch of {options.bags} bags of {options.tiles:,} × {DIM:,} | seconds | ratio | goal |")
    for way, median in medians.items():
        print(f"| {way} | {median:.2f} | {plain / median:.2f}× | {f'{TARGET:g}×' if way.startswith('ours') else '–'} |")
    if options.json:
        options.json.write_text(json.dumps({"machine": describe_machine(), "seconds": seconds}, indent=2))


if __name__ == "__main__":
    main()
