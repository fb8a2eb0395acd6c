"""A session with a cluster: one that is not there, one that cannot start, one that goes away; and tasks that fail."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support_cluster import wait_until

distributed = pytest.importorskip("distributed")

import dask  # noqa: E402

from wsi_engine.cluster.choice import ClusterChoice  # noqa: E402
from wsi_engine.cluster.runner import Runner, Task, run_one  # noqa: E402
from wsi_engine.cluster.session import Session, open_session  # noqa: E402
from wsi_engine.errors import ClusterError, first_line  # noqa: E402


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no such thing.\nTraceback"), "no such thing"),
        (OSError(13, "Permission denied"), "[Errno 13] Permission denied"),
        (RuntimeError("\n"), "RuntimeError"),
        (KeyError(), "KeyError"),
    ],
)
def test_what_an_error_says(error: Exception, said: str) -> None:
    assert first_line(error) == said


def test_the_file_of_a_scheduler_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Waiting(distributed.Client):  # type: ignore[misc,name-defined]
        def __init__(self, **_: Any) -> None:
            raise AssertionError("Dask waits for such a file without end")

    monkeypatch.setattr(distributed, "Client", Waiting)
    missing = str(tmp_path / "missing.json")
    with (
        pytest.raises(ClusterError, match=r"cannot reach the Dask scheduler .*missing\.json \(there is no such file\)"),
        open_session(missing),
    ):
        pass


def test_a_script_that_every_worker_would_run(tmp_path: Path) -> None:
    """Without ``if __name__ == "__main__"`` no worker starts."""
    script = tmp_path / "script.py"
    script.write_text(
        'from wsi_engine.cluster.session import open_session\nwith open_session("local:1"):\n    print("started")\n'
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stdout == ""
    *_, last = ended.stderr.splitlines()
    assert last.startswith("wsi_engine.errors.ClusterError: the workers of --cluster local:1 cannot be started (")
    assert 'put what it runs under if __name__ == "__main__"' in last
    assert "bootstrapping" not in ended.stderr  # nor does a worker try to start a cluster itself


@pytest.fixture(scope="module")
def local() -> Iterator[Session]:
    """One worker; Dask is told to drop workers that it does not see for an instant."""
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1 ms"}), open_session("local:1") as session:
        session.wait_for_worker()
        yield session


def test_an_error_of_the_system_in_a_task_is_no_lost_connection(local: Session) -> None:
    began = local.client.id
    with pytest.raises(ClusterError, match=r"a worker could not do look \(FileNotFoundError: .*/nowhere'\): mend"):
        run_one(local, Task("look", os.listdir, "/nowhere"), {})
    assert local.client.id == began
    with pytest.raises(ValueError, match="math domain"):  # a fault of the program
        run_one(local, Task("root", math.sqrt, -1.0), {})


def test_a_task_that_fails_leaves_the_others_alone(local: Session) -> None:
    with Runner[str](local, {}, lambda message: None) as runner:
        for place in ("/nowhere", os.sep):
            runner.submit(Task(f"look{place}", os.listdir, place))
        ended = {outcome.task.spec: outcome for outcome in runner.outcomes()}
    assert isinstance(ended["/nowhere"].error, ClusterError)
    assert (ended[os.sep].error, ended[os.sep].value) == (None, os.listdir(os.sep))


def test_a_worker_that_died_is_started_again(local: Session) -> None:
    """However long that takes: Dask would drop it for good, and the run would have no worker left."""
    (first,) = local.client.scheduler_info()["workers"]
    pid = run_one(local, Task("pid", _tell_pid, None), {})
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: {first} != set(local.client.scheduler_info()["workers"]) != set())
    assert run_one(local, Task("pid", _tell_pid, None), {}) != pid


def _tell_pid(_: None) -> int:
    return os.getpid()


class _Client:
    """A client with or without a scheduler."""

    def __init__(self, status: str) -> None:
        self.status = status
        self.asked = 0

    def scheduler_info(self, n_workers: int) -> dict[str, Any]:
        self.asked += 1
        assert self.asked < 20, "it is never noticed"
        if self.status != "running":
            raise OSError("closed")
        return {"workers": {"tcp://10.0.0.1:4000": {}}}

    def close(self, timeout: float) -> None:
        """It was closed before."""


@pytest.mark.parametrize("back", [True, False])
def test_a_scheduler_that_goes_away_before_there_is_a_worker(back: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    clients = [_Client("closed"), _Client("running")] if back else [_Client("closed")]
    given = iter(clients)

    def connect(seconds: float) -> Any:
        for client in given:
            return client
        raise OSError("refused")

    session = Session(ClusterChoice("address", "tcp://10.0.0.1:8786", reconnect_seconds=0), connect)
    if back:
        session.wait_for_worker()
        assert session.client is clients[1]  # type: ignore[comparison-overlap]
    else:
        with pytest.raises(ClusterError, match="went away and did not come back within 0 s"):
            session.wait_for_worker()
