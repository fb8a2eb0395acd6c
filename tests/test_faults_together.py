"""Two processes on one slide, a process that stood still, a reader beside a writer, and clocks that jump."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support_faults import Case, FaultyJobs, Outcome, draw_tissue, faulty_jobs, snapshot

from wsi_engine import FeatureStore, check_stores
from wsi_engine.errors import WsiError

SLOW = 0.15
"""Seconds for each of the seven batches of the slide."""


@pytest.fixture(scope="module")
def jobs() -> FaultyJobs:
    return faulty_jobs()


@pytest.fixture(scope="module")
def case(jobs: FaultyJobs, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("given")
    return Case.undisturbed(jobs, "extract", draw_tissue(folder / "slide.png"), folder / "whole")


@pytest.fixture(scope="module")
def beside(case: Case, tmp_path_factory: pytest.TempPathFactory) -> FaultyJobs:
    """A second server, for a job that runs at the same time, with everything loaded."""
    server = faulty_jobs(1)
    server.run("extract", tmp_path_factory.mktemp("warm-up"), case.given)
    return server


def in_thread(jobs: FaultyJobs, job: str, folder: Path, *arguments: object) -> Future[Outcome]:
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(jobs.run, job, folder, *arguments)
    finally:
        pool.shutdown(wait=False)


def wait_for(folder: Path, pattern: str, count: int = 1) -> None:
    end = time.monotonic() + 30
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < end, pattern
        time.sleep(0.005)


PARTIAL = "slide.zarr/features/mean/partial/c/*/0"


def test_two_processes_on_one_slide(jobs: FaultyJobs, beside: FaultyJobs, case: Case, tmp_path: Path) -> None:
    place = tmp_path / "out"
    first = in_thread(jobs, "extract", place, case.given, SLOW)
    wait_for(place, PARTIAL, 2)
    second = beside.run("extract", place, case.given)
    assert second.said["status"] == "busy"
    assert "is being written by process" in second.said["message"]
    assert not first.done()
    assert first.result().said["status"] == "done"
    assert snapshot(place) == case.made
    assert os.listdir(place) == ["slide.zarr"]


def test_two_processes_share_a_folder(jobs: FaultyJobs, beside: FaultyJobs, case: Case, tmp_path: Path) -> None:
    """Each slide is done once, by one of them or the other, and all are done when both have ended."""
    slides, place = tmp_path / "slides", tmp_path / "out"
    slides.mkdir()
    for number in range(6):
        (slides / f"slide-{number}.png").write_bytes(case.given.read_bytes())
    first = in_thread(jobs, "extract", place, slides, 0.03)
    said = [beside.run("extract", place, slides, 0.03).said, first.result().said]
    ways = [[one["ways"][number] for one in said] for number in range(6)]
    assert all(sorted(way).count("done") == 1 for way in ways), ways
    assert check_stores(place).findings == ()
    arrays = {name.partition("/")[2]: data for name, data in case.made.items() if "/c/" in name}
    for number in range(6):
        made = snapshot(place / f"slide-{number}.zarr")
        assert {name: data for name, data in made.items() if "/c/" in name} == arrays


def test_a_process_that_stood_still_writes_no_more(
    jobs: FaultyJobs, beside: FaultyJobs, case: Case, tmp_path: Path
) -> None:
    """Stopped in the middle, given up by a process that takes it for one of another machine, and woken up again."""
    place = tmp_path / "out"
    first = in_thread(jobs, "extract", place, case.given, SLOW, tmp_path / "pid")
    wait_for(place, PARTIAL, 2)
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        second = beside.run("impatient", place, case.given)
        made = snapshot(place)
        stamps = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    finally:
        os.kill(pid, signal.SIGCONT)
    assert second.said["status"] == "done", second
    said = first.result().said
    assert said["status"] == "busy", said
    assert "nothing more is written here" in said["message"]
    assert made == case.made == snapshot(place)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == stamps


def test_a_reader_never_sees_half_an_array(jobs: FaultyJobs, case: Case, tmp_path: Path) -> None:
    place = tmp_path / "out"
    jobs.run("extract", tmp_path / "whole", case.given)
    expected = FeatureStore.open(tmp_path / "whole" / "slide.zarr").features("mean")
    writing = in_thread(jobs, "extract", place, case.given, SLOW)
    messages: set[str] = set()
    seen = {"nothing": 0, "refused": 0, "features": 0}
    while True:
        ended = writing.done()
        try:
            store = FeatureStore.open(place / "slide.zarr")
            assert store.encoders() in ((), ("mean",))
            assert np.array_equal(store.features("mean"), expected)
            seen["features"] += 1
        except WsiError as error:
            seen["nothing" if "there is no store" in str(error) else "refused"] += 1
            messages.add(str(error))
        if ended:
            break
        time.sleep(0.01)
    assert not [message for message in messages if "damaged" in message]
    assert seen["refused"] > 3
    assert seen["features"] > 0
    assert writing.result().said["status"] == "done"


@pytest.mark.parametrize("jump", [-3e8, 3e8])
def test_clocks_that_jump(jobs: FaultyJobs, beside: FaultyJobs, case: Case, tmp_path: Path, jump: float) -> None:
    """The wall clock jumps by ten years at every look at it, and what is written is dated so."""
    place = tmp_path / "out"
    first = in_thread(jobs, "jumping", place, case.given, SLOW, jump)
    wait_for(place, PARTIAL, 2)
    assert beside.run("extract", place, case.given).said["status"] == "busy"
    assert first.result().said["status"] == "done"
    assert snapshot(place) == case.made
    killed = tmp_path / "killed"
    assert jobs.run("jumping", killed, case.given, 0, jump, fault="kill", at=case.changes // 2).killed
    case.assert_resumed(jobs, killed)
