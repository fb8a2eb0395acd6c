"""Tasks on a cluster, each of which ends: with what it returns, an error of the engine, or the loss of its workers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import heapq
import itertools
import logging
import queue
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from wsi_engine.cluster.session import Session
from wsi_engine.errors import ClusterError, WsiError, first_line

if TYPE_CHECKING:
    from distributed import Future

log = logging.getLogger("wsi_engine")

_POLL_SECONDS = 0.05
_FETCH_SECONDS = 60.0
_MOST_TRIES = 50
"""How often a task is handed out again after its scheduler forgot it."""

_MOST_OUT = 2_000
"""Tasks that the scheduler knows at a time."""

_LOST = (OSError, TimeoutError, asyncio.CancelledError, concurrent.futures.CancelledError)
"""What a client says when the connection broke."""

T = TypeVar("T")


@dataclass(frozen=True)
class Task(Generic[T]):
    """One piece of work: ``function(spec)`` in a worker. ``name`` is what a dashboard shows."""

    name: str
    function: Callable[[T], Any]
    spec: T


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """How a task ended: with a value, or with an error of the engine."""

    task: Task[T]
    value: Any = None
    error: WsiError | None = None


class _KilledError(ClusterError):
    """Workers died over and over with a task."""


class Runner(Generic[T]):
    """Hands tasks to a session's cluster and brings back how they ended; a context manager.

    What a worker was doing when it died is done by another: Dask's scheduler sees to that. What a scheduler forgot,
    because it was started anew, is handed out again from here. A task whose workers died over and over may only have
    stood behind another in them: it is tried once more at the end, with nothing beside it.
    """

    def __init__(self, session: Session, resources: dict[str, float], hear: Callable[[dict[str, Any]], None]) -> None:
        """Make a runner.

        Args:
            session: the cluster.
            resources: what each task asks of a worker, such as ``{"GPU": 1}``.
            hear: called in the caller's thread with each message of a task
                (:class:`wsi_engine.cluster.messages.Teller`).
        """
        self.topic = f"wsi-{uuid.uuid4().hex}"
        self._session = session
        self._resources = resources
        self._hear = hear
        self._heard: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._due: list[tuple[float, int, Task[T]]] = []
        self._out: dict[str, tuple[Task[T], Future[Any]]] = {}
        self._tries: dict[str, int] = {}
        self._suspects: list[Task[T]] = []
        self._alone: Task[T] | None = None
        self._told: set[str] = set()
        self._listen()

    def submit(self, task: Task[T], delay: float = 0.0) -> None:
        """Hand out a task, at the earliest after some seconds."""
        heapq.heappush(self._due, (time.monotonic() + delay if delay else 0.0, next(self._numbers), task))

    def try_later(self, task: Task[T], slide_id: str, why: str) -> None:
        """Hand out a task again after the choice's ``retry_seconds``, since another process has its slide.

        Args:
            task: that found it so.
            slide_id: of its slide, of which the user is told once.
            why: who has it.
        """
        if slide_id not in self._told:
            self._told.add(slide_id)
            log.warning("%s: the run waits for it", why)
        self.submit(task, self._session.choice.retry_seconds)

    def outcomes(self) -> Iterator[Outcome[T]]:
        """How tasks end, in the order in which they do, until none is left; more may be submitted meanwhile.

        Raises:
            ClusterError: the scheduler stays away, or forgets a task over and over; or all jobs of Slurm are refused,
                or end one after another.
            Exception: a fault of the program in a task.
        """
        while self._due or self._out or self._suspects:
            self._hand_out()
            ended = list(self._collect())
            self._pass_on()
            yield from ended
            self._session.watch(len(self._due) + len(self._out) + len(self._suspects))
            if not ended:
                time.sleep(_POLL_SECONDS)
        self._pass_on()

    def _listen(self) -> None:
        self._session.client.subscribe_topic(self.topic, lambda event: self._heard.put(event[1]))

    def _pass_on(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._hear(self._heard.get_nowait())

    def _hand_out(self) -> None:
        while not self._alone and self._due and self._due[0][0] <= time.monotonic() and len(self._out) < _MOST_OUT:
            _, number, task = heapq.heappop(self._due)
            self._send(task, number)
        if self._suspects and not self._out:
            self._alone = self._suspects.pop()
            self._send(self._alone, 0)

    def _send(self, task: Task[T], number: int) -> None:
        """Give a task to the scheduler; the lower its number, the earlier it is done."""
        key = f"{task.name}-{uuid.uuid4().hex[:12]}"
        try:
            future = self._session.client.submit(
                task.function, task.spec, key=key, pure=False, resources=self._resources or None, priority=-number
            )
        except _LOST:
            self.submit(task)
            self._renew()
        else:
            self._out[key] = task, future

    def _collect(self) -> Iterator[Outcome[T]]:
        """What ended since the last time; what was forgotten goes back into the queue."""
        if self._session.lost:
            self._renew()
            return
        for key, (task, future) in list(self._out.items()):
            status = future.status
            if status in ("pending", "lost"):  # with the worker that had done it, and it is done again
                continue
            if status not in ("finished", "error"):
                self._renew()
                return
            try:
                outcome = _fetch(task, future)
            except _LOST:
                self._renew()
                return
            if isinstance(outcome, BaseException):  # of the task, where an OSError is no lost connection
                raise outcome
            del self._out[key]
            alone, self._alone = self._alone, None
            if isinstance(outcome.error, _KilledError) and task is not alone:
                self._suspects.append(task)
            else:
                yield outcome

    def _renew(self) -> None:
        """Put back all that is out, and go on with a scheduler that knows nothing of it."""
        if self._session.lost or self._session.choice.kind != "client":
            self._session.renew()
        self._alone = None
        for task, future in self._out.values():
            self._tries[task.name] = tries = self._tries.get(task.name, 0) + 1
            if tries > _MOST_TRIES:
                raise ClusterError(
                    f"the Dask scheduler {self._session.choice} forgot {task.name} {tries} times: look at its log"
                )
            with suppress(Exception):
                future.release()
            self.submit(task)
        self._out.clear()
        self._listen()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take back what was not begun; a task that runs goes on to its end."""
        with suppress(Exception):
            self._session.client.unsubscribe_topic(self.topic)
        if self._out and not self._session.lost:
            with suppress(*_LOST):
                self._session.client.cancel([future for _, future in self._out.values()], force=True)
        self._out.clear()


