"""Slides spread over real worker processes, killed, hung and cut off: the bytes of one undisturbed process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support_cluster import OPTIONS, PRELOAD, Log, Watcher, data_files, processes, write_slides

distributed = pytest.importorskip("distributed")

import dask  # noqa: E402

from wsi_engine import extract  # noqa: E402
from wsi_engine.cluster.choice import ClusterChoice  # noqa: E402
from wsi_engine.errors import ClusterError, EncoderError  # noqa: E402
from wsi_engine.lease import hold_lease  # noqa: E402

LOST_BY_A_KILL = 12
"""Batches that may be encoded and not written yet when a worker dies."""

WORKER_TTL = "10s"
"""A worker that is silent for so long counts as gone; on a busy machine one that lives is silent for seconds."""


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slides(tmp_path_factory.mktemp("slides"), 4)


@pytest.fixture(scope="module")
def expected(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one undisturbed process writes."""
    out = tmp_path_factory.mktemp("alone")
    extract(slides, out, "texture", **OPTIONS)
    return data_files(out)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return Log(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def cluster(log: Log) -> Iterator[Any]:
    """Two workers that live through the module's peaceful tests."""
    with local_cluster(log, 2) as made:
        yield made


@contextmanager
def local_cluster(log: Log, workers: int, **settings: Any) -> Iterator[Any]:
    """Workers that are started again when they die, however long that takes."""
    os.environ["WSI_TEST_LOG"] = str(log.folder)
    settings |= {"distributed.worker.preload": [str(PRELOAD)], "distributed.deploy.lost-worker-timeout": "1 week"}
    with (
        dask.config.set(settings),
        distributed.LocalCluster(
            n_workers=workers, threads_per_worker=1, memory_limit=None, dashboard_address=":0", silence_logs=50
        ) as made,
    ):
        yield made


def forget(log: Log) -> None:
    for path in log.folder.iterdir():
        path.unlink()


def test_slides_are_shared_and_the_bytes_are_the_same(
    cluster: Any, log: Log, slides: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    forget(log)
    heard = Watcher()
    with distributed.Client(cluster, set_as_default=False) as client:
        report = extract(slides, tmp_path, "texture", cluster=client, progress=heard, **OPTIONS)
        again = extract(slides, tmp_path, "texture", cluster=client, **OPTIONS)
    assert [(result.slide_id, result.status) for result in report.results] == [(f"slide{n}", "done") for n in range(4)]
    assert data_files(tmp_path) == expected
    assert log.repeated() == 0
    assert set(log.finished().values()) == {1}
    assert len({pid for pid, _ in log.batches()}) == 2
    assert heard.tiles == sum(heard.slides.values()) == report.tiles
    assert heard.total == len(heard.ended) == 4
    assert {result.status for result in again.results} == {"already complete"}
    assert sorted(os.listdir(tmp_path)) == [f"slide{n}.zarr" for n in range(4)]
    assert report.seconds["encode"] > 0


def test_a_large_slide_is_spread(
    cluster: Any, log: Log, slides: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    forget(log)
    heard = Watcher()
    with distributed.Client(cluster, set_as_default=False) as client:
        from wsi_engine.cluster.session import Session
        from wsi_engine.distribution import extract_on_cluster, find_encoder
        from wsi_engine.encoders.plan import EncoderPlan
        from wsi_engine.grid import GridSettings
        from wsi_engine.inputs import find_slides
        from wsi_engine.jobs import ExtractSettings

        session = Session(ClusterChoice("client", part_tiles=50), lambda seconds: client)
        settings = ExtractSettings(GridSettings(tile_px=48), batch_size=8, reader="image")
        encoder = find_encoder(session, EncoderPlan("texture"))
        sources = find_slides([slides / "slide0.png"], 0.5)
        report = extract_on_cluster(sources, tmp_path, encoder, settings, session, heard)
    assert [result.status for result in report.results] == ["done"]
    assert data_files(tmp_path) == {name: data for name, data in expected.items() if name.startswith("slide0")}
    assert len({pid for pid, _ in log.batches()}) == 2
    assert log.repeated() == 0
    assert len(log.batches()) == -(-report.tiles // 8)
    assert heard.tiles == report.tiles > 200
    assert os.listdir(tmp_path) == ["slide0.zarr"]
    assert report.seconds["encode"] > 0.03 * len(log.batches())


def test_one_bad_slide_stops_no_other(cluster: Any, slides: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    (folder / "broken.svs").write_bytes(b"II*\0" + bytes(500))
    Image.fromarray(np.full((300, 400, 3), 240, np.uint8)).save(folder / "empty.png")
    (folder / "good.png").write_bytes((slides / "slide3.png").read_bytes())
    with distributed.Client(cluster, set_as_default=False) as client:
        report = extract(folder, tmp_path / "out", "texture", cluster=client, **OPTIONS | {"reader": "auto"})
        with pytest.raises(EncoderError, match="resnet5"):
            extract(folder, tmp_path / "out", "resnet5", cluster=client, **OPTIONS)
    assert [result.status for result in report.results] == ["failed", "no tissue", "done"]
    assert "broken.svs" in report.failed[0].message


def test_a_slide_that_another_process_has_is_waited_for(
    cluster: Any, slides: Path, expected: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lease = hold_lease(tmp_path / ".slide1.lease")
    lease.__enter__()
    free = threading.Timer(3.0, lambda: lease.__exit__(None, None, None))
    free.start()
    with distributed.Client(cluster, set_as_default=False) as client:
        report = extract(slides, tmp_path, "texture", cluster=client, **OPTIONS)
    assert {result.status for result in report.results} == {"done"}
    assert "slide1 is being written by" in caplog.text
    assert data_files(tmp_path) == expected


def test_two_workers_killed(slides: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    log.folder.mkdir()
    killed: list[int] = []

    def kill() -> None:
        killed.append(log.signal_last(signal.SIGKILL))

    heard = Watcher([(200, kill), (500, kill)])
    with local_cluster(log, 2) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        report = extract(slides, tmp_path / "out", "texture", cluster=client, progress=heard, **OPTIONS)
    assert len(set(killed)) == 2
    assert not heard.actions
    assert [result.status for result in report.results if result.status != "already complete"] == ["done"] * 4
    assert data_files(tmp_path / "out") == expected
    assert set(log.finished().values()) == {1}
    assert log.repeated() <= 2 * LOST_BY_A_KILL
    assert len({pid for pid, _ in log.batches()}) >= 3
    assert sorted(os.listdir(tmp_path / "out")) == [f"slide{n}.zarr" for n in range(4)]


def test_a_worker_that_hangs(slides: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Stopped by a signal in the middle of a slide; its nanny puts another in its place."""
    log = Log(tmp_path / "log")
    log.folder.mkdir()
    heard = Watcher([(200, lambda: log.signal_last(signal.SIGSTOP))])
    settings = {"distributed.scheduler.worker-ttl": WORKER_TTL}
    with local_cluster(log, 2, **settings) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        report = extract(slides, tmp_path / "out", "texture", cluster=client, progress=heard, **OPTIONS)
    assert not heard.actions
    assert {result.status for result in report.results} == {"done"}
    assert data_files(tmp_path / "out") == expected
    assert set(log.finished().values()) == {1}
    assert log.repeated() <= LOST_BY_A_KILL


def test_a_slide_that_kills_its_workers_fails_alone(slides: Path, tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    log.folder.mkdir()
    folder = tmp_path / "slides"
    folder.mkdir()
    for name, source in (("a", "slide2"), ("poison", "slide3"), ("z", "slide3")):
        (folder / f"{name}.png").write_bytes((slides / f"{source}.png").read_bytes())
    settings = {"distributed.scheduler.allowed-failures": 1, "distributed.scheduler.worker-saturation": 1.0}
    with local_cluster(log, 2, **settings) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        report = extract(folder, tmp_path / "out", "texture", cluster=client, **OPTIONS)
    assert {result.slide_id: result.status for result in report.results} == {
        "a": "done",
        "poison": "failed",
        "z": "done",
    }
    assert report.failed[0].message.startswith("2 workers of the cluster ended one after another")


def test_a_worker_that_hangs_and_wakes(slides: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Without a nanny nobody ends it: its lease is taken over, and what it does when it wakes harms nothing.

    Slides are spread, so that the lease is that of some rows.
    """
    log = Log(tmp_path / "log")
    stopped: list[int] = []

    def stop() -> None:
        stopped.append(log.signal_last(signal.SIGSTOP))

    settings = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": WORKER_TTL, "WSI_TEST_STALE": "2"}
    with processes(log.folder, **settings) as group:
        group.start_scheduler()
        for _ in range(2):
            group.start_worker("--no-nanny")
        group.wait_for_workers(2)
        choice = ClusterChoice("address", group.address, retry_seconds=0.5, part_tiles=100)
        heard = Watcher([(200, stop)])
        report = extract(slides, tmp_path / "out", "texture", cluster=choice, progress=heard, **OPTIONS)
        before = data_files(tmp_path / "out")
        encoded = len(log.batches())
        (process,) = (one for one in group.running if one.pid == stopped[0])
        process.send_signal(signal.SIGCONT)
        process.wait(timeout=120)  # it ends, since the scheduler has given it up
    assert {result.status for result in report.results} == {"done"}
    assert not list(log.folder.glob("signal-*"))
    assert before == expected
    assert data_files(tmp_path / "out") == expected
    assert set(log.finished().values()) == {1}
    assert log.repeated() <= LOST_BY_A_KILL + len(log.batches()) - encoded
    assert sorted(os.listdir(tmp_path / "out")) == [f"slide{n}.zarr" for n in range(4)]
    assert not list((tmp_path / "out").rglob("partial*"))


def test_a_scheduler_that_is_killed_and_started_again(slides: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    with processes(log.folder) as group:
        scheduler = [group.start_scheduler()]
        for _ in range(2):
            group.start_worker("--no-nanny")

        def restart() -> None:
            scheduler[0].kill()
            scheduler[0].wait()
            scheduler.append(group.start_scheduler())
            for _ in range(2):
                group.start_worker("--no-nanny")

        heard = Watcher([(300, restart)])
        choice = ClusterChoice("address", group.address, reconnect_seconds=300, retry_seconds=0.5, part_tiles=100)
        group.wait_for_workers(2)
        report = extract(slides, tmp_path / "out", "texture", cluster=choice, progress=heard, **OPTIONS)
    assert len(scheduler) == 2
    assert {result.status for result in report.results} <= {"done", "already complete"}
    assert data_files(tmp_path / "out") == expected
    assert set(log.finished().values()) == {1}
    assert log.repeated() <= 2 * LOST_BY_A_KILL
    assert sorted(os.listdir(tmp_path / "out")) == [f"slide{n}.zarr" for n in range(4)]


def test_a_scheduler_that_stays_away(slides: Path, tmp_path: Path) -> None:
    with processes(tmp_path / "log") as group:
        scheduler = group.start_scheduler()
        group.start_worker("--no-nanny")
        group.wait_for_workers(1)
        heard = Watcher([(50, scheduler.kill)])
        choice = ClusterChoice("address", group.address, reconnect_seconds=1)
        with pytest.raises(ClusterError, match="did not come back within 1 s"):
            extract(slides, tmp_path / "out", "texture", cluster=choice, progress=heard, **OPTIONS)
    with pytest.raises(ClusterError, match="cannot reach the Dask scheduler"):
        extract(slides, tmp_path / "out", "texture", cluster=group.address, **OPTIONS)
