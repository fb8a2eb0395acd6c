"""Training: what is drawn, when it stops, that it learns, and that a kill changes nothing."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from support_cohort import write_cohort

from wsi_engine.bags import ArrayBags
from wsi_engine.cohorts.splits import Fold, SplitSettings
from wsi_engine.errors import BusyError, InputError, ModelError, SettingsError, WsiError
from wsi_engine.lease import hold_lease
from wsi_engine.metrics import apply_temperature, youden_threshold
from wsi_engine.models import load_head, read_head_card
from wsi_engine.predictions import PredictionTable
from wsi_engine.runs import RunFolder
from wsi_engine.training import FittedFold, HeadPlan, TrainReport, TrainSettings, fit_fold, train_head
from wsi_engine.training import fold as fold_module
from wsi_engine.training.dropout import CheapDropout, cheap_dropout, drop_units
from wsi_engine.training.hardware import choose_hardware
from wsi_engine.training.inference import LoweredBags, to_tensor
from wsi_engine.training.keeping import KeptBags, available_memory
from wsi_engine.training.optimisation import Standing, learning_rate
from wsi_engine.training.sampling import Stream, draw_slides, draw_tiles, open_stream

DIM = 12
SMALL: dict[str, dict[str, Any]] = {
    "clam_sb": {"size": (24, 12)},
    "clam_mb": {"size": (24, 12), "subtyping": True},
    "abmil": {"hidden": (24,), "attention": 12},
    "dsmil": {"query": 12},
    "transmil": {"dim": 24, "heads": 2},
    "mean": {},
}
QUICK = TrainSettings(epochs=8, learning_rate=5e-3, precision="fp32", device="cpu")
RUN = replace(QUICK, epochs=4, learning_rate=1e-2)
CLAM = HeadPlan("clam_sb", DIM, 2, SMALL["clam_sb"])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small products are faster so, and other tests keep their threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_bags(slides: int = 60, seed: int = 0, signal: float = 2.5) -> tuple[ArrayBags, np.ndarray]:
    """Bags in whose class 1 a few tiles stand out; every second is of it."""
    generator = np.random.default_rng(seed)
    labels = np.arange(slides) % 2
    bags = []
    for label in labels:
        bag = generator.normal(size=(int(generator.integers(9, 40)), DIM)).astype(np.float16)
        bag[:4, :3] += signal * label
        bags.append(bag)
    return ArrayBags(bags), labels


FOLD = Fold(tuple(range(36)), tuple(range(36, 46)), tuple(range(46, 60)))


def weights(fitted: FittedFold) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in fitted.head.state_dict().items()}


# What is random


def test_balanced_draws_make_classes_equally_likely() -> None:
    labels = np.array([0] * 90 + [1] * 8 + [2] * 2)
    generator = np.random.default_rng(0)
    drawn = Counter(
        int(labels[place]) for _ in range(300) for place in draw_slides(range(100), labels, True, generator)
    )
    total = sum(drawn.values())
    assert total == 300 * 100
    for number in range(3):  # 5 standard errors of a share of a third
        assert abs(drawn[number] / total - 1 / 3) < 5 * math.sqrt(2 / 9 / total)


def test_each_once_is_a_permutation_and_a_class_may_be_missing() -> None:
    labels = np.array([0, 2, 0, 2, 2])
    order = draw_slides([4, 0, 3], labels, False, np.random.default_rng(0))
    assert sorted(order) == [0, 3, 4]
    assert set(draw_slides([0, 2, 4], labels, True, np.random.default_rng(0))) <= {0, 2, 4}


@pytest.mark.parametrize(
    ("dropout", "most", "expected"), [(0.0, None, 50), (0.3, None, 35), (0.0, 20, 20), (0.3, 40, 35), (0.999, None, 1)]
)
def test_tiles_are_left_out_as_told(dropout: float, most: int | None, expected: int) -> None:
    features = np.arange(100, dtype=np.float32).reshape(50, 2)
    settings = TrainSettings(tile_dropout=dropout, max_tiles=most)
    drawn = draw_tiles(features, settings, np.random.default_rng(1))
    assert len(drawn) == expected
    assert (np.diff(drawn[:, 0]) > 0).all()  # each once, in their order
    assert {tuple(row) for row in drawn} <= {tuple(row) for row in features}


def test_streams_differ_in_everything_they_depend_on() -> None:
    def first(*key: Any) -> float:
        return float(open_stream(*key).random())

    keys = [(0, 0, 0, Stream.SLIDES), (1, 0, 0, Stream.SLIDES), (0, 1, 0, Stream.SLIDES), (0, 0, 1, Stream.SLIDES),
            (0, 0, 0, Stream.TILES)]  # fmt: skip
    assert len({first(*key) for key in keys}) == len(keys)
    assert first(*keys[0]) == first(*keys[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.9])
def test_dropout_drops_its_share_and_scales_the_rest(dtype: torch.dtype, share: float) -> None:
    units = torch.full((701, 333), 2.0, dtype=dtype)
    dropped = drop_units(units, share, np.random.default_rng(0))
    assert dropped.shape == units.shape
    assert dropped.dtype == dtype
    scale = torch.tensor(1 / (1 - share), dtype=dtype)
    assert set(dropped.unique().tolist()) == {0.0, float(2.0 * scale)}
    found = float((dropped == 0).float().mean())
    assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / units.numel())
    rows = (dropped == 0).float()  # neighbours are independent
    assert abs(float(np.corrcoef(rows[:, :-1].flatten(), rows[:, 1:].flatten())[0, 1])) < 0.015


def test_dropout_passes_gradients_where_it_passes_units() -> None:
    units = torch.randn(50, 7, requires_grad=True)
    dropped = drop_units(units, 0.5, np.random.default_rng(0))
    dropped.sum().backward()  # type: ignore[no-untyped-call]
    assert units.grad is not None
    assert torch.equal(units.grad, torch.where(dropped == 0, 0.0, 2.0))


def test_dropout_layers_are_put_back() -> None:
    head = CLAM.build(0)
    names = list(head.state_dict())
    before = [type(module) for module in head.modules()]
    with cheap_dropout(head):
        assert sum(isinstance(module, CheapDropout) for module in head.modules()) == 3
        assert list(head.state_dict()) == names
    assert [type(module) for module in head.modules()] == before


# Steps


def test_cosine_schedule_is_the_formula() -> None:
    settings = TrainSettings(epochs=40, learning_rate=3e-4)
    rates = [learning_rate(settings, epoch) for epoch in range(40)]
    assert rates == pytest.approx([3e-4 * 0.5 * (1 + math.cos(math.pi * epoch / 40)) for epoch in range(40)])
    assert learning_rate(settings, 40) == pytest.approx(0, abs=1e-12)
    assert learning_rate(replace(settings, schedule="constant"), 30) == 3e-4


def test_early_stopping_waits_for_patience_and_least_epochs() -> None:
    def run(losses: list[float | None], **settings: int) -> Standing:
        standing = Standing()
        for loss in losses:
            if standing.stopped:
                break
            standing = standing.after(loss, TrainSettings(**{"epochs": 100, "patience": 3, **settings}))
        return standing

    falling = [1.0, 0.8, 0.9, 0.8, 0.85, 0.7, 0.1]
    assert run(falling, least_epochs=0) == Standing(5, 1, 0.8, 3, True)
    assert run(falling, least_epochs=6) == Standing(7, 6, 0.1, 0, False)
    assert run([1.0] * 9, least_epochs=8) == Standing(8, 0, 1.0, 7, True)
    assert run([None] * 5, least_epochs=0) == Standing(5, 4, None, 0, False)
    assert run([1.0, 0.5], epochs=2).stopped


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"epochs": 0}, "epochs"),
        ({"patience": True}, "patience"),
        ({"learning_rate": 0}, "above 0"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"optimiser": "sgd"}, "adam, adamw"),
        ({"schedule": "step"}, "cosine"),
        ({"tile_dropout": 1.0}, "below 1"),
        ({"max_tiles": 0}, "max_tiles"),
        ({"precision": "fp16"}, "bf16"),
        ({"balanced": 1}, "balanced"),
        ({"seed": -1}, "seed"),
        ({"learning_rate": float("nan")}, "learning_rate"),
    ],
)
def test_settings_are_checked(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        TrainSettings(**wrong)


# One fold


@pytest.mark.parametrize("head", list(SMALL))
def test_every_head_learns(head: str) -> None:
    bags, labels = make_bags()
    plan = HeadPlan(head, DIM, 2, SMALL[head])
    fitted = fit_fold(bags, labels, FOLD, plan, replace(QUICK, epochs=3) if head == "transmil" else QUICK)
    held_out = roc_auc_score(labels[list(FOLD.test)], fitted.test[:, 1])
    assert held_out > (0.7 if head == "mean" else 0.85)
    assert fitted.history[-1].train_loss < fitted.history[0].train_loss
    assert np.allclose(fitted.test.sum(axis=1), 1)
    assert not fitted.head.training
    assert fitted.standing.best_loss == min(record.validation_loss or 0 for record in fitted.history)


def test_the_best_head_is_the_one_kept() -> None:
    bags, labels = make_bags()
    fitted = fit_fold(bags, labels, FOLD, CLAM, QUICK)
    best = fitted.standing.best_epoch
    assert best is not None
    until = fit_fold(bags, labels, FOLD, CLAM, replace(QUICK, epochs=8, least_epochs=0, patience=100))
    assert weights(fitted) == weights(until)
    own = -np.log(fitted.validation[np.arange(10), labels[list(FOLD.validation)]]).mean()
    assert own == pytest.approx(fitted.history[best].validation_loss, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("extra", [{}, {"bags_per_step": 3, "max_tiles": 16, "tile_dropout": 0.1}])
def test_same_seed_same_bytes(precision: str, extra: dict[str, Any]) -> None:
    bags, labels = make_bags()
    settings = replace(QUICK, epochs=2, precision="fp32", **extra)
    hardware = replace(choose_hardware(settings, "clam_sb", 0), precision=type_of(precision))

    def run(**changes: Any) -> FittedFold:
        number = changes.pop("number", 0)
        torch.rand(5)  # what others drew does not matter
        return fit_fold(bags, labels, FOLD, CLAM, replace(settings, **changes), number=number, hardware=hardware)

    first = run()
    for same in (run(), run(workers=5)):
        assert weights(same) == weights(first)
        assert same.test.tobytes() == first.test.tobytes()
    assert weights(run(seed=1)) != weights(first)
    assert weights(run(number=1)) != weights(first)


def type_of(precision: str) -> Any:
    from wsi_engine.encoders.precision import Precision

    return Precision(precision)


def test_torch_is_left_as_it_was() -> None:
    bags, labels = make_bags()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    fit_fold(bags, labels, FOLD, CLAM, replace(QUICK, epochs=1))
    assert torch.equal(torch.rand(4), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def assert_same_weights(head: torch.nn.Module, fitted: FittedFold) -> None:
    """Up to rounding; but for the bias of the scores, which the softmax takes out: its gradient is rounding alone."""
    for name, tensor in head.state_dict().items():
        if not name.endswith("attention_c.bias"):
            assert torch.allclose(tensor, fitted.head.state_dict()[name], atol=1e-5), name


def test_one_step_is_the_published_one() -> None:
    """Adam on the head's own loss, bag by bag: the same weights as from a plain loop, without dropout."""
    bags, labels = make_bags(8)
    plan = HeadPlan("clam_sb", DIM, 2, {**SMALL["clam_sb"], "dropout": 0.0})
    settings = replace(QUICK, epochs=2, schedule="constant", balanced=False, weight_decay=1e-3)
    fitted = fit_fold(bags, labels, Fold(tuple(range(8)), (), ()), plan, settings)
    from wsi_engine.training.sampling import torch_seed

    head = plan.build(torch_seed(0, 0, 0, Stream.WEIGHTS))
    optimiser = torch.optim.Adam(head.parameters(), 5e-3, weight_decay=1e-3)
    for epoch in range(2):
        for place in open_stream(0, 0, epoch, Stream.SLIDES).permutation(8):
            optimiser.zero_grad()
            head.loss(head(torch.from_numpy(bags.load(place)).float()), int(labels[place])).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    assert_same_weights(head, fitted)


