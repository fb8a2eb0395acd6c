"""A classification as tasks of a cluster, one a slide; the table is written where the run was started."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from wsi_engine.classification.ensemble import Ensemble, load_ensemble
from wsi_engine.classification.explanation import ExplainSettings
from wsi_engine.classification.outcomes import SlideClass
from wsi_engine.classification.slides import classify_target
from wsi_engine.classification.targets import Target
from wsi_engine.cluster.places import ONE_AT_A_TIME, WorkerShare, absolute_path, check_shared
from wsi_engine.cluster.runner import Task
from wsi_engine.cluster.session import Session
from wsi_engine.cluster.slides import run_slides
from wsi_engine.distribution import absolute_source, mark_folder, share_worker
from wsi_engine.errors import ModelError, WsiError
from wsi_engine.places import as_place


@dataclass(frozen=True)
class EnsemblePlan:
    """An ensemble by what it is made from; its precision is decided, so that all workers compute in the same."""

    model: str
    digest: str
    device: str
    precision: str


@dataclass(frozen=True)
class ClassifySpec:
    """What a task is to do."""

    target: Target
    model: EnsemblePlan
    out: Path
    settings: ExplainSettings
    worker: WorkerShare
    mark: str


def classify_on_cluster(
    targets: Sequence[Target],
    failures: dict[str, str],
    plan: EnsemblePlan,
    out: Path,
    settings: ExplainSettings,
    session: Session,
) -> Iterator[SlideClass]:
    """How each slide ended, in order, each classified by a worker as one process would.

    Args:
        targets: the slides.
        failures: by slide id, why there is nothing to classify.
        plan: the model.
        out: folder of the results.
        settings: what is written of each slide.
        session: the cluster.

    Raises:
        ClusterError: the scheduler went away for too long, or a worker does not see ``out``.
    """
    session.wait_for_worker()
    ended = {name: SlideClass(name, "failed", why) for name, why in failures.items()}
    order = [target.slide_id for target in targets]
    given = 0
    with mark_folder(out) as mark:
        worker = share_worker(session)

        def make(topic: str) -> list[Task[ClassifySpec]]:
            folder = Path(absolute_path(out))
            return [
                Task(
                    f"classify-{one.slide_id}",
                    classify_slide,
                    ClassifySpec(_absolute(one), plan, folder, settings, worker, mark),
                )
                for one in targets
                if one.slide_id not in failures
            ]

        for outcome in run_slides(session, plan.device, make):
            name = outcome.task.spec.target.slide_id
            ended[name] = SlideClass(name, "failed", str(outcome.error)) if outcome.error else outcome.value
            while given < len(order) and order[given] in ended:
                yield ended[order[given]]
                given += 1
    yield from (ended[name] for name in order[given:])


def classify_slide(spec: ClassifySpec) -> SlideClass:
    """In a worker: classify a slide.

    Raises:
        ClusterError: the output folder is not the caller's.
    """
    check_shared(spec.out, spec.mark)
    with ONE_AT_A_TIME:
        try:
            model = _load_model(spec.model, spec.worker)
        except WsiError as error:
            return SlideClass(spec.target.slide_id, "failed", str(error))
        return classify_target(spec.target, model, spec.out, spec.settings)


@lru_cache(maxsize=1)
def _load_model(plan: EnsemblePlan, share: WorkerShare) -> Ensemble:
    """The ensemble of a plan, made once in a process; refused where its files differ from the caller's."""
    share.limit_torch()
    model = load_ensemble(plan.model, share.choose_device(plan.device), plan.precision)
    if model.digest != plan.digest:
        raise ModelError(
            f"the heads in {plan.model} differ between the machines of the cluster: put the run where all see the same"
        )
    return model


def _absolute(target: Target) -> Target:
    """The target with paths that mean the same in a worker."""
    slide = target.slide and absolute_source(target.slide)
    return dataclasses.replace(target, store=as_place(absolute_path(target.store)), slide=slide)
