"""Jobs of Slurm as workers: those that end are replaced, none is left behind, and what Slurm refuses is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support_cluster import OPTIONS, PRELOAD, Log, Watcher, data_files, wait_until, write_slides
from support_slurm import FakeSlurm, RealSlurm, is_slurm_here

from wsi_engine import extract
from wsi_engine.cluster.choice import ClusterChoice
from wsi_engine.cluster.interrupts import keep_interrupts, terminate_as_interrupt
from wsi_engine.cluster.session import Session, open_session
from wsi_engine.cluster.slurmqueue import JobState, SlurmQueue, ask_queue
from wsi_engine.errors import ClusterError

Slurm = FakeSlurm | RealSlurm

DESCRIBED: dict[str, Any] = {"cores": 1, "processes": 1, "memory": "1GB", "walltime": "00:10:00", "interface": "lo",
                             "death-timeout": 30}  # fmt: skip


needs_jobqueue = pytest.mark.skipif(find_spec("dask_jobqueue") is None, reason="needs dask-jobqueue")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSlurm]:
    """Slurm's commands, whose jobs are processes of this machine."""
    made = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{made.install()}:{os.environ['PATH']}")
    yield made
    made.stop()


@pytest.fixture(params=["fake", "real"])
def slurm(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Slurm, dict[str, Any]]]:
    """A Slurm, and how its jobs are described."""
    name = f"wsi-test-{uuid.uuid4().hex[:8]}"
    monkeypatch.setenv("DASK_DISTRIBUTED__WORKER__PRELOAD", f'["{PRELOAD}"]')
    monkeypatch.setenv("WSI_TEST_LOG", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    described = DESCRIBED | {"name": name, "log-directory": str(tmp_path / "logs")}
    if request.param == "fake":
        yield request.getfixturevalue("fake"), described
        return
    if not is_slurm_here():
        pytest.skip("needs a Slurm whose only node is this machine")
    made = RealSlurm(name)
    yield made, described
    made.stop()


def describe_jobs(values: dict[str, Any]) -> Any:
    """The values as the user's configuration, for a ``with`` block."""
    import dask

    with keep_interrupts():
        import dask_jobqueue  # noqa: F401 - its defaults come first

    return dask.config.set({f"jobqueue.slurm.{key}": value for key, value in values.items()})


def hurry(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.3) -> None:
    """Look often."""
    monkeypatch.setattr("wsi_engine.cluster.slurmqueue._LOOK_SECONDS", seconds)
    monkeypatch.setattr("wsi_engine.cluster.session._LOOK_SECONDS", seconds)


@needs_jobqueue
def test_jobs_that_end_are_replaced(
    slurm: tuple[Slurm, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Both jobs are cancelled in the middle; the run goes on in others, and ends in the bytes of one process.

    A slide that ended just before, whose worker had no time to say so, is looked at again.
    """
    hurry(monkeypatch)
    place, described = slurm
    slides = write_slides(tmp_path / "slides", 3, 500)
    extract(slides, tmp_path / "alone", "texture", **OPTIONS)
    first: list[str] = []

    def cancel() -> None:
        first.extend(place.numbers())
        for number in first:
            subprocess.run(["scancel", number], check=True)

    heard = Watcher([(60, cancel)])
    before = signal.getsignal(signal.SIGINT)
    with describe_jobs(described):
        report = extract(slides, tmp_path / "out", "texture", cluster="slurm:2", progress=heard, **OPTIONS)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(first) == 2
    assert {result.status for result in report.results} <= {"done", "already complete"}
    assert data_files(tmp_path / "out") == data_files(tmp_path / "alone") != {}
    assert set(Log(tmp_path).finished().values()) == {1}
    assert "(CANCELLED)" in caplog.text
    assert "out of reach" not in caplog.text
    wait_until(lambda: place.numbers() == [])


@needs_jobqueue
def test_an_interrupted_command_leaves_no_job(slurm: tuple[Slurm, dict[str, Any]], tmp_path: Path) -> None:
    """Ctrl-C; dask-jobqueue would end the command without a word and with exit code 0."""
    place, described = slurm
    slides = write_slides(tmp_path / "slides", 2, 500)
    settings = {
        f"DASK_JOBQUEUE__SLURM__{key.replace('-', '_').upper()}": repr(value) if isinstance(value, str) else str(value)
        for key, value in described.items()
    }
    code = "import sys; from wsi_engine.cli import main; sys.argv = ['wsi', *sys.argv[1:]]; main()"
    words = ["extract", str(slides), "-o", str(tmp_path / "out"), "--encoder", "texture", "--slide-mpp", "0.5",
             "--tile-px", "32", "--batch-size", "2", "--cluster", "slurm:2"]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], env=os.environ | settings | {"WSI_TEST_SECONDS": "0.3"},
        stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=tmp_path,
    ) as process:  # fmt: skip
        wait_until((tmp_path / "encoded").exists, 90)
        assert len(place.numbers()) == 2
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "error: interrupted: what was finished is kept" in said
    wait_until(lambda: place.numbers() == [])


@needs_jobqueue
def test_what_slurm_refuses(fake: FakeSlurm) -> None:
    (fake.folder / "refuse").touch()
    with (
        describe_jobs(DESCRIBED),
        pytest.raises(ClusterError, match=r"refuses the jobs of --cluster slurm \(Invalid account\): mend"),
        open_session("slurm:2") as session,
    ):
        session.wait_for_worker()


@needs_jobqueue
def test_jobs_that_end_before_their_workers_join(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment that nodes do not have: three tries, then the place where the reason is written."""
    hurry(monkeypatch, 0.1)
    folder = tmp_path / "logs"
    with (
        describe_jobs(DESCRIBED | {"python": "/nowhere/python", "log-directory": str(folder)}),
        pytest.raises(ClusterError, match=f"3 jobs of Slurm ended one after another .*{folder}"),
        open_session("slurm:1") as session,
    ):
        session.wait_for_worker()
    assert "/nowhere/python" in (fake.folder / "3" / "out").read_text()
    assert not (fake.folder / "4").exists()


@needs_jobqueue
def test_jobs_that_wait_for_ever(
    fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One sentence with Slurm's reason; Ctrl-C takes them out of the queue."""
    hurry(monkeypatch, 0.1)
    monkeypatch.setattr("wsi_engine.cluster.session._PATIENCE", 0.5)
    (fake.folder / "hold").touch()

    def interrupt() -> None:
        wait_until(lambda: "waiting for one" in caplog.text)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with describe_jobs(DESCRIBED), pytest.raises(KeyboardInterrupt), open_session("slurm:2") as session:
        session.wait_for_worker()
    assert (
        "no worker for some time (2 of its jobs wait in Slurm's queue, PartitionDown): waiting for one" in caplog.text
    )
    assert caplog.text.count("waiting for one") == 1
    assert fake.numbers() == []


@needs_jobqueue
@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"memory": None}, r"needs the memory of a job: set cores, memory and walltime.*jobqueue\.yaml"),
        ({"memory": "plenty"}, r"not described well \(.*plenty.*\): mend jobqueue\.slurm in .*jobqueue\.yaml"),
        ({"interface": "nowhere0"}, r"not described well \('nowhere0' is not a valid network interface"),
    ],
)
def test_jobs_that_are_not_described_well(fake: FakeSlurm, described: dict[str, Any], said: str) -> None:
    with describe_jobs(DESCRIBED | described), pytest.raises(ClusterError, match=said), open_session("slurm:1"):
        pass
    assert fake.numbers() == []


