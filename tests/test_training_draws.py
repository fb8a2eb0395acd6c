"""What training draws at random, the learning rate of an epoch, and when it stops."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support_training import CLAM

from wsi_engine.errors import SettingsError
from wsi_engine.training import TrainSettings
from wsi_engine.training.dropout import CheapDropout, cheap_dropout, drop_units
from wsi_engine.training.optimisation import Standing, learning_rate
from wsi_engine.training.sampling import Stream, draw_slides, draw_tiles, open_stream

pytestmark = pytest.mark.usefixtures("one_thread")


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
        ({"workers": 0}, "workers"),
        ({"precision": "fp16"}, "bf16"),
        ({"balanced": 1}, "balanced"),
        ({"seed": -1}, "seed"),
        ({"learning_rate": float("nan")}, "learning_rate"),
    ],
)
def test_settings_are_checked(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        TrainSettings(**wrong)
