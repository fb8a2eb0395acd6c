"""How many threads the kernels use, and how they share work: one place for both.

Kernels are single-threaded loops that release the interpreter lock. Work is shared by giving bands of rows, or groups
of objects, to a pool of Python threads. Numba's own parallel loops are not used: their default threading layer must
not be entered from two threads at once, and another does not survive a fork.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

R = TypeVar("R")

_lock = threading.Lock()
_inside = threading.local()
_count: int | None = None
_pool: ThreadPoolExecutor | None = None


def thread_count() -> int:
    """Threads that one call of a kernel may use: the number set, else the cores this process may run on."""
    if _count is not None:
        return _count
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_thread_count(count: int | None) -> None:
    """Set :func:`thread_count` for the whole process; None goes back to the number of cores.

    Raises:
        ValueError: ``count`` is less than 1.
    """
    global _count, _pool
    if count is not None and count < 1:
        raise ValueError(f"the number of threads must be at least 1, not {count}")
    with _lock:
        _count, _pool = count, None


def run_parallel(function: Callable[..., R], tasks: Iterable[tuple[object, ...]]) -> list[R]:
    """Call ``function(*task)`` for every task, by up to :func:`thread_count` threads; results in the order of tasks.

    May be called from several threads at once, after a fork, and from within a task (which then runs alone). The first
    error is raised once all tasks have ended.
    """
    todo = list(tasks)
    if len(todo) < 2 or thread_count() == 1 or getattr(_inside, "task", False):
        return [function(*task) for task in todo]
    results: dict[int, R] = {}
    errors: dict[int, BaseException] = {}
    order = itertools.count()  # handing out the next number is one step of the interpreter

    def work() -> None:
        _inside.task = True
        try:
            while (k := next(order)) < len(todo):
                try:
                    results[k] = function(*todo[k])
                except BaseException as error:
                    errors[k] = error
        finally:
            _inside.task = False

    # The caller works too: handing everything over would cost a wake-up more.
    others = [_shared_pool().submit(work) for _ in range(min(thread_count(), len(todo)) - 1)]
    work()
    for other in others:
        if not other.cancel():
            other.result()
    if errors:
        raise errors[min(errors)]
    return [results[k] for k in range(len(todo))]


def split_rows(rows: int, least: int = 64) -> list[tuple[int, int]]:
    """Bands (start, stop) that cover ``rows`` rows, a few for each thread, none shorter than ``least`` but the last."""
    bands = max(1, min(4 * thread_count() if thread_count() > 1 else 1, rows // max(1, least)))
    edges = [rows * k // bands for k in range(bands + 1)]
    return list(itertools.pairwise(edges))


def _shared_pool() -> ThreadPoolExecutor:
    global _pool  # noqa: PLW0603
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(thread_count(), "kernel")
        return _pool


def _forget_pool() -> None:
    """A forked child has none of its parent's threads."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()
    _inside.task = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