@needs_jobqueue
def test_why_a_job_was_refused() -> None:
    with keep_interrupts():
        from wsi_engine.cluster.slurm import explain_refusal

    said = (
        "Command exited with non-zero exit code.\nExit code: 1\nCommand:\nsbatch /tmp/x.sh\nstdout:\n\nstderr:\n"
        "sbatch: error: invalid partition specified: nowhere\n"
        "sbatch: error: Batch job submission failed: Invalid partition name specified\n\n"
    )
    assert explain_refusal(said) == "Invalid partition name specified"
    assert explain_refusal("[Errno 13] Permission denied: 'sbatch'") == "[Errno 13] Permission denied: 'sbatch'"
    assert explain_refusal("") == "no reason given"


def test_what_slurm_knows_of_jobs(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, file in ((1, "pid"), (2, "rc"), (3, "cancelled"), (4, "script")):
        (fake.folder / str(number)).mkdir()
        (fake.folder / str(number) / file).write_text("")
    assert ask_queue(["1", "2", "3", "4", "5"]) == {
        "1": JobState("RUNNING", "None"), "2": JobState("FAILED", "NonZeroExitCode"),
        "3": JobState("CANCELLED", "None"), "4": JobState("PENDING", "PartitionDown"),
    }  # fmt: skip
    assert ask_queue(["5"]) == {}
    (fake.folder / "silent").touch()
    assert ask_queue(["1"]) is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert ask_queue(["1"]) is None


class _Job:
    def __init__(self, job_id: str | None, refusal: str = "") -> None:
        self.job_id, self.refusal = job_id, refusal


class _Jobs:
    """A cluster that sends jobs at once, unless Slurm refuses them."""

    def __init__(self) -> None:
        self.workers: dict[str, Any] = {}
        self.worker_spec: dict[str, Any] = {}
        self.sent = 0
        self.refusal = ""

    def scale(self, *, jobs: int) -> None:
        while len(self.worker_spec) < jobs:
            self.sent += 1
            name = f"w-{self.sent}"
            self.worker_spec[name] = {}
            self.workers[name] = _Job(None, self.refusal) if self.refusal else _Job(str(self.sent))


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> dict[str, JobState]:
    """What Slurm says of jobs, for a test to change; it is asked at each look."""
    said: dict[str, JobState] = {}
    monkeypatch.setattr("wsi_engine.cluster.slurmqueue._LOOK_SECONDS", 0.0)
    monkeypatch.setattr(
        "wsi_engine.cluster.slurmqueue.ask_queue",
        lambda numbers: {number: said.get(number, JobState("RUNNING", "None")) for number in numbers},
    )
    return said


def test_no_more_jobs_than_tasks(states: dict[str, JobState]) -> None:
    cluster = _Jobs()
    queue = SlurmQueue(cluster, 3, 1, "logs")
    queue.watch(["w-1", "w-2", "w-3"], 10)
    states["1"] = states["2"] = JobState("TIMEOUT", "TimeLimit")
    queue.watch(["w-3"], 1)
    assert set(cluster.worker_spec) == {"w-3"}
    queue.watch(["w-3"], 2)
    assert set(cluster.worker_spec) == {"w-3", "w-4"}
    queue.watch(["w-3", "w-4"], 10)
    assert set(cluster.worker_spec) == {"w-3", "w-4", "w-5"}


def test_a_job_that_is_requeued_is_not_replaced(states: dict[str, JobState]) -> None:
    cluster = _Jobs()
    queue = SlurmQueue(cluster, 2, 1, "logs")
    queue.watch(["w-1", "w-2"], 10)
    states["1"] = JobState("PENDING", "BeginTime")
    queue.watch(["w-2"], 10)
    assert cluster.sent == 2
    assert queue.describe() == "1 of its jobs wait in Slurm's queue, BeginTime; 1 of its jobs run without a worker"


def test_jobs_of_several_workers_are_known_by_them(states: dict[str, JobState]) -> None:
    """Ends do not count as barren once a worker of the job was there, however often."""
    cluster = _Jobs()
    queue = SlurmQueue(cluster, 1, 2, "logs")
    for number in range(1, 8):
        queue.watch([f"w-{number}-0", f"w-{number}-1"], 10)
        states[str(number)] = JobState("TIMEOUT", "TimeLimit")
        queue.watch([], 10)
    assert cluster.sent == 8


def test_some_jobs_come_to_nothing(states: dict[str, JobState], caplog: pytest.LogCaptureFixture) -> None:
    """A node that ends whatever comes: no more are sent, and the others go on."""
    cluster = _Jobs()
    queue = SlurmQueue(cluster, 2, 1, "logs")
    for number in range(2, 8):
        states[str(number)] = JobState("FAILED", "NonZeroExitCode")
    for _ in range(9):
        queue.watch(["w-1"], 10)
    assert cluster.sent == 4
    assert set(cluster.worker_spec) == {"w-1"}
    assert caplog.text.count("3 jobs of Slurm ended one after another before their workers joined: no more") == 1
    states["1"] = JobState("TIMEOUT", "TimeLimit")
    with pytest.raises(ClusterError, match="see what they wrote in logs"):
        queue.watch([], 10)


def test_slurm_takes_some_jobs(
    states: dict[str, JobState], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit of the account: the run goes on with what it has, asks again, and gives up where it has none."""
    cluster = _Jobs()
    queue = SlurmQueue(cluster, 1, 1, "logs", patience=0.0)
    queue.watch(["w-1"], 10)
    cluster.refusal = "QOSMaxSubmitJobPerUserLimit"
    states["1"] = JobState("TIMEOUT", "TimeLimit")
    cluster.worker_spec["w-x"] = {}
    cluster.workers["w-x"] = _Job(None, cluster.refusal)
    queue.watch(["w-1"], 10)
    assert "Slurm refuses 1 of 1 jobs (QOSMaxSubmitJobPerUserLimit): it is asked again" in caplog.text
    assert cluster.sent == 1
    queue._hold_until = 0.0
    queue.watch([], 10)
    assert cluster.sent == 2
    with pytest.raises(ClusterError, match=r"refuses the jobs of --cluster slurm \(QOSMaxSubmitJobPerUserLimit\)"):
        queue.watch([], 10)


def test_a_controller_that_is_down(
    states: dict[str, JobState], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = _Jobs()
    queue = SlurmQueue(cluster, 2, 1, "logs")
    monkeypatch.setattr("wsi_engine.cluster.slurmqueue.ask_queue", lambda numbers: None)
    for _ in range(3):
        queue.watch(["w-1"], 10)
    assert cluster.sent == 2
    assert caplog.text.count("squeue does not answer") == 1


def test_workers_of_one_job_share_its_cores() -> None:
    class Client:
        status = "running"

        def scheduler_info(self, n_workers: int) -> dict[str, Any]:
            return {"workers": {f"tcp://10.0.0.1:{port}": {"name": "w"} for port in range(4000, 4004)}}

    queue = SlurmQueue(_Jobs(), 2, 2, "logs")
    session = Session(ClusterChoice("slurm", workers=2), lambda seconds: Client(), queue)  # type: ignore[arg-type,return-value]
    assert (session.peers, session.count_workers()) == (2, 4)


def test_signals_keep_their_meaning() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with keep_interrupts():
        signal.signal(signal.SIGINT, lambda *_: sys.exit())
    with pytest.raises(KeyboardInterrupt), terminate_as_interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(5)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
