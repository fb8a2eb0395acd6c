"""Heads: small and large bags, chunks, gradients, losses, errors."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from support_heads import assert_close, bag, small_head
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from wsi_engine.models import HeadError, HeadOutput, create_head, list_heads
from wsi_engine.models.heads import head_lowers

POOLING = ("clam_sb", "clam_mb", "abmil", "mean")
CHUNKED = (*POOLING, "dsmil")
ALL = (*CHUNKED, "transmil")
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("clam_sb", {}),
    ("clam_sb", {"size": "big", "gated": False, "subtyping": True, "k": 3}),
    ("clam_mb", {"size": (24, 12), "subtyping": True}),
    ("abmil", {"gated": False, "hidden": ()}),
    ("abmil", {"hidden": (32, 16), "attention": 8}),
    ("dsmil", {}),
    ("dsmil", {"nonlinear": False, "passing_v": True, "query": 16, "dropout": 0.2}),
    ("transmil", {"dim": 32, "heads": 4}),
    ("mean", {}),
    ("mean", {"hidden": (8,)}),
)


# bags of every size


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("tiles", [1, 2, 7, 40])
def test_bags_of_every_size_give_outputs_and_gradients(name: str, options: dict[str, Any], tiles: int) -> None:
    head = small_head(name, **options).train()
    features = bag(tiles)
    output = head(features)
    maps = 3 if name in {"clam_mb", "dsmil"} else 1
    assert output.logits.shape == (3,)
    assert output.attention.shape == (tiles, maps)
    assert output.embedding.shape[0] == maps
    assert_close(output.weights().sum(0), np.ones(maps), 1e-5)
    loss = head.loss(output, 1)
    assert loss.shape == ()
    assert bool(loss.isfinite())
    loss.backward()
    for parameter_name, parameter in head.named_parameters():
        if tiles == 40:
            # an instance classifier learns only where its class is the bag's, or with subtyping
            idle = "instance_classifiers" in parameter_name and not options.get("subtyping")
            assert parameter.grad is not None or idle, parameter_name
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), parameter_name


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_chunks_change_nothing(name: str, dtype: torch.dtype) -> None:
    head, features = small_head(name), bag(101).to(dtype)
    whole = head(features)
    head.chunk_tiles = 10
    with torch.no_grad():
        cut = head(features)
    assert_close(cut.logits, whole.logits, 2e-6)
    assert_close(cut.attention, whole.attention, 2e-6)
    assert_close(cut.embedding, whole.embedding, 2e-6)
    if whole.instance_logits is not None:
        assert_close(cut.instance_logits, whole.instance_logits, 2e-6)


@pytest.mark.parametrize("name", CHUNKED)
def test_inference_sees_a_chunk_at_a_time(name: str) -> None:
    head = small_head(name)
    head.chunk_tiles = 16
    longest = 0

    def measure(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal longest
        longest = max([longest] + [one.shape[0] for one in inputs if one.ndim == 2])

    for module in head.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(measure)
    with torch.inference_mode():
        head(bag(100))
    # the 2k rows of either end are made again for each of clam's maps
    assert longest <= (48 if name == "clam_mb" else 16)
    head.train()
    with torch.no_grad():
        head(bag(100))
    assert longest == 100 or name == "mean"


@pytest.mark.parametrize("name", ALL)
def test_several_bags_at_once(name: str) -> None:
    head, lengths = small_head(name), [5, 1, 30, 12]
    features = bag(sum(lengths))
    together = head.forward_bags(features, lengths)
    for one, part in zip(together, torch.split(features, lengths), strict=True):
        alone = head(part)
        assert_close(one.logits, alone.logits, 1e-5)
        assert_close(one.attention, alone.attention, 1e-5)
    head.chunk_tiles = 8
    with torch.no_grad():
        again = head.forward_bags(features, lengths)
    assert_close(torch.stack([one.logits for one in again]), torch.stack([one.logits for one in together]), 1e-5)
    head.train()
    sum(head.loss(one, 1) for one in head.forward_bags(features, lengths)).backward()
    with pytest.raises(HeadError, match="said to hold 47 tiles together and 48"):
        head.forward_bags(features, [5, 30, 12])
    with pytest.raises(HeadError, match="bag 1"):
        head.forward_bags(features, [48, 0])


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_tiles_matters_to_transmil_alone(name: str) -> None:
    head, features = small_head(name), bag(30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    one, two = head(features), head(features[order])
    same = torch.allclose(one.logits, two.logits, atol=1e-5)
    assert same == (name != "transmil")
    if same:
        assert_close(two.attention, one.attention[order], 1e-5)


@pytest.mark.parametrize("name", ALL)
def test_reduced_precision_stays_near(name: str) -> None:
    head, features = small_head(name), bag(60)
    exact = head(features)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        near = head(features)
        halves = head(features.half())
    assert_close(near.logits, exact.logits.float(), 0.1)
    assert_close(halves.logits, exact.logits.float(), 0.1)
    assert_close(near.weights(), exact.weights(), 0.05)
    small = small_head(name).bfloat16()
    small.chunk_tiles = 16
    with torch.no_grad():
        assert_close(small(features).logits, exact.logits.float(), 0.1)
    head.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head.loss(head(features), 0)
    assert loss.dtype == torch.float32
    loss.backward()


def test_seeds_repeat_weights_and_names_are_listed() -> None:
    assert tuple(list_heads()) == ("clam_sb", "clam_mb", "abmil", "dsmil", "transmil", "mean")
    for name in ALL:
        one, two = small_head(name).state_dict(), small_head(name).state_dict()
        assert all(torch.equal(one[key], two[key]) for key in one)


# losses


def test_heads_train_by_cross_entropy_unless_they_say_other() -> None:
    for name in ("abmil", "mean", "transmil"):
        head = small_head(name)
        output = head(bag(10))
        wanted = cross_entropy(output.logits[None], torch.tensor([2]))
        assert_close(head.loss(output, 2), wanted, 1e-6)
        assert_close(head.loss(output, torch.tensor(2)), wanted, 1e-6)


def test_dsmil_loss_is_half_bag_half_best_tile() -> None:
    head = small_head("dsmil")
    output = head(bag(10))
    assert output.instance_logits is not None
    for label, targets in ((1, [0.0, 1.0, 0.0]), (torch.tensor([1.0, 0.0, 1.0]), [1.0, 0.0, 1.0])):
        wanted = torch.tensor(targets)
        of_bag = binary_cross_entropy_with_logits(output.logits, wanted)
        of_best = binary_cross_entropy_with_logits(output.instance_logits.max(0).values, wanted)
        assert_close(head.loss(output, label), (of_bag + of_best) / 2, 1e-6)
        assert_close(head.bag_loss(output, label), of_bag, 1e-6)
    alone = small_head("dsmil", n_classes=1)
    output = alone(bag(10))
    losses = [float(alone.bag_loss(output, label)) for label in (0, 1)]
    assert math.exp(-losses[0]) + math.exp(-losses[1]) == pytest.approx(1)
    assert_close(alone.probabilities(output.logits)[0], math.exp(-losses[1]), 1e-6)


@pytest.mark.parametrize("name", ["clam_sb", "clam_mb", "abmil", "dsmil", "transmil"])
def test_heads_learn_a_rare_tile(name: str) -> None:
    """Bags whose label hangs on one tile of twelve: the training loss falls to a fraction."""
    head = small_head(name, in_dim=8, n_classes=2, dropout=0.0)
    bags, labels = [bag(12, 8, seed) for seed in range(16)], [seed % 2 for seed in range(16)]
    for one, label in zip(bags, labels, strict=True):
        one[5] = 4.0 * label
    optimiser = torch.optim.Adam(head.parameters(), 3e-2 if name == "dsmil" else 3e-3)
    start = end = 0.0
    for epoch in range(25):
        outputs = head.forward_bags(torch.cat(bags), [12] * 16)
        loss = torch.stack([head.loss(one, label) for one, label in zip(outputs, labels, strict=True)]).mean()
        start, end = (loss.item() if epoch == 0 else start), loss.item()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert end < 0.5 * start


# errors


def test_bad_bags_are_refused() -> None:
    for name in ALL:
        head = small_head(name)
        with pytest.raises(HeadError, match="bag of 0 tiles"):
            head(torch.zeros(0, 20))
        with pytest.raises(HeadError, match="features of 20 numbers per tile and got 21"):
            head(torch.zeros(4, 21))
        with pytest.raises(HeadError, match=r"shape \(1, 4, 20\)"):
            head(torch.zeros(1, 4, 20))
        with pytest.raises(HeadError, match="int64"):
            head(torch.zeros(4, 20, dtype=torch.int64))
        with pytest.raises(HeadError, match="ndarray"):
            head(np.zeros((4, 20), np.float32))


def test_bad_labels_are_refused() -> None:
    for name in ALL:
        head = small_head(name)
        output = head(bag(5))
        for label in (-1, 3, True, torch.tensor([0, 1])):
            with pytest.raises(HeadError):
                head.loss(output, label)
    head = small_head("dsmil")
    with pytest.raises(HeadError, match=r"shape \(3,\)"):
        head.loss(head(bag(5)), torch.zeros(2))


@pytest.mark.parametrize(
    ("name", "sizes", "options", "match"),
    [
        ("clam", (8, 2), {}, "no head named 'clam'; choose one of clam_sb"),
        ("clam_sb", (0, 2), {}, "in_dim"),
        ("clam_sb", (8, 1), {}, "n_classes of clam_sb must be a whole number of at least 2"),
        ("dsmil", (8, 0), {}, "at least 1"),
        ("clam_sb", (8, 2), {"gate": True}, "no option 'gate'; its options are standardise, size, gated"),
        ("clam_sb", (8, 2), {"size": "huge"}, "small or big"),
        ("clam_sb", (8, 2), {"size": (3,)}, "two widths"),
        ("clam_sb", (8, 2), {"size": 512}, "list of widths"),
        ("clam_sb", (8, 2), {"dropout": 1.0}, "dropout"),
        ("clam_sb", (8, 2), {"dropout": float("nan")}, "dropout"),
        ("clam_sb", (8, 2), {"k": 0}, "k must"),
        ("clam_sb", (8, 2), {"gated": 1}, "True or False"),
        ("clam_mb", (8, 2), {"bag_weight": 1.1}, "bag_weight"),
        ("abmil", (8, 2), {"hidden": (0,)}, "each of hidden"),
        ("abmil", (8, 2), {"attention": 2.5}, "attention"),
        ("dsmil", (8, 2), {"query": -1}, "query"),
        ("transmil", (8, 2), {"dim": 30, "heads": 4}, "multiple of heads"),
        ("mean", (8, 2), {"dropout": "half"}, "dropout"),
    ],
)
def test_bad_settings_are_refused(name: str, sizes: tuple[int, int], options: dict[str, Any], match: str) -> None:
    with pytest.raises(HeadError, match=match) as caught:
        create_head(name, *sizes, **options)
    assert not str(caught.value).endswith(".")


def test_the_package_loads_torch_on_first_use_only() -> None:
    code = (
        "import sys, json, wsi_engine.models as m\n"
        "before = 'torch' in sys.modules\n"
        "print(json.dumps([before, m.create_head.__name__, 'timm' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == [False, "create_head", False]


def test_output_is_a_plain_value() -> None:
    output = HeadOutput(torch.zeros(2), torch.zeros(4, 1), torch.zeros(1, 8))
    assert output.instance_logits is None
    assert_close(output.weights(), np.full((4, 1), 0.25), 0)


# standard scores


@pytest.mark.parametrize("name", list_heads())
def test_standardised_features_are_those_of_the_formula(name: str) -> None:
    plain, standardised = small_head(name), small_head(name, standardise=True)
    features = 50 + 7 * bag(12)
    mean, spread = features.mean(dim=0), features.std(dim=0, correction=0)
    assert standardised.standard is not None
    standardised.standard.fit(mean, spread)
    standardised.load_state_dict(plain.state_dict(), strict=False)
    assert_close(standardised(features.half()).logits, plain((features.half() - mean) / spread).logits, 1e-5)


def test_constant_features_are_only_centred() -> None:
    head = small_head("mean", standardise=True)
    assert head.standard is not None
    head.standard.fit(torch.ones(head.in_dim), torch.zeros(head.in_dim))
    assert_close(head.standard(torch.full((3, head.in_dim), 5.0)), torch.full((3, head.in_dim), 4.0))
    with pytest.raises(HeadError, match="finite numbers"):
        head.standard.fit(torch.ones(head.in_dim + 1), torch.ones(head.in_dim + 1))


def test_heads_say_whether_they_may_be_lowered() -> None:
    assert [name for name in list_heads() if head_lowers(name)] == ["clam_sb", "clam_mb", "abmil"]
    assert not head_lowers("no such head")