def test_several_bags_in_one_step_average_their_losses() -> None:
    bags, labels = make_bags(6)
    plan = HeadPlan("abmil", DIM, 2, {**SMALL["abmil"], "dropout": 0.0})
    settings = replace(QUICK, epochs=1, balanced=False, bags_per_step=4, schedule="constant")
    fitted = fit_fold(bags, labels, Fold(tuple(range(6)), (), ()), plan, settings)
    from wsi_engine.training.sampling import torch_seed

    head = plan.build(torch_seed(0, 0, 0, Stream.WEIGHTS))
    optimiser = torch.optim.Adam(head.parameters(), 5e-3, weight_decay=1e-5)
    order = open_stream(0, 0, 0, Stream.SLIDES).permutation(6)
    for step in (order[:4], order[4:]):
        optimiser.zero_grad()
        losses = [head.loss(head(torch.from_numpy(bags.load(p)).float()), int(labels[p])) for p in step]
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert_same_weights(head, fitted)


def test_standard_scores_are_those_of_the_training_tiles() -> None:
    bags, labels = make_bags()
    plan = HeadPlan("abmil", DIM, 2, {**SMALL["abmil"], "standardise": True})
    fitted = fit_fold(bags, labels, FOLD, plan, replace(QUICK, epochs=1))
    tiles = np.concatenate([bags.load(place) for place in FOLD.train]).astype(np.float64)
    assert fitted.head.standard is not None
    assert np.allclose(fitted.head.standard.mean, tiles.mean(axis=0), atol=1e-5)
    assert np.allclose(fitted.head.standard.spread, tiles.std(axis=0), atol=1e-5)


