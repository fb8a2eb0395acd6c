"""Two workers against one on a job that waits for reading: ``python -m benchmarks.cluster``.

Slides at 0.25 mpp are read at 0.5 by the reader ``turbo``, one thread a worker; the encoder costs nothing, like a GPU
that waits for its tiles. Each worker is held to a core of its own, as Slurm holds it; ``--free`` lets them roam. The
clusters are up and have worked before the clock starts, and both take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._common import describe_machine
from benchmarks.slides import big_slide, small_slides
from wsi_engine import extract

GOAL = 1.8


def dask_setup(worker: Any) -> None:
    """In a worker, which loads this file first: one core, and an encoder that costs nothing."""
    from wsi_engine.encoders.texture import TEXTURE_CARD, TextureEncoder  # noqa: PLC0415

    if "BENCHMARK_FREE" not in os.environ:
        cores = sorted(os.sched_getaffinity(0))
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), {cores[worker.name % len(cores)]})

    def encode(self: TextureEncoder, pixels: Any) -> Any:
        return np.zeros((len(pixels), TEXTURE_CARD.dim), np.float32)

    TextureEncoder.encode = encode  # type: ignore[method-assign]


def time_run(slides: list[Path], client: Any) -> tuple[float, int]:
    """Seconds and tiles of an extraction of these slides."""
    with tempfile.TemporaryDirectory() as out:
        begun = time.perf_counter()
        report = extract(slides, out, "texture", tissue=None, workers=1, reader="turbo", cluster=client)
        seconds = time.perf_counter() - begun
    assert not report.failed, report.failed
    return seconds, report.tiles


def main() -> None:
    """Time both and print a table."""
    import dask  # noqa: PLC0415
    from distributed import Client, LocalCluster  # noqa: PLC0415

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slides", type=int, default=6)
    parser.add_argument("--side", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--free", action="store_true")
    arguments = parser.parse_args()
    if arguments.free:
        os.environ["BENCHMARK_FREE"] = "1"
    warm = sorted(small_slides().glob("*.svs"))[:2]
    source = big_slide(arguments.side)
    with tempfile.TemporaryDirectory() as folder, dask.config.set({"distributed.worker.preload": [__file__]}):
        slides = [Path(folder) / f"slide{number}.svs" for number in range(arguments.slides)]
        for slide in slides:
            slide.symlink_to(source)
        seconds: dict[int, list[float]] = {1: [], 2: []}
        made = {
            count: LocalCluster(
                n_workers=count, threads_per_worker=1, memory_limit=None, dashboard_address=":0", silence_logs=50
            )
            for count in seconds
        }
        clients = {count: Client(cluster, set_as_default=False) for count, cluster in made.items()}
        for client in clients.values():
            time_run(warm, client)
        for _ in range(arguments.repeats):
            for count, client in clients.items():
                spent, tiles = time_run(slides, client)
                seconds[count].append(spent)
                print(f"{count} worker(s): {spent:.2f} s, {tiles / spent:.0f} tiles/s", flush=True)
        for client in clients.values():
            client.close()
        for cluster in made.values():
            cluster.close()
    one, two = (statistics.median(seconds[count]) for count in (1, 2))
    print(f"\n{describe_machine()}; {arguments.slides} slides of {arguments.side}², {tiles} tiles\n")
    print("| workers | seconds | tiles/s | ratio | goal |\n|---|---|---|---|---|")
    print(f"| 1 | {one:.2f} | {tiles / one:.0f} | 1.00× | – |")
    print(f"| 2 | {two:.2f} | {tiles / two:.0f} | {one / two:.2f}× | {GOAL}× |")


if __name__ == "__main__":
    main()
