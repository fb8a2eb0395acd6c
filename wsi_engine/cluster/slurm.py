"""A Dask cluster whose workers are jobs of Slurm, by dask-jobqueue; loaded by :mod:`wsi_engine.cluster.session` alone.

Import it within :func:`wsi_engine.cluster.interrupts.keep_interrupts`: dask-jobqueue takes Ctrl-C for itself as it
loads.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import dask
from dask_jobqueue.slurm import SLURMCluster, SLURMJob
from distributed.deploy.spec import ProcessInterface

from wsi_engine.cluster.slurmqueue import SlurmQueue
from wsi_engine.errors import ClusterError

_SUBMIT_COMMAND = "sbatch"


class WorkerJob(SLURMJob):  # type: ignore[misc,unused-ignore]  # unknown where it is not installed
    """A job that keeps why Slurm refused it, where dask-jobqueue would print a traceback and wait for ever."""

    refusal = ""

    async def start(self) -> None:
        """Send it."""
        try:
            await super().start()  # type: ignore[no-untyped-call,unused-ignore]
        except (RuntimeError, ValueError, OSError) as error:
            self.refusal = explain_refusal(str(error))
            await ProcessInterface.start(self)

    async def close(self) -> None:
        """End it; one that has ended, or that was refused, is no error."""
        await super().close()  # type: ignore[no-untyped-call,unused-ignore]
        await ProcessInterface.close(self)


class WorkerJobs(SLURMCluster):  # type: ignore[misc,unused-ignore]  # unknown where it is not installed
    """A cluster of such jobs, none of which has the name of one before it."""

    job_cls = WorkerJob

    def __init__(self, **options: Any) -> None:
        self._numbers = itertools.count()
        super().__init__(**options)

    def _new_worker_name(self, worker_number: int) -> str:
        return f"{self._name}-{next(self._numbers)}"


def make_slurm_cluster() -> WorkerJobs:
    """A cluster by the user's ``jobqueue.yaml`` whose workers take one task at a time; it has no job yet.

    Raises:
        ClusterError: the configuration lacks something, or cannot be followed on this machine.
    """
    place = os.path.join(dask.config.PATH, "jobqueue.yaml")
    for key in ("cores", "memory"):
        if not _configured(key):
            raise ClusterError(
                f"--cluster slurm needs the {key} of a job: set cores, memory and walltime, and what else jobs need "
                f"here, under jobqueue.slurm in {place}"
            )
    try:
        return WorkerJobs(
            # of two --nthreads the last counts: a worker's other cores belong to the threads of its one task. Of two
            # --memory-limit as well: the engine bounds its memory by itself, Slurm ends what takes more than its job
            # may, and Dask would only let a worker that is nearly full wait for room that never comes
            worker_extra_args=[*(_configured("worker-extra-args") or []), "--nthreads", "1", "--memory-limit", "0"],
            scheduler_options={"dashboard_address": ":0"} | (_configured("scheduler-options") or {}),
        )
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        why = str(error).removeprefix("Cluster failed to start: ") or type(error).__name__
        raise ClusterError(
            f"the jobs of --cluster slurm are not described well ({why.splitlines()[0]}): mend jobqueue.slurm in "
            f"{place}"
        ) from error


def watch_jobs(cluster: WorkerJobs, jobs: int, patience: float) -> SlurmQueue:
    """Send so many jobs of a cluster, and keep an eye on them."""
    folder = _configured("log-directory")
    processes: int = cluster._dummy_job.worker_processes
    return SlurmQueue(cluster, jobs, processes, os.path.abspath(folder) if folder else os.getcwd(), patience)


def explain_refusal(said: str) -> str:
    """What ``sbatch`` said, in a line without its own name: its last words tell why.

    Args:
        said: by dask-jobqueue, which puts the exit code, the command and both streams on lines of their own.
    """
    words = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in words if line.startswith(f"{_SUBMIT_COMMAND}: error:")]
    last = (errors or words or ["no reason given"])[-1]
    return last.removeprefix(f"{_SUBMIT_COMMAND}: error: ").removeprefix("Batch job submission failed: ")


def _configured(key: str) -> Any:
    """A value of ``jobqueue.slurm`` in Dask's configuration."""
    return dask.config.get(f"jobqueue.slurm.{key}", None)
