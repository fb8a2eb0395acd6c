"""Weights drawn from a seed, without touching the caller's chance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed torch's CPU generator inside and put it back outside; None leaves it to the caller.

    Generators of accelerators are not touched.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
