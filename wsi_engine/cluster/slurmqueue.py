"""Jobs of Slurm while a run has work for them: those that end are replaced, and why none runs is told."""

from __future__ import annotations

import logging
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from wsi_engine.errors import ClusterError

log = logging.getLogger("wsi_engine")

_LOOK_SECONDS = 10.0
_ANSWER_SECONDS = 30.0
_REFUSED_SECONDS = 60.0
"""After a refusal, the time until Slurm is asked again."""

_LEAST_BARREN = 3
"""So many jobs in a row may end, at least, before a worker of theirs joined."""

_ENDED = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
})  # fmt: skip
"""States of ``squeue`` that a job does not leave; what is requeued is PENDING again, under its number."""


class Jobs(Protocol):
    """What is needed of a ``SLURMCluster``: each job by name, with ``job_id`` and ``refusal``, and their number."""

    workers: dict[str, Any]
    worker_spec: dict[str, Any]

    def scale(self, *, jobs: int) -> Any:
        """Send jobs until there are so many."""


@dataclass(frozen=True)
class JobState:
    """A line of ``squeue``: the job's state, such as ``PENDING``, and why, such as ``Resources``."""

    state: str
    reason: str

    @property
    def ended(self) -> bool:
        """Whether it will not run again."""
        return self.state in _ENDED


def ask_queue(numbers: Iterable[str]) -> dict[str, JobState] | None:
    """What Slurm knows of jobs, by their number; None where it does not answer."""
    # the user's own SQUEUE_* would choose others
    command = ["squeue", "--noheader", "--states=all", "--format=%i|%T|%r", f"--jobs={','.join(numbers)}"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if said.returncode:
        return {} if "Invalid job id" in said.stderr else None
    rows = (line.strip().split("|", 2) for line in said.stdout.splitlines() if line.count("|") >= 2)
    return {number: JobState(state, reason) for number, state, reason in rows}


class SlurmQueue:
    """The jobs of a run."""

    def __init__(self, cluster: Jobs, jobs: int, processes: int, logs: str, patience: float = 600.0) -> None:
        """Send jobs.

        Args:
            cluster: whose jobs they are.
            jobs: how many there shall be.
            processes: workers of a job.
            logs: the folder where jobs write what they say.
            patience: seconds for which Slurm may refuse all jobs once it has taken some.
        """
        self.processes = processes
        self._cluster, self._jobs, self._logs, self._patience = cluster, jobs, logs, patience
        self._met: set[str] = set()
        self._barren = 0
        self._states: Counter[tuple[str, str]] = Counter()
        self._next_look = time.monotonic() + _LOOK_SECONDS
        self._hold_until = 0.0
        self._had_one: float | None = None
        self._told: set[str] = set()
        cluster.scale(jobs=jobs)

    def watch(self, workers: Iterable[str], tasks: int) -> None:
        """Look after the jobs; called often, it does something every 10 seconds.

        Args:
            workers: names of the workers that are there.
            tasks: that wait or run; no more jobs than that are sent.

        Raises:
            ClusterError: Slurm refuses them, or they end one after another before their workers join.
        """
        self._meet(workers)
        jobs = {name: job for name, job in dict(self._cluster.workers).items() if name in self._cluster.worker_spec}
        self._take_refusals(jobs)
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_SECONDS
        numbers = {name: str(job.job_id) for name, job in jobs.items() if job.job_id}
        queue = ask_queue(numbers.values()) if numbers else {}
        if queue is None:
            self._tell_once("squeue", "squeue does not answer: jobs of Slurm that end are not replaced until it does")
            return
        self._told.discard("squeue")
        living = self._drop_ended(numbers, queue)
        self._states = Counter((queue[number].state, queue[number].reason) for number in living.values())
        self._replace(min(self._jobs, tasks))

    def describe(self) -> str:
        """What the jobs do, in some words; empty where nothing is known yet."""
        what = {"PENDING": "wait in Slurm's queue", "RUNNING": "run without a worker"}
        return "; ".join(
            f"{count} of its jobs {what.get(state, f'are {state}')}" + (f", {reason}" if reason != "None" else "")
            for (state, reason), count in sorted(self._states.items())
        )

    def _meet(self, workers: Iterable[str]) -> None:
        """Note which jobs have brought a worker: one of several is named NAME-0."""
        names = set(workers)
        stems = names | {name.rpartition("-")[0] for name in names if self.processes > 1}
        new = (stems & set(self._cluster.worker_spec)) - self._met
        if new:
            self._met |= new
            self._barren = 0
            self._told.clear()

    def _take_refusals(self, jobs: Mapping[str, Any]) -> None:
        """Forget jobs that Slurm refused; where it has taken none at all, that ends the run."""
        taken = any(job.job_id for job in jobs.values())
        if taken:
            self._had_one = time.monotonic()
        refusals = {name: job.refusal for name, job in jobs.items() if job.refusal}
        if not refusals:
            return
        for name in refusals:
            self._cluster.worker_spec.pop(name, None)
        why = next(iter(refusals.values()))
        if not taken and (self._had_one is None or time.monotonic() - self._had_one > self._patience):
            raise ClusterError(
                f"Slurm refuses the jobs of --cluster slurm ({why}): mend jobqueue.slurm in Dask's configuration, and "
                "see what this account may send"
            )
        self._hold_until = time.monotonic() + _REFUSED_SECONDS
        self._tell_once("refusal", f"Slurm refuses {len(refusals)} of {self._jobs} jobs ({why}): it is asked again")

    def _drop_ended(self, numbers: Mapping[str, str], queue: Mapping[str, JobState]) -> dict[str, str]:
        """Forget the jobs that ended, and say so; those that live, by name.

        The cluster itself forgets a job when it next sends some: it finds it in ``workers`` but not in ``worker_spec``.
        """
        living = {name: number for name, number in numbers.items() if number in queue and not queue[number].ended}
        ended = {name: number for name, number in numbers.items() if name not in living}
        for name in ended:
            self._barren += name not in self._met
            self._cluster.worker_spec.pop(name, None)
        if ended:
            named = [f"{number} ({queue[number].state})" if number in queue else number for number in ended.values()]
            log.warning("jobs of Slurm have ended: %s; others are sent where there is work for them", ", ".join(named))
        return living

    def _replace(self, wanted: int) -> None:
        """Send as many jobs as are missing, unless they come to nothing."""
        there = len(self._cluster.worker_spec)
        if there >= wanted or time.monotonic() < self._hold_until:
            return
        if self._barren < max(_LEAST_BARREN, self._jobs):
            self._cluster.scale(jobs=wanted)
            return
        what = f"{self._barren} jobs of Slurm ended one after another before their workers joined"
        if not there:
            raise ClusterError(
                f"{what}: see what they wrote in {self._logs}, and that nodes reach this machine (interface, under "
                "jobqueue.slurm)"
            )
        self._tell_once("barren", f"{what}: no more are sent; see what they wrote in {self._logs}")

    def _tell_once(self, about: str, sentence: str) -> None:
        if about not in self._told:
            self._told.add(about)
            log.warning("%s", sentence)