def test_without_validation_the_last_head_is_kept_and_said_so() -> None:
    bags, labels = make_bags()
    fitted = fit_fold(bags, labels, replace(FOLD, validation=()), CLAM, replace(QUICK, epochs=3))
    assert fitted.standing.best_epoch == 2
    assert "no validation slides" in fitted.warnings[0]
    assert fitted.validation.shape == (0, 2)


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (HeadPlan("clam", DIM, 2), "no head named 'clam'"),
        (HeadPlan("abmil", DIM, 2, {"branches": 2}), "no option 'branches'"),
        (HeadPlan("abmil", DIM + 1, 2), "bag 3|numbers per tile"),
    ],
)
def test_a_head_that_does_not_fit_is_one_sentence(plan: HeadPlan, match: str) -> None:
    bags, labels = make_bags()
    with pytest.raises(ModelError, match=match):
        fit_fold(bags, labels, FOLD, plan, QUICK)


def test_features_that_are_not_finite_are_named() -> None:
    bags, labels = make_bags()
    arrays = [bags.load(place) for place in range(len(bags))]
    arrays[5] = arrays[5].copy()
    arrays[5][3, 2] = np.inf
    names = [f"slide-{place}" for place in range(60)]

    class Raw(ArrayBags):
        def __init__(self) -> None:
            super().__init__([array for place, array in enumerate(arrays) if place != 5] + [arrays[4]])

        def load(self, place: int) -> Any:
            return arrays[place]

    with pytest.raises(ModelError, match=r"epoch 0 of fold 2 at slide-5"):
        fit_fold(Raw(), labels, FOLD, CLAM, replace(QUICK, balanced=False), names=names, number=2)


