"""The nuclei of many slides as tasks of a cluster, one a slide."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from wsi_engine.cluster.messages import Tally, Teller
from wsi_engine.cluster.places import ONE_AT_A_TIME, WorkerShare, absolute_path, check_shared
from wsi_engine.cluster.runner import Task
from wsi_engine.cluster.session import Session
from wsi_engine.cluster.slides import run_slides
from wsi_engine.distribution import absolute_source, mark_folder, share_worker
from wsi_engine.errors import ModelError, SettingsError, WsiError
from wsi_engine.failures import record_outcome
from wsi_engine.inputs import SlideSource
from wsi_engine.nuclei.method import METHOD_HOMES, NucleiMethod, create_method
from wsi_engine.nuclei.segmentation import NucleiSettings
from wsi_engine.nuclei.slides import (
    NucleiOutputs,
    NucleiProgress,
    NucleiReport,
    NucleiResult,
    nuclei_job,
    segment_source,
)
from wsi_engine.places import Place, as_place


@dataclass(frozen=True)
class MethodPlan:
    """A method by what it is made from: see :func:`~wsi_engine.nuclei.method.create_method`."""

    model: str
    weights: str | None
    device: str

    @classmethod
    def of(
        cls, model: str | os.PathLike[str] | NucleiMethod, weights: str | os.PathLike[str] | None, device: str
    ) -> MethodPlan:
        """The plan, with paths that mean the same in a worker.

        Raises:
            SettingsError: the method is one that is loaded.
        """
        if not isinstance(model, str | os.PathLike):
            raise SettingsError("a method that is loaded cannot go to a cluster; give its name or its file of weights")
        name = os.fspath(model)
        if name not in ("builtin", *METHOD_HOMES) and Path(name).exists():
            name = absolute_path(name)
        return cls(name, None if weights is None else absolute_path(weights), device)

    def describe(self) -> NucleiMethod:
        """The method on the processor of this machine, to learn what it is.

        Raises:
            SettingsError: there is no such method, or it has no weights.
            ModelError: the weights are missing, damaged or of another model.
        """
        method: NucleiMethod = create_method(self.model, self.weights, "cpu")
        return method


@dataclass(frozen=True)
class NucleiSpec:
    """What a task is to do: ``identity`` is what its method must say of itself."""

    source: SlideSource
    out: Place
    method: MethodPlan
    identity: dict[str, Any]
    settings: NucleiSettings
    outputs: NucleiOutputs
    reader: str
    topic: str
    worker: WorkerShare
    mark: str


def segment_on_cluster(
    sources: Sequence[SlideSource],
    out: Place,
    plan: MethodPlan,
    method: NucleiMethod,
    settings: NucleiSettings,
    outputs: NucleiOutputs,
    reader: str,
    session: Session,
    progress: NucleiProgress | None = None,
) -> NucleiReport:
    """:func:`~wsi_engine.nuclei.slides.segment_slides` by the workers of a cluster, with the same report and bytes.

    ``method`` is what the plan describes.

    Raises:
        ClusterError: the scheduler went away for too long, or a worker does not see ``out``.
    """
    if progress:
        progress.run_started(len(sources))
    begun = time.perf_counter()
    tally = Tally(*((progress.slide_started, progress.tiles_done) if progress else (lambda *_: None, lambda _: None)))
    results: dict[str, NucleiResult] = {}
    session.wait_for_worker()
    with mark_folder(out) as mark:
        worker = share_worker(session)

        def make(topic: str) -> list[Task[NucleiSpec]]:
            folder, identity = as_place(absolute_path(out)), method.to_json()
            specs = (
                NucleiSpec(
                    absolute_source(source), folder, plan, identity, settings, outputs, reader, topic, worker, mark
                )
                for source in sources
            )
            return [Task(f"nuclei-{spec.source.slide_id}", segment_slide, spec) for spec in specs]

        for outcome in run_slides(session, plan.device, make, tally.hear):
            source = outcome.task.spec.source
            result = outcome.value
            if outcome.error is not None:
                result = NucleiResult(source.slide_id, source.path, "failed", str(outcome.error))
            results[source.slide_id] = result
            record_outcome(out, source.slide_id, nuclei_job(method.name), result.status, result.message)
            if result.status == "done":
                tally.end(source.slide_id)
            if progress:
                progress.slide_finished(result)
    ordered = tuple(results[source.slide_id] for source in sources)
    return NucleiReport(method.name, ordered, time.perf_counter() - begun)


def segment_slide(spec: NucleiSpec) -> NucleiResult:
    """In a worker: find the nuclei of a slide.

    Raises:
        ClusterError: the output folder is not the caller's.
    """
    check_shared(spec.out, spec.mark)
    with ONE_AT_A_TIME:
        try:
            method = _load_method(spec.method, spec.worker)
            if method.to_json() != spec.identity:  # a worker outlives files of weights
                _load_method.cache_clear()
                method = _load_method(spec.method, spec.worker)
            if method.to_json() != spec.identity:
                raise ModelError(
                    f"the method {method.name} differs between workers: install the same version, and give all of "
                    "them the same file of weights"
                )
        except WsiError as error:
            return NucleiResult(spec.source.slide_id, spec.source.path, "failed", str(error))
        settings = dataclasses.replace(spec.settings, workers=min(spec.settings.workers, spec.worker.count_threads()))
        told = _Told(Teller(spec.topic, spec.source.slide_id))
        return segment_source(spec.source, spec.out, method, settings, spec.outputs, spec.reader, told)


@dataclass
class _Told:
    """A progress of tiles that is told in a worker and heard where the run was started."""

    teller: Teller

    def slide_started(self, slide_id: str, tiles: int, done: int) -> None:
        """So many tiles will be gone through."""
        self.teller.begin(tiles, done)

    def tiles_done(self, tiles: int) -> None:
        """So many more are."""
        self.teller.add(tiles)


@lru_cache(maxsize=1)
def _load_method(plan: MethodPlan, share: WorkerShare) -> NucleiMethod:
    """The method of a plan, made once in a process."""
    share.limit_torch()
    method: NucleiMethod = create_method(plan.model, plan.weights, share.choose_device(plan.device))
    return method
