"""Where a head is trained and in which arithmetic, decided once for a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from wsi_engine.encoders.precision import Precision, arithmetic, choose_precision
from wsi_engine.memory import keep_freed_memory
from wsi_engine.models.heads import head_lowers
from wsi_engine.training.settings import TrainSettings
from wsi_engine.workers import usable_cores

LEAST_NUMBERS = 2**17
"""Numbers in a bag (tiles × dim) from which bf16 and threads pay; below, converting and sharing cost more."""


@dataclass(frozen=True)
class Hardware:
    """A device and the precision of products on it; weights, losses and the optimiser are fp32 always.

    ``threads`` is the number of torch's threads on a CPU; None leaves it as it is.
    """

    device: torch.device
    precision: Precision
    threads: int | None = None

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Run a head's products in the precision."""
        with arithmetic(self.precision, self.device):
            yield

    @contextmanager
    def repeatable(self) -> Iterator[None]:
        """Only algorithms that give the same bytes each time; torch's own random state is put back at the end."""
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        memory: Any = torch.utils.deterministic
        fills = memory.fill_uninitialized_memory
        threads = torch.get_num_threads()
        devices = [self.device] if self.device.type == "cuda" else []
        if devices:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it to be repeatable
        torch.use_deterministic_algorithms(True, warn_only=bool(devices))
        memory.fill_uninitialized_memory = False
        torch.set_num_threads(self.threads or threads)
        try:
            with torch.random.fork_rng(devices):
                yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            memory.fill_uninitialized_memory = fills
            torch.set_num_threads(threads)


def choose_hardware(settings: TrainSettings, head: str, numbers: float) -> Hardware:
    """The device and precision of a run.

    Args:
        settings: what was asked.
        head: name of the head.
        numbers: tiles × dim of a typical bag.

    Raises:
        EncoderError: there is no such device here, or it cannot compute in the precision asked for.
    """
    from wsi_engine.encoders.deep import choose_device  # noqa: PLC0415 - loads timm

    device = choose_device(settings.device)
    threads = None
    if device.type == "cpu":
        keep_freed_memory()
        # handing out a small bag's work to threads takes longer than the work, much longer beside other processes
        threads = min(torch.get_num_threads(), usable_cores()) if numbers >= LEAST_NUMBERS else 1
    if settings.precision != "auto":
        return Hardware(device, choose_precision(settings.precision, device), threads)
    best = choose_precision("auto", device)
    gains = best.type == "bf16" and head_lowers(head) and numbers >= LEAST_NUMBERS
    return Hardware(device, best if gains else Precision("fp32"), threads)
