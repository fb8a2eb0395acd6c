"""Training of one fold: that it learns, that the best epoch is kept, and that seeds repeat it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from support_training import CLAM, DIM, FOLD, QUICK, SMALL, make_bags, weights

from wsi_engine.bags import ArrayBags
from wsi_engine.cohorts.splits import Fold
from wsi_engine.errors import ModelError, SettingsError
from wsi_engine.memory import available_memory
from wsi_engine.training import EpochRecord, FittedFold, HeadPlan, PromptSettings, TrainSettings, fit_fold
from wsi_engine.training import fold as fold_module
from wsi_engine.training.hardware import choose_hardware
from wsi_engine.training.inference import LoweredBags, to_tensor
from wsi_engine.training.keeping import KeptBags
from wsi_engine.training.sampling import Stream, open_stream

pytestmark = pytest.mark.usefixtures("one_thread")


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
    bags, labels = make_bags(signal=1.0)  # so weak that a head soon learns the training slides alone
    settings = replace(QUICK, epochs=16, learning_rate=2e-2, schedule="constant")
    fitted = fit_fold(bags, labels, FOLD, CLAM, settings)
    best = fitted.standing.best_epoch
    assert best is not None
    assert best < 10
    until = fit_fold(bags, labels, FOLD, CLAM, replace(settings, epochs=best + 1))
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


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("the device is full"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to …"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
    RuntimeError("CUDA error: out of memory"),
    MemoryError(),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("where", ["loss", "bag_loss"])  # in a step, and in validation
def test_memory_that_runs_out_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception, where: str) -> None:
    bags, labels = make_bags()
    monkeypatch.setattr(type(CLAM.build(0)), where, lambda *_: (_ for _ in ()).throw(error))
    sentence = r"^fold 3 does not fit in the memory of cpu: lower --max-tiles or --bags-per-step$"
    with pytest.raises(ModelError, match=sentence):
        fit_fold(bags, labels, FOLD, CLAM, QUICK, number=3)


def test_other_errors_of_torch_are_not_taken_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    bags, labels = make_bags()
    monkeypatch.setattr(type(CLAM.build(0)), "loss", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        fit_fold(bags, labels, FOLD, CLAM, QUICK)


# Where a fold stands


def stop_after(epochs: int, state: Path, settings: TrainSettings, **options: Any) -> None:
    """Train a fold until it is stopped after some epochs, with its state kept."""
    bags, labels = make_bags()
    told: list[int] = []

    def stop(record: EpochRecord) -> None:
        told.append(record.epoch)
        if len(told) > epochs:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_fold(bags, labels, FOLD, CLAM, settings, state_file=state, told=stop, **options)


def test_another_end_of_the_schedule_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_module, "SAVE_SECONDS", 0.0)
    state = tmp_path / "state.pt"
    stop_after(2, state, QUICK, least_rate=1e-4)
    bags, labels = make_bags()
    with pytest.raises(ModelError, match="training with other settings"):
        fit_fold(bags, labels, FOLD, CLAM, QUICK, state_file=state, least_rate=1e-3)
    assert fit_fold(bags, labels, FOLD, CLAM, QUICK, state_file=state, least_rate=1e-4).standing.epochs == 8


def test_what_only_costs_memory_may_change_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_module, "SAVE_SECONDS", 0.0)
    state = tmp_path / "state.pt"
    frozen = PromptSettings(epochs=4, learning_rate=5e-3, precision="fp32", device="cpu", bags_per_step=1)
    stop_after(2, state, frozen)
    bags, labels = make_bags()
    told: list[EpochRecord] = []
    changed = replace(frozen, keep_share=0.5, workers=3)
    fit_fold(bags, labels, FOLD, CLAM, changed, state_file=state, told=told.append)
    assert [record.epoch for record in told] == [2, 3]
