"""How the kernels are compiled: one place for Numba's options, so that kernels stay plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a plain loop with Numba: cached on disk, and free of the interpreter lock while it runs."""
    return cast(Callable[P, R], numba.njit(cache=True, nogil=True)(function))