def test_nothing_to_train_on() -> None:
    bags, labels = make_bags(6)
    with pytest.raises(SettingsError, match="no slide to train on"):
        fit_fold(bags, labels, Fold((), (0,), (1,)), CLAM, QUICK)
    with pytest.raises(SettingsError, match="labels do not fit"):
        fit_fold(bags, labels[:3], FOLD, CLAM, QUICK)


# Memory


@pytest.mark.parametrize("head", ["clam_sb", "abmil"])
def test_lowered_bags_are_what_the_head_would_round_to(head: str) -> None:
    bags, _ = make_bags(2)
    lowered = to_tensor(LoweredBags(bags).load(1), torch.device("cpu"))
    assert torch.equal(lowered, torch.from_numpy(bags.load(1)).bfloat16())
    network = HeadPlan(head, DIM, 2, SMALL[head]).build(0).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(lowered).logits, network(torch.from_numpy(bags.load(1))).logits)


def test_bags_are_kept_while_they_fit() -> None:
    bags, _ = make_bags(4)
    loaded: list[int] = []

    class Counting(ArrayBags):
        def load(self, place: int) -> Any:
            loaded.append(place)
            return super().load(place)

    arrays = [bags.load(place) for place in range(4)]
    kept = KeptBags(Counting(arrays), limit=arrays[0].nbytes + arrays[1].nbytes)
    for _ in range(3):
        for place in range(3):
            assert np.array_equal(kept.load(place), arrays[place])
    assert loaded == [0, 1, 2, 2, 2]
    assert (kept.dim, len(kept), kept.tiles(2)) == (DIM, 4, len(arrays[2]))
    assert 0 < available_memory() < 2**50


