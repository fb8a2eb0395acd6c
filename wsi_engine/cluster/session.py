"""A connection to a Dask cluster that outlives its scheduler."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

from wsi_engine.cluster.choice import ClusterChoice
from wsi_engine.cluster.interrupts import keep_interrupts, terminate_as_interrupt
from wsi_engine.cluster.slurmqueue import SlurmQueue
from wsi_engine.errors import ClusterError, first_line
from wsi_engine.workers import usable_cores

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger("wsi_engine")

Cluster: TypeAlias = "str | ClusterChoice | Client"
"""What a run may be spread over; a text is what ``--cluster`` takes."""

_UNREACHED = (OSError, ValueError, RuntimeError, asyncio.CancelledError, concurrent.futures.CancelledError)
"""What a client says when it is asked while its connection breaks."""

_CONNECT_SECONDS = 10.0
_LONGEST_PAUSE = 15.0
_LOOK_SECONDS = 5.0
_PATIENCE = 30.0
"""Seconds without a worker after which the user is told what is waited for."""

_TELL_AGAIN = 3600.0
_LONG = "52 weeks"


class Session:
    """A client of a cluster, made anew when its scheduler went away and came back."""

    def __init__(
        self, choice: ClusterChoice, connect: Callable[[float], Client], queue: SlurmQueue | None = None
    ) -> None:
        """Connect.

        Args:
            choice: which cluster.
            connect: makes a client within so many seconds.
            queue: the jobs that its workers are, if they are.

        Raises:
            ClusterError: nobody answers.
        """
        self.choice = choice
        self._connect = connect
        self._queue = queue
        self._next_look = 0.0
        self._tell_at: float | None = None
        try:
            self.client = connect(_CONNECT_SECONDS)
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"cannot reach the Dask scheduler {choice} ({first_line(error)}): start it, or check its address"
            ) from error

    @property
    def lost(self) -> bool:
        """Whether the scheduler is out of reach."""
        return bool(self.client.status != "running")

    def renew(self) -> None:
        """Connect again, with longer and longer pauses, until the scheduler is back.

        Raises:
            ClusterError: it stays away for longer than the choice's ``reconnect_seconds``.
        """
        choice = self.choice
        log.warning("the Dask scheduler %s is out of reach: waiting for it", choice)
        deadline, pause = time.monotonic() + choice.reconnect_seconds, 0.5
        while True:
            if self._renewed(min(_CONNECT_SECONDS, max(1.0, deadline - time.monotonic()))):
                log.warning("the Dask scheduler %s is back: what is missing is done there", choice)
                return
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the Dask scheduler {choice} went away and did not come back within "
                    f"{choice.reconnect_seconds:.0f} s: start it and run the same command again; what is done is kept"
                )
            time.sleep(min(pause, max(0.1, deadline - time.monotonic())))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _renewed(self, seconds: float) -> bool:
        if self.choice.kind == "client":  # the caller's: it connects by itself, or is closed
            return not self.lost
        with suppress(Exception):  # it is broken already
            self.client.close(timeout=2)
        try:
            self.client = self._connect(seconds)
        except (OSError, ValueError):
            return False
        return True

    def wait_for_worker(self) -> None:
        """Wait until there is a worker, and tell the user where that takes long.

        Raises:
            ClusterError: the jobs that were to be workers are refused, or come to nothing; or the scheduler stays away.
        """
        while not self._workers():
            if self.lost:
                self.renew()
            self._look(tasks=1)
            time.sleep(0.2)
        self._tell_at = None

    def watch(self, tasks: int) -> None:
        """Look now and then whether there are workers: jobs that ended are replaced, and a lack of workers is told.

        Args:
            tasks: that wait or run.

        Raises:
            ClusterError: as :meth:`wait_for_worker`.
        """
        if time.monotonic() >= self._next_look and not self.lost:
            self._next_look = time.monotonic() + _LOOK_SECONDS
            self._look(tasks)

    def _look(self, tasks: int) -> None:
        workers = self._workers()
        if self._queue:
            self._queue.watch([str(worker.get("name")) for worker in workers.values()], tasks)
        now = time.monotonic()
        if workers:
            self._tell_at = None
        elif self._tell_at is None:
            self._tell_at = now + _PATIENCE
        elif now >= self._tell_at:
            self._tell_at = now + _TELL_AGAIN
            why = self._queue.describe() if self._queue else ""
            log.warning(
                "the Dask cluster %s has had no worker for some time%s: waiting for one",
                self.choice, f" ({why})" if why else "",
            )  # fmt: skip

    def count_workers(self) -> int:
        """Workers there are now, at least 1."""
        return max(1, len(self._workers()))

    @property
    def threads(self) -> int | None:
        """Cores that one worker may use, where the workers run on this machine; None: it finds out by :attr:`peers`."""
        local = self.choice.kind == "local" and self.choice.workers
        return max(1, usable_cores() // local) if local else None

    @property
    def peers(self) -> int:
        """Workers that share the cores of one machine, at most."""
        if self._queue:
            return self._queue.processes  # a job's cores are its own, whatever else runs on its machine
        return max(Counter(urlsplit(address).hostname for address in self._workers()).values(), default=1)

    def find_resources(self, device: str) -> dict[str, float]:
        """What a task that runs on a device asks of a worker: a GPU, if need be and where workers have said so."""
        offered = any("GPU" in (worker.get("resources") or {}) for worker in self._workers().values())
        return {"GPU": 1.0} if offered and (device == "auto" or device.startswith("cuda")) else {}

    def _workers(self) -> dict[str, Any]:
        """What the scheduler tells of its workers, by address; empty where it is out of reach."""
        try:
            try:
                info = self.client.scheduler_info(n_workers=-1)
            except TypeError:  # of an earlier version, which tells all
                info = self.client.scheduler_info()
        except _UNREACHED:
            return {}
        return dict(info.get("workers", {}))


@contextmanager
def open_session(cluster: Cluster) -> Iterator[Session]:
    """Connect to a cluster, or start one, for the ``with`` block.

    Raises:
        SettingsError: the text names no cluster.
        ClusterError: Dask is not installed, the scheduler does not answer, or a cluster cannot be started.
    """
    choice = ClusterChoice.parse(cluster) if isinstance(cluster, str) else cluster
    try:
        from distributed import Client  # noqa: PLC0415 - an extra, and slow to load
    except ImportError as error:
        raise ClusterError('--cluster needs Dask: pip install "wsi-engine[cluster]"') from error
    with ExitStack() as stack:
        if isinstance(choice, Client):
            given = choice
            yield Session(ClusterChoice("client"), lambda seconds: given)
            return
        session = _start(choice, stack)
        try:
            yield session
        finally:
            with suppress(Exception):  # a scheduler that is gone needs no farewell
                session.client.close(timeout=5)


def _start(choice: ClusterChoice, stack: ExitStack) -> Session:
    """A session with the cluster of a choice, which is started where need be and stopped by the stack."""
    from distributed import Client  # noqa: PLC0415

    queue = None
    if choice.kind == "local":
        address: dict[str, Any] = {"address": _start_local(choice, stack)}
    elif choice.kind == "slurm":
        address = {}
        address["address"], queue = _start_slurm(choice, stack)
    else:
        address = {"scheduler_file" if choice.kind == "file" else "address": choice.address}

    def connect(seconds: float) -> Client:
        if choice.kind == "file" and not os.path.exists(choice.address):  # Dask would wait for it without end
            raise FileNotFoundError("there is no such file")
        return Client(**address, timeout=seconds, set_as_default=False)

    return Session(choice, connect, queue)


def _start_local(choice: ClusterChoice, stack: ExitStack) -> Any:
    """Worker processes on this machine, of one task each, until the stack ends them.

    Raises:
        ClusterError: they cannot be started.
    """
    import dask  # noqa: PLC0415
    from distributed import LocalCluster  # noqa: PLC0415

    settings = {
        # no task waits on a worker that another might begin, nor is killed with one that it only stands behind
        "distributed.scheduler.worker-saturation": 1.0,
        "distributed.worker.preload": [*_configured("distributed.worker.preload"), "wsi_engine.cluster.interrupts"],
    }
    cure = 'in a script, put what it runs under if __name__ == "__main__", since every worker loads it again'
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing asks, and says at length
        raise ClusterError(f"a worker of --cluster {choice} that is just starting would start another cluster: {cure}")
    # a worker that died is being started again: on a busy machine Dask would drop it meanwhile
    stack.enter_context(dask.config.set({"distributed.deploy.lost-worker-timeout": _LONG}))
    try:
        with dask.config.set(settings):
            cluster = LocalCluster(
                n_workers=choice.workers,
                threads_per_worker=1,
                processes=True,
                memory_limit=None,  # the engine bounds its memory by itself
                dashboard_address=":0",
                silence_logs=logging.ERROR,
            )
        return stack.enter_context(cluster)
    except (OSError, RuntimeError) as error:
        raise ClusterError(
            f"the workers of --cluster {choice} cannot be started ({first_line(error)}): give fewer; {cure}"
        ) from error


def _start_slurm(choice: ClusterChoice, stack: ExitStack) -> tuple[Any, SlurmQueue]:
    """Jobs of Slurm, as the user's ``jobqueue.yaml`` describes them, until the stack ends them."""
    if shutil.which("sbatch") is None:
        raise ClusterError("--cluster slurm needs the command sbatch, which is not here: run it where jobs are sent")
    import dask  # noqa: PLC0415

    try:
        with keep_interrupts():
            from wsi_engine.cluster.slurm import make_slurm_cluster, watch_jobs  # noqa: PLC0415
    except ImportError as error:
        raise ClusterError('--cluster slurm needs dask-jobqueue: pip install "wsi-engine[cluster]"') from error
    except ValueError as error:  # dask-jobqueue sets a signal's handler as it loads
        raise ClusterError("--cluster slurm must be started in the main thread of a program") from error
    stack.enter_context(terminate_as_interrupt())
    # a job whose worker is away may be in the queue again: whether it has ended is Slurm's to say
    stack.enter_context(dask.config.set({"distributed.deploy.lost-worker-timeout": _LONG}))
    cluster = stack.enter_context(make_slurm_cluster())
    return cluster, watch_jobs(cluster, choice.workers or 1, choice.reconnect_seconds)


def _configured(key: str) -> list[str]:
    """A list in Dask's configuration."""
    import dask  # noqa: PLC0415

    return list(dask.config.get(key, None) or [])
