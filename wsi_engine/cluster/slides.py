"""One task for each slide, tried again while another process has the slide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from wsi_engine.cluster.runner import Outcome, Runner, Task
from wsi_engine.cluster.session import Session

T = TypeVar("T")


def run_slides(
    session: Session,
    device: str,
    make: Callable[[str], Sequence[Task[T]]],
    hear: Callable[[dict[str, Any]], None] = lambda message: None,
) -> Iterator[Outcome[T]]:
    """How the task of each slide ended, in the order in which they do.

    A task whose value has the status ``busy`` is tried again after the choice's ``retry_seconds``, until the other
    process is done with the slide or its lease is free.

    Args:
        session: the cluster.
        device: that the tasks run on, which decides what they ask of a worker.
        make: the tasks; it gets the topic under which they tell how far they are.
        hear: called in this thread with each of their messages.

    Raises:
        ClusterError: the scheduler went away for too long.
    """
    with Runner[T](session, session.find_resources(device), hear) as runner:
        for task in make(runner.topic):
            runner.submit(task)
        for outcome in runner.outcomes():
            if outcome.error is None and outcome.value.status == "busy":
                runner.try_later(outcome.task, outcome.value.slide_id, outcome.value.message)
            else:
                yield outcome