# Runs


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a cohort: cohort.csv and features/."""
    return write_cohort(tmp_path_factory.mktemp("cohort"), slides=32, dim=DIM)


def train(cohort: Path, out: Path, **changes: Any) -> TrainReport:
    arguments: dict[str, Any] = {
        "head": "clam_sb",
        "options": SMALL["clam_sb"],
        "splits": SplitSettings(folds=2, validation=0.25),
        "settings": RUN,
    }
    return train_head(cohort / "cohort.csv", cohort / "features", "subtype", out, **(arguments | changes))


def kept_bytes(run: Path) -> dict[str, bytes]:
    """Every file that has no times in it."""
    names = [*run.glob("fold-*/head.safetensors"), run / "predictions.csv", run / "validation.csv", run / "splits.csv"]
    return {str(path.relative_to(run)): path.read_bytes() for path in names}


@pytest.fixture(scope="module")
def whole(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(cohort, out)
    return out


def test_a_run_is_all_there(cohort: Path, whole: Path) -> None:
    run = RunFolder(whole)
    record = run.read_record()
    assert record.complete
    assert record.classes == ("basal", "luminal")
    assert record.settings["learning_rate"] == 1e-2
    assert (record.folds, record.head, record.options["k"]) == (2, "clam_sb", 8)
    lines = [json.loads(line) for line in run.log_file.read_text().splitlines()]
    assert [(line["fold"], line["epoch"]) for line in lines] == [(f, e) for f in range(2) for e in range(4)]
    table = PredictionTable.read(run.predictions_file)
    assert sorted(table.slide_ids) == sorted(f"slide-{n:02}" for n in range(32))  # k-fold: each slide once
    assert roc_auc_score(table.labels, table.probabilities[:, 1]) > 0.8
    assert not list(whole.glob("fold-*/state.pt"))
    with open(run.splits_file, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert set(rows[0]) == {"slide_id", "patient", "label", "fold-0", "fold-1"}
    for fold in range(2):
        said = {
            name: {row["patient"] for row in rows if row[f"fold-{fold}"] == name} for name in ("train", "val", "test")
        }
        assert not said["train"] & said["test"]
        assert not said["train"] & said["val"]
        tested = {row["slide_id"] for row in rows if row[f"fold-{fold}"] == "test"}
        assert tested == {name for name, own in zip(table.slide_ids, table.folds, strict=True) if own == fold}


def test_a_head_says_what_it_is(whole: Path) -> None:
    run = RunFolder(whole)
    table = PredictionTable.read(run.validation_file)
    for fold in range(2):
        card = read_head_card(run.head_file(fold))
        assert card["features"]["encoder"] == "net"
        assert (card["fold"], card["label"], card["training"]["epochs"]) == (fold, "subtype", 4)
        own = table.folds == fold
        calibrated = apply_temperature(np.log(table.probabilities[own]), card["calibration"]["temperature"])
        assert card["calibration"]["threshold"] == youden_threshold(table.labels[own], calibrated[:, 1])
        assert load_head(run.head_file(fold)).in_dim == DIM


class StopsAt:
    """A progress that raises after some epochs, and counts what it is told."""

    def __init__(self, epochs: int) -> None:
        self.left, self.told = epochs, []  # type: ignore[var-annotated]

    def run_started(self, folds: int, epochs: int) -> None:
        self.told.append(("run", folds, epochs))

    def fold_started(self, fold: int, slides: int) -> None:
        self.told.append(("fold", fold))

    def epoch_finished(self, fold: int, epoch: int, train_loss: float, validation_loss: float | None) -> None:
        self.told.append((fold, epoch))
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def fold_finished(self, summary: Any, resumed: bool) -> None:
        self.told.append(("resumed" if resumed else "done", summary.fold))


@pytest.mark.parametrize(("epochs", "seconds"), [(1, 0.0), (3, 0.0), (4, 0.0), (6, 0.0), (6, 1e9)])
def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    cohort: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, seconds: float
) -> None:
    monkeypatch.setattr(fold_module, "SAVE_SECONDS", seconds)  # every epoch is saved, or none
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(cohort, out, progress=StopsAt(epochs))
    assert not RunFolder(out).read_record().complete
    with open(out / "log.jsonl", "a") as stream:
        stream.write('{"fold": 0, "epo')  # torn by the kill
    again = StopsAt(0)
    train(cohort, out, progress=again)
    assert kept_bytes(out) == kept_bytes(whole)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(line["fold"], line["epoch"]) for line in lines] == [(f, e) for f in range(2) for e in range(4)]
    if seconds == 0.0:
        epochs_again = [entry for entry in again.told if isinstance(entry[0], int)]
        assert len(epochs_again) == 8 - (epochs - 1)  # the epoch that raised was not saved yet
    if epochs == 6:
        assert ("resumed", 0) in again.told


def test_a_killed_process_is_gone_on_with(cohort: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = f"""
import os, signal, torch
torch.set_num_threads(1)
import wsi_engine.training.fold as fold
from wsi_engine.training import TrainSettings, train_head
from wsi_engine.cohorts.splits import SplitSettings
fold.SAVE_SECONDS = 0.0
class Kills:
    def run_started(self, folds, epochs): pass
    def fold_started(self, fold, slides): pass
    def epoch_finished(self, fold, epoch, train_loss, validation_loss):
        if (fold, epoch) == (1, 2):
            os.kill(os.getpid(), signal.SIGKILL)
    def fold_finished(self, summary, resumed): pass