def run_one(session: Session, task: Task[T], resources: dict[str, float]) -> Any:
    """What one task returns.

    Raises:
        WsiError: what the task raised, or its workers were lost.
    """
    with Runner[T](session, resources, lambda message: None) as runner:
        runner.submit(task)
        for outcome in runner.outcomes():
            if outcome.error is not None:
                raise outcome.error
            return outcome.value
    raise AssertionError(task)


def _fetch(task: Task[T], future: Future[Any]) -> Outcome[T] | BaseException:
    """How a task ended, or what it raised where that ends the run.

    Raises:
        OSError, CancelledError: the connection broke (:data:`_LOST`); never what the task raised.
    """
    from distributed import KilledWorker  # noqa: PLC0415

    if future.status == "finished":
        return Outcome(task, future.result(timeout=_FETCH_SECONDS))
    error: BaseException = future.exception(timeout=_FETCH_SECONDS)
    if isinstance(error, KilledWorker):
        return Outcome(task, error=_KilledError(_explain_killed(error)))
    if isinstance(error, ModuleNotFoundError):
        return ClusterError(
            f"a worker of the Dask cluster cannot load the engine ({error}): install the same version there"
        )
    if isinstance(error, WsiError):
        return Outcome(task, error=error)
    if isinstance(error, OSError):  # of that machine: others may do what is left
        what = f"a worker could not do {task.name} ({type(error).__name__}: {first_line(error)})"
        return Outcome(task, error=ClusterError(f"{what}: mend that on its machine and run again"))
    return error


def _explain_killed(error: Any) -> str:
    times = getattr(error, "allowed_failures", 0) + 1
    return (
        f"{times} workers of the cluster ended one after another while they worked on this slide: look at their logs, "
        "and give them more memory"
    )
