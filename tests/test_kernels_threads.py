"""Kernels share work by threads: in order, from anywhere, and after a fork."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from wsi_engine.kernels import _threads
from wsi_engine.kernels._threads import run_parallel, set_thread_count, split_rows, thread_count


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    set_thread_count(2)
    yield
    set_thread_count(None)


def test_results_come_in_the_order_of_the_tasks() -> None:
    assert run_parallel(lambda a, b: a - b, [(k, 1) for k in range(100)]) == list(range(-1, 99))


def test_two_tasks_run_at_once() -> None:
    meeting = threading.Barrier(2, timeout=20)
    assert sorted(run_parallel(meeting.wait, [(), ()])) == [0, 1]


def test_the_first_error_reaches_the_caller_when_all_have_ended() -> None:
    ended = []

    def work(k: int) -> None:
        if k == 1:
            raise KeyError(k)
        ended.append(k)

    with pytest.raises(KeyError, match="1"):
        run_parallel(work, [(k,) for k in range(6)])
    assert sorted(ended) == [0, 2, 3, 4, 5]


def test_calls_within_calls_and_from_many_threads_end() -> None:
    def outer(k: int) -> int:
        return sum(run_parallel(lambda n: n * k, [(n,) for n in range(5)]))

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(run_parallel, outer, [(k,) for k in range(8)]) for _ in range(8)]
        assert all(a.result(timeout=30) == [10 * k for k in range(8)] for a in answers)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    assert run_parallel(int, [(1,), (2,)]) == [1, 2]
    child = os.fork()
    if child == 0:
        answer = run_parallel(int, [(3,), (4,)])
        os._exit(0 if answer == [3, 4] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_bands_cover_every_row_once() -> None:
    for rows in (1, 63, 64, 1000, 4096):
        bands = split_rows(rows)
        assert bands[0][0] == 0
        assert bands[-1][1] == rows
        assert all(a[1] == b[0] for a, b in itertools.pairwise(bands))
        assert len(bands) == 1 or min(stop - start for start, stop in bands) >= 63
    set_thread_count(1)
    assert split_rows(4096) == [(0, 4096)]


def test_the_number_of_threads_is_kept_in_one_place() -> None:
    assert thread_count() == 2
    set_thread_count(None)
    assert thread_count() == len(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match="at least 1"):
        set_thread_count(0)
    assert _threads.run_parallel(int, []) == []
