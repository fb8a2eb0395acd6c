"""Slides in, classes out: features are extracted where they are missing, each slide is predicted and explained.

Features are read by threads ahead of the model and pictures are drawn by threads behind it; one slide that cannot be
classified does not stop the others.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

from wsi_engine.bags import StoredBags
from wsi_engine.classification.ensemble import Ensemble, load_ensemble
from wsi_engine.classification.explanation import (
    Explained,
    ExplainSettings,
    attention_job,
    explain_prediction,
    make_folders,
)
from wsi_engine.classification.outcomes import ClassifyReport, PredictionsFile, SlideClass
from wsi_engine.classification.prediction import Prediction
from wsi_engine.classification.targets import (
    CaseSource,
    ExtractOptions,
    FeatureSource,
    Target,
    extract_missing,
    find_targets,
)
from wsi_engine.cluster.session import Cluster, Session, open_session
from wsi_engine.errors import MismatchError, ModelError, WsiError
from wsi_engine.extraction import Progress
from wsi_engine.failures import record_outcome
from wsi_engine.memory import explain_memory
from wsi_engine.places import as_place
from wsi_engine.store import FeatureStore
from wsi_engine.workers import usable_cores

_READERS = 2
_LOADED_AHEAD = 3

T = TypeVar("T")
R = TypeVar("R")


class ClassifyProgress(Protocol):
    """Told how a classification goes; every call comes from the thread that called :func:`classify`."""

    def run_started(self, slides: int) -> None:
        """The list is checked and features are there; so many slides are classified."""

    def slide_finished(self, result: SlideClass) -> None:
        """A slide ended, well or not; slides end in the order given."""


def classify(
    slides: CaseSource | Iterable[CaseSource],
    model: str | os.PathLike[str] | Ensemble,
    out: str | os.PathLike[str],
    *,
    features: str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    slide_mpp: float | None = None,
    settings: ExplainSettings | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 64,
    workers: int | None = None,
    reader: str = "auto",
    progress: ClassifyProgress | None = None,
    extract_progress: Progress | None = None,
    cluster: Cluster | None = None,
) -> ClassifyReport:
    """Classify slides with the heads of a training run.

    Writes ``predictions.csv`` (a row a slide; rows of earlier runs of the same model into the same folder stay, and a
    slide classified again gets a new one), ``heatmaps/`` and ``tiles/`` in ``out``, and each slide's attention into its
    store. Features that are missing are extracted with the model's encoder, at its scale.

    Args:
        slides: slides, stores (``.zarr``), folders of either, CSVs with a column ``slide`` or ``slide_id``, or open
            stores; see :func:`~wsi_engine.classification.targets.find_targets`.
        model: folder of ``wsi train``, one head file of it, or a loaded
            :class:`~wsi_engine.classification.ensemble.Ensemble`.
        out: folder of the results, made if it is not there.
        features: folder of the slides' stores, or its URL; None for ``<out>/features``.
        weights: the encoder's weights where features are missing, as for :func:`~wsi_engine.extraction.extract`; they
            must be those of the training set.
        slide_mpp: micrometres per level-0 pixel, for slides whose header has none or a wrong one.
        settings: what is written of each slide.
        device: where encoder and heads run: ``auto``, ``cpu``, ``cuda`` …
        precision: of the heads; see :func:`~wsi_engine.classification.ensemble.load_ensemble`.
        batch_size: tiles encoded at a time.
        workers: reading threads of the extraction; None for the number of usable cores.
        reader: ``auto`` or one reader's name, for the extraction.
        progress: told how the classification goes.
        extract_progress: told how the extraction goes.
        cluster: as in :func:`~wsi_engine.extraction.extract`; the model is given by its path then.

    Raises:
        ClusterError: the cluster cannot be reached or started, or went away for too long.
        ModelError: the run cannot be used, or the encoder's weights are not those of its training set.
        InputError: the list of slides cannot be used, or ``out`` cannot be written or holds predictions of another
            model.
        EncoderError: features are missing and the encoder cannot be made.
        SettingsError: a setting is out of range.
    """
    settings = settings or ExplainSettings()
    folder = Path(out)
    stores = as_place(features) if features is not None else folder / "features"
    targets = find_targets(slides, stores, slide_mpp)
    if cluster is not None and isinstance(model, Ensemble):
        raise ModelError("a model that is loaded cannot go to a cluster; give the folder of its run")
    ensemble = model if isinstance(model, Ensemble) else load_ensemble(model, device, precision)
    make_folders(folder, settings)
    table = PredictionsFile(folder / "predictions.csv", ensemble.classes, ensemble.digest)
    options = ExtractOptions(None if weights is None else os.fspath(weights), device, batch_size, workers, reader)
    with ExitStack() as stack:
        session = None if cluster is None else stack.enter_context(open_session(cluster))
        failures = extract_missing(targets, stores, ensemble.sources, options, extract_progress, session)
        if progress:
            progress.run_started(len(targets))
        start = time.perf_counter()
        if session is None or isinstance(model, Ensemble):
            ended = _classify_all(targets, failures, ensemble, folder, settings)
        else:
            ended = _classify_elsewhere(targets, failures, model, ensemble, device, folder, settings, session)
        results = _keep_all(ended, targets, ensemble, table, progress)
    return ClassifyReport(
        ensemble.name, ensemble.digest, ensemble.classes, ensemble.folds, ensemble.precision, tuple(results),
        time.perf_counter() - start,
    )  # fmt: skip


def _classify_elsewhere(
    targets: Sequence[Target],
    failures: dict[str, str],
    model: str | os.PathLike[str],
    ensemble: Ensemble,
    device: str,
    out: Path,
    settings: ExplainSettings,
    session: Session,
) -> Iterator[SlideClass]:
    """How each slide ended, in order, on a cluster whose workers load the model as ``ensemble`` was."""
    from wsi_engine.classification.distribution import (  # noqa: PLC0415 - it needs this module
        EnsemblePlan,
        classify_on_cluster,
    )

    plan = EnsemblePlan(os.path.abspath(model), ensemble.digest, device, ensemble.precision)
    return classify_on_cluster(targets, failures, plan, out, settings, session)


def _keep_all(
    ended: Iterator[SlideClass],
    targets: Sequence[Target],
    ensemble: Ensemble,
    table: PredictionsFile,
    progress: ClassifyProgress | None,
) -> list[SlideClass]:
    """Take in slides as they end: into the table, the failures that are written down, and the progress."""
    places = {target.slide_id: target for target in targets}
    results = []
    try:
        for result in ended:
            results.append(result)
            store = places[result.slide_id].store
            record_outcome(store.parent, result.slide_id, attention_job(ensemble.name), result.status, result.message)
            table.add(result)
            if progress:
                progress.slide_finished(result)
    finally:
        table.write()
    return results


def classify_target(target: Target, model: Ensemble, out: Path, settings: ExplainSettings) -> SlideClass:
    """Classify and explain one slide whose features are there; what goes wrong is in the result."""
    loaded = _or_message(target, lambda: _load_features(target, model.sources))
    prediction = loaded if isinstance(loaded, str) else _predict(target, loaded, model)
    return _finish(target, prediction, model, out, settings)


@dataclass(frozen=True, eq=False)
class _Loaded:
    """Features (N, D) of a slide that a model may take, of each kind, and the digest of its tiles."""

    features: tuple[NDArray[Any], ...]
    grid_digest: str


def _classify_all(
    targets: Sequence[Target], failures: dict[str, str], model: Ensemble, out: Path, settings: ExplainSettings
) -> Iterator[SlideClass]:
    """How each slide ended, in order; reading runs ahead and drawing behind, in threads."""
    cores = usable_cores()
    with ExitStack() as stack:
        readers = stack.enter_context(ThreadPoolExecutor(_READERS, "features"))
        painters = stack.enter_context(ThreadPoolExecutor(cores, "pictures"))
        stack.callback(_drop_waiting, readers, painters)

        def load(target: Target) -> _Loaded | str:
            if target.slide_id in failures:
                return failures[target.slide_id]
            return _or_message(target, lambda: _load_features(target, model.sources))

        waiting: deque[Future[SlideClass]] = deque()
        for target, loaded in _run_ahead(readers, load, targets, _LOADED_AHEAD):
            prediction = loaded if isinstance(loaded, str) else _predict(target, loaded, model)
            waiting.append(painters.submit(_finish, target, prediction, model, out, settings))
            while waiting and (waiting[0].done() or len(waiting) > 2 * cores):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _predict(target: Target, loaded: _Loaded, model: Ensemble) -> Prediction | str:
    return _or_message(target, lambda: model.predict(loaded.features, loaded.grid_digest, target.slide_id))


def _finish(
    target: Target, prediction: Prediction | str, model: Ensemble, out: Path, settings: ExplainSettings
) -> SlideClass:
    """Explain a prediction and put both together; a text in its place is why there is none."""
    if isinstance(prediction, str):
        return SlideClass(target.slide_id, "failed", prediction)
    explained: Explained | str = _or_message(
        target, lambda: explain_prediction(target, prediction, model, out, settings)
    )
    if isinstance(explained, str):
        return SlideClass(target.slide_id, "failed", explained)
    probabilities = dict(zip(prediction.classes, map(float, prediction.probabilities), strict=True))
    return SlideClass(
        target.slide_id, "done", explained.note, prediction.label, probabilities, prediction.entropy,
        prediction.disagreement, len(prediction.attention), str(target.store), explained.files,
    )  # fmt: skip


def _load_features(target: Target, sources: Sequence[FeatureSource]) -> _Loaded:
    """Features of a slide's store, of each kind; refused where the model does not take them."""
    store = FeatureStore.open(target.store)
    encoders = store.encoders()
    found, digests = [], []
    for source in sources:
        # of another encoder alone: say which, rather than that the model's own is not there
        encoder = encoders[0] if len(encoders) == 1 else source.origin.encoder
        bags = StoredBags([target.store], encoder)
        source.origin.check(bags.origin, str(target.store))
        found.append(bags.load(0))
        digests.append(store.provenance(encoder)["grid_digest"])
    if len(set(digests)) > 1:
        raise MismatchError(
            f"the features in {target.store} that the model's folds take are of different tiles: delete that store"
        )
    return _Loaded(tuple(found), digests[0])


def _or_message(target: Target, work: Callable[[], R]) -> R | str:
    """What the work on a slide returns, or the sentence of the engine's error that it ended in."""
    try:
        with explain_memory(ModelError, f"{target.slide_id} does not fit in memory: end what else runs there"):
            return work()
    except WsiError as error:
        return str(error)


def _run_ahead(pool: Executor, work: Callable[[T], R], items: Sequence[T], ahead: int) -> Iterator[tuple[T, R]]:
    """Each item with what the work made of it, in order; ``ahead`` items are under way or ready before their turn."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) > ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


def _drop_waiting(*pools: ThreadPoolExecutor) -> None:
    """Do not begin what nobody waits for any more."""
    for pool in pools:
        pool.shutdown(wait=False, cancel_futures=True)