train_head({str(cohort / "cohort.csv")!r}, {str(cohort / "features")!r}, "subtype", {str(out)!r}, head="clam_sb",
    options={SMALL["clam_sb"]!r}, splits=SplitSettings(folds=2, validation=0.25), settings={RUN!r},
    progress=Kills())
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == -9, done.stderr
    assert (out / "fold-1" / "state.pt").exists()
    told = StopsAt(0)
    train(cohort, out, progress=told)
    assert ("resumed", 0) in told.told
    assert (1, 2) in told.told
    assert (1, 1) not in told.told
    assert kept_bytes(out) == kept_bytes(whole)


def test_a_finished_run_is_not_trained_again(cohort: Path, whole: Path) -> None:
    before = kept_bytes(whole)
    told = StopsAt(1)
    report = train(cohort, whole, progress=told)
    assert told.told == [("run", 2, 4), ("resumed", 0), ("resumed", 1)]
    assert kept_bytes(whole) == before
    assert report.folds[1].epochs == 4
    assert report.folds[0].auroc is not None
    json.dumps(report.to_json(), allow_nan=False)


def test_lost_predictions_are_made_again(cohort: Path, whole: Path) -> None:
    before = kept_bytes(whole)
    (whole / "predictions.csv").write_bytes(before["predictions.csv"][:-40])  # a row of the last fold is torn
    train(cohort, whole)
    assert kept_bytes(whole) == before


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"settings": replace(RUN, epochs=7)}, r"another setting epochs \(4, now 7\)"),
        ({"head": "clam_mb"}, "another head"),
        ({"options": {"size": (24, 12), "k": 4}}, r"another option k \(8, now 4\)"),
        ({"splits": SplitSettings(folds=3, validation=0.25)}, "another folds"),
        ({"splits": SplitSettings(folds=2, validation=0.25, seed=1)}, r"another splits seed \(0, now 1\)"),
    ],
)
def test_a_folder_takes_one_run_only(cohort: Path, whole: Path, changes: dict[str, Any], match: str) -> None:
    before = kept_bytes(whole)
    with pytest.raises(ModelError, match=match):
        train(cohort, whole, **changes)
    assert kept_bytes(whole) == before


