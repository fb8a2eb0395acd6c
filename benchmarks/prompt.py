"""Prompts in a ViT-Ti/16: memory of a step by size of bag, against fine-tuning, and its time.

Run by ``python -m benchmarks.prompt``. Memory is what a step adds at its peak to a process of its own, pixels and
network aside. Tiles are of 64 px there, so that 2,000 of them take seconds on a processor; what a graph holds for a
tile grows with its tokens (17 at 64 px, 197 at 224 px). Freed memory goes back to the system at once, so that the
figures are of what is held, not of what the C library keeps for later. Times are of tiles of 224 px, in turns in this
one process, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks._common import Case, Timing, describe_machine, peak_memory, time_pair
from wsi_engine.memory import keep_freed_memory
from wsi_engine.models import Head, create_head
from wsi_engine.models.prompt import PromptedViT
from wsi_engine.models.prompt_gradients import bag_backward, encode_bag
from wsi_engine.models.prompt_tiles import Normalise

MEMORY_CHUNK, TIME_CHUNK = 64, 16
MEMORY_PX, TIME_PX = 64, 224
Row = tuple[str, int]
"""A way and a number of tiles."""

MEMORY_ROWS: tuple[Row, ...] = (
    ("prompt", 500),
    ("prompt", 2000),
    ("fine-tuning, three passes", 500),
    ("fine-tuning, one graph", 500),
)
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""For glibc; without it a larger bag leaves more freed blocks unreturned."""

SHARES: tuple[tuple[Row, Row, float | None], ...] = (
    # the first of the second, at most
    (("prompt", 2000), ("prompt", 500), 1.1),
    (("prompt", 500), ("fine-tuning, one graph", 500), 0.6),
    (("prompt", 500), ("fine-tuning, three passes", 500), None),
)


def build(way: str, side: int) -> tuple[nn.Module, Head]:
    """A ViT-Ti/16, prompted by one token or to be tuned whole, and CLAM's head."""
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=side).eval()
    encoder = PromptedViT(network, 1, deep="deep" in way) if way.startswith("prompt") else network
    return encoder, create_head("clam_sb", 192, 2)


def step_in_one_graph(encoder: nn.Module, head: Head, bag: Tensor) -> None:
    """The ordinary way: the whole bag in one graph."""
    torch.autograd.backward(head.loss(head(encoder(Normalise()(bag))), 1))


def measure_growth(way: str, tiles: int) -> float:
    """MiB that a step adds at its peak to this process, which must be fresh."""
    encoder, head = build(way, MEMORY_PX)
    bag = torch.randint(0, 256, (tiles, MEMORY_PX, MEMORY_PX, 3), dtype=torch.uint8)
    small = bag[:1].clone()
    bag_backward(encoder, head, small, 1)  # threads and code are loaded
    before = _resident()
    if way.endswith("one graph"):
        step_in_one_graph(encoder, head, bag)
    else:
        bag_backward(encoder, head, bag, 1, chunk=MEMORY_CHUNK)
    return peak_memory() - before


def _resident() -> float:
    """MiB that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def memory_table() -> dict[Row, float]:
    """Every row of the table of memory, each in a process of its own."""
    found = {}
    for way, tiles in MEMORY_ROWS:
        command = [sys.executable, "-m", "benchmarks.prompt", "--one", way, str(tiles)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | GIVE_BACK)
        grown = float(done.stdout)
        found[way, tiles] = grown
        print(f"| {way} | {tiles:,} tiles of {MEMORY_PX} px | {grown:.0f} MiB |", flush=True)
    return found


def time_cases(tiles: int) -> list[Case]:
    """A step against one pass without gradients and one forward and backward over the bag."""
    bag = torch.randint(0, 256, (tiles, TIME_PX, TIME_PX, 3), dtype=torch.uint8)

    def step(encoder: nn.Module, head: Head) -> None:
        bag_backward(encoder, head, bag, 1, chunk=TIME_CHUNK)

    def whole(encoder: nn.Module, head: Head) -> None:
        encode_bag(encoder, bag, chunk=tiles)
        step_in_one_graph(encoder, head, bag)

    def chunked(encoder: nn.Module, _: Head) -> None:
        encode_bag(encoder, bag, chunk=TIME_CHUNK)
        for start in range(0, tiles, TIME_CHUNK):
            torch.autograd.backward(encoder(Normalise()(bag[start : start + TIME_CHUNK])).sum())

    chunks = f"in chunks of {TIME_CHUNK}, no head"
    cases = []
    for way, against, theirs in (
        ("prompt", "the bag whole", whole), ("prompt", chunks, chunked), ("prompt, deep", "the bag whole", whole)
    ):  # fmt: skip
        pair = build(way, TIME_PX)
        cases.append(Case(way, against, 1.05, partial(step, *pair), partial(theirs, *pair)))
    return cases


def line(timing: Timing) -> str:
    """One line of the table of time."""
    share = timing.ours / timing.theirs
    figures = f"{timing.ours:.2f} s | {timing.theirs:.2f} s | {share:.2f}× | ≤ {timing.case.target}×"
    return f"| {timing.case.name} | forward, forward and backward, {timing.case.against} | {figures} |"


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, default=48, help="in the bag whose step is timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "TILES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(measure_growth(options.one[0], int(options.one[1])))
        return
    print(describe_machine())
    print(f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads")
    learning = sum(value.numel() for value in build("prompt", TIME_PX)[0].parameters() if value.requires_grad)
    print(f"trainable parameters in the backbone with one prompt: {learning}", flush=True)
    grown = memory_table()
    rows: list[dict[str, Any]] = []
    for ours, theirs, goal in SHARES:
        rows.append({"name": ours, "against": theirs, "ours": grown[ours], "theirs": grown[theirs], "goal": goal})
        wanted = f"≤ {goal}×" if goal else ""
        share = grown[ours] / grown[theirs]
        print(f"| {ours[0]}, {ours[1]:,} tiles | {theirs[0]}, {theirs[1]:,} tiles | {share:.2f}× | {wanted} |")
    keep_freed_memory()  # for both sides, as in an engine's process
    for case in time_cases(options.tiles):
        timing = time_pair(case, options.repeats)
        print(line(timing), flush=True)
        rows.append({"name": case.name, "against": case.against, "ours": timing.ours, "theirs": timing.theirs,
                     "goal": case.target})  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