def test_heads_of_unknown_origin_are_not_taken_for_done(cohort: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(ModelError, match=r"no run\.json"):
        train(cohort, tmp_path / "run")


def test_threads_that_load_may_change(cohort: Path, whole: Path) -> None:
    train(cohort, whole, settings=replace(RUN, workers=1))


def test_another_cohort_is_noticed(cohort: Path, whole: Path, tmp_path: Path) -> None:
    lines = (cohort / "cohort.csv").read_text().splitlines()
    (tmp_path / "cohort.csv").write_text("\n".join(lines[:-2]) + "\n")
    with pytest.raises(ModelError, match=r"splits\.csv differs"):
        train_head(
            tmp_path / "cohort.csv", cohort / "features", "subtype", whole, options=SMALL["clam_sb"],
            splits=SplitSettings(folds=2, validation=0.25), settings=RUN,
        )  # fmt: skip


def test_one_process_at_a_time(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with hold_lease(out / ".run.lease"), pytest.raises(BusyError, match="run is being written by process"):
        train(cohort, out)
    assert not (out / "run.json").exists()


def test_a_damaged_state_is_told(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_module, "SAVE_SECONDS", 0.0)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(cohort, out, progress=StopsAt(3))
    state = out / "fold-0" / "state.pt"
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(ModelError, match=r"state\.pt cannot be read .* delete it"):
        train(cohort, out)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"encoder": "uni"}, InputError, "uni"),
        ({"head": "clam"}, ModelError, "no head named"),
        ({"options": {"gates": 3}}, ModelError, "no option 'gates'"),
        ({"settings": replace(QUICK, device="cuda:77")}, WsiError, "cuda:77"),
    ],
)
def test_what_cannot_be_trained_writes_nothing(
    cohort: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        train(cohort, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_features_with_nan_in_a_store_are_one_sentence(tmp_path: Path) -> None:
    folder = write_cohort(tmp_path, slides=12, dim=DIM, broken=3)
    with pytest.raises(WsiError, match="slide-03") as caught:
        train(folder, tmp_path / "run")
    assert "\n" not in str(caught.value)
