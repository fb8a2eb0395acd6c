"""Exact gradients over bags cut into chunks."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support_vit import build_vit, images, pixels
from timm.layers import DropPath
from torch import Tensor, nn

from wsi_engine.models.heads import Head, create_head, list_heads
from wsi_engine.models.prompt import PromptedViT, PromptError
from wsi_engine.models.prompt_gradients import BagStep, bag_backward, encode_bag
from wsi_engine.models.prompt_tiles import Normalise


def augment(tiles: Tensor) -> Tensor:
    """Normalised tiles, each flipped or not and shifted in brightness, at random."""
    flip = torch.rand(len(tiles)) < 0.5
    tiles = Normalise()(torch.where(flip[:, None, None, None], tiles.flip(2), tiles))
    return tiles + 0.2 * torch.randn(len(tiles), 1, 1, 1)


def one_graph(encoder: Any, head: Head, chunks: Sequence[Tensor], label: int, prepare: Any) -> Tensor:
    """The ordinary way: everything in one graph."""
    features = torch.cat([encoder(prepare(chunk)) for chunk in chunks])
    loss = head.loss(head(features), label)
    loss.backward()
    return loss.detach()


def gradients(*modules: nn.Module) -> list[Tensor]:
    """Copies of all gradients, which are cleared."""
    taken = []
    for module in modules:
        for value in module.parameters():
            taken.append(torch.zeros_like(value) if value.grad is None else value.grad.clone())
            value.grad = None
    return taken


def assert_same_gradients(mine: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-5) -> None:
    """Each parameter's gradient to ``tolerance`` of its norm; parameters that a head never uses have none."""
    assert len(mine) == len(theirs)
    for one, two in zip(mine, theirs, strict=True):
        assert float((one - two).norm()) <= tolerance * float(two.norm()) + 1e-9


def build_head(name: str, dim: int, **options: Any) -> Head:
    torch.manual_seed(9)
    dropout = {} if name in {"transmil", "dsmil"} else {"dropout": 0.25}
    special = {"dsmil": {"passing_v": True, "dropout": 0.25}, "transmil": {"dim": 64, "heads": 4}}
    return create_head(name, dim, 2, **(dropout | special.get(name, {}) | options))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", list_heads())
def test_gradients_are_those_of_one_graph(name: str, deep: bool, training: bool) -> None:
    """With random augmentation, and dropout of the head in training mode, in the same order as one graph draws it."""
    encoder = PromptedViT(build_vit(), 2, deep, "cls+mean")
    head = build_head(name, encoder.dim).train(training)
    bag = pixels(19)
    torch.manual_seed(21)
    loss = one_graph(encoder, head, bag.split(4), 1, augment)
    state, expected = torch.get_rng_state(), gradients(encoder, head)
    torch.manual_seed(21)
    step = bag_backward(encoder, head, bag, 1, prepare=augment, chunk=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert step.loss == pytest.approx(float(loss), rel=1e-6)
    assert float(expected[0].norm()) > 1e-6
    assert_same_gradients(gradients(encoder, head), expected)
    assert step.features.shape == (19, 384)
    assert not step.output.logits.requires_grad
    assert head.training is training


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", list_heads())
def test_gradients_are_those_of_the_whole_bag_at_once(name: str, deep: bool) -> None:
    """Nothing random, so the ordinary way may encode all tiles in one batch; float64 leaves rounding out."""
    network = build_vit().double()
    encoder = PromptedViT(network, 1, deep).double()
    head, bag = build_head(name, encoder.dim).double().eval(), pixels(11)
    prepare = lambda tiles: Normalise()(tiles).double()  # noqa: E731
    one_graph(encoder, head, [bag], 0, prepare)
    expected = gradients(encoder, head)
    for chunk in (4, 10, 11, 12):
        bag_backward(encoder, head, bag, 0, prepare=prepare, chunk=chunk)
        assert_same_gradients(gradients(encoder, head), expected, 1e-6)  # losses are float32


def test_dropout_and_drop_path_of_a_tuned_encoder_stay_legal() -> None:
    """Fine-tuning: the whole network learns, in training mode, and drops the same in both passes."""
    encoder = build_vit(drop_path_rate=0.4, proj_drop_rate=0.2, attn_drop_rate=0.1, pos_drop_rate=0.1).train()
    assert sum(isinstance(module, DropPath) for module in encoder.modules()) > 2
    head, bag = build_head("abmil", 192).train(), pixels(17)
    torch.manual_seed(2)
    one_graph(encoder, head, bag.split(5), 1, augment)
    expected = gradients(encoder, head)
    torch.manual_seed(2)
    bag_backward(encoder, head, bag, 1, prepare=augment, chunk=5)
    assert_same_gradients(gradients(encoder, head), expected)
    bag_backward(encoder, head, bag, 1, prepare=augment, chunk=5)
    pairs = zip(gradients(encoder, head), expected, strict=True)
    assert any(
        float((one - two).norm()) > 1e-3 * float(two.norm()) for one, two in pairs
    )  # another draw: it was random


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("tuned", [False, True])
def test_under_autocast_gradients_reach_every_weight(outer: bool, tuned: bool) -> None:
    """Autocast remembers weights cast in the pass without gradients, which would cut the next pass off from them."""
    network = build_vit()
    encoder = network.train() if tuned else PromptedViT(network, 2, deep=True)
    head, bag = build_head("clam_sb", 192).eval(), pixels(12)
    with torch.autocast("cpu", torch.bfloat16):
        features = torch.cat([encoder(Normalise()(chunk)) for chunk in bag.split(4)])
        loss = head.loss(head(features), 1)
    loss.backward()
    theirs = gradients(encoder, head)
    if outer:
        with torch.autocast("cpu", torch.bfloat16):
            bag_backward(encoder, head, bag, 1, chunk=4)
    else:
        bag_backward(encoder, head, bag, 1, chunk=4, autocast=torch.bfloat16)
    mine = gradients(encoder, head)
    for one, two in zip(mine, theirs, strict=True):
        if float(two.norm()) > 0:
            assert float((one - two).norm()) <= 0.05 * float(two.norm())
            assert one.dtype == torch.float32


def test_gradients_add_up_and_are_scaled() -> None:
    encoder = PromptedViT(build_vit(), 1)
    head, bags = build_head("mean", 192).eval(), (pixels(9), pixels(6, seed=7))
    total = sum(head.loss(head(encoder(Normalise()(bag))), 1) for bag in bags) / 2
    assert isinstance(total, Tensor)
    total.backward()
    expected = gradients(encoder, head)
    steps = [bag_backward(encoder, head, bag, 1, chunk=4, scale=0.5) for bag in bags]
    assert_same_gradients(gradients(encoder, head), expected)
    assert sum(step.loss for step in steps) / 2 == pytest.approx(float(total.detach()), rel=1e-6)


class Counted(nn.Module):
    """An encoder that counts its calls, with gradients and without, and watches how many graphs are alive."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.calls: list[tuple[int, bool]] = []
        self.graphs: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = 0

    def forward(self, tiles: Tensor) -> Tensor:
        features: Tensor = self.encoder(tiles)
        self.calls.append((len(tiles), torch.is_grad_enabled()))
        if features.requires_grad:
            self.graphs.add(features)
        self.most = max(self.most, len(self.graphs))
        return features


def test_one_graph_is_alive_at_a_time_and_one_chunk_is_encoded_once() -> None:
    encoder, head = Counted(PromptedViT(build_vit(), 1)), build_head("clam_mb", 192)
    bag_backward(encoder, head, pixels(11), 0, chunk=4)
    assert encoder.calls == [(4, False), (4, False), (3, False), (4, True), (4, True), (3, True)]
    assert encoder.most == 1
    assert not encoder.graphs
    encoder.calls.clear()
    bag_backward(encoder, head, pixels(4), 0, chunk=4)
    assert encoder.calls == [(4, True)]
    encoder.calls.clear()
    assert not encode_bag(encoder, pixels(5), chunk=4).requires_grad
    assert encoder.calls == [(4, False), (1, False)]


def test_one_chunk_gives_the_gradients_of_several() -> None:
    encoder, head, bag = PromptedViT(build_vit(), 2, deep=True), build_head("dsmil", 192).eval(), pixels(7)
    whole = bag_backward(encoder, head, bag, 1, chunk=7)
    expected = gradients(encoder, head)
    for chunk in (1, 2):
        step = bag_backward(encoder, head, bag, 1, chunk=chunk)
        assert_same_gradients(gradients(encoder, head), expected)
        torch.testing.assert_close(step.features, whole.features, atol=1e-5, rtol=1e-5)


def test_nothing_to_learn_in_the_encoder_leaves_the_head_to_learn() -> None:
    encoder, head, bag = PromptedViT(build_vit(), 0), build_head("abmil", 192).eval(), pixels(10)
    for chunk in (3, 10):
        step = bag_backward(encoder, head, bag, 1, chunk=chunk)
        mine = gradients(head)
        head.loss(head(step.features), 1).backward()
        assert_same_gradients(mine, gradients(head))
        assert encoder.prompts.grad is None


class Compressed(Sequence[np.ndarray]):
    """Blocks that are made when they are asked for, and how often."""

    def __init__(self, bag: Tensor) -> None:
        self.blocks = [block.numpy() for block in bag.split(5)]
        self.asked = 0

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, place: Any) -> Any:
        block = self.blocks[place]
        self.asked += 1
        return block.copy()


def test_sources_of_tiles_all_give_the_same() -> None:
    """In float64: chunks of other sizes round otherwise, which attention's small gradients show in float32."""
    encoder, head = PromptedViT(build_vit().double(), 1), build_head("clam_sb", 192).eval().double()
    bag = pixels(13)
    asked = []

    def prepare(tiles: Tensor) -> Tensor:
        return Normalise()(tiles).double()

    def stream() -> Iterator[np.ndarray]:
        for block in bag.split(5):
            asked.append(len(block))
            yield block.numpy()

    read_only = bag.numpy().copy()
    read_only.flags.writeable = False
    compressed = Compressed(bag)
    sources = [bag, bag.numpy(), read_only, list(bag.split(5)), tuple(bag.split(13)), stream(), stream, compressed]
    results: list[tuple[BagStep, list[Tensor]]] = []
    for source in sources:
        step = bag_backward(encoder, head, source, 1, prepare=prepare, chunk=4)
        results.append((step, gradients(encoder, head)))
    for step, grads in results[1:]:
        torch.testing.assert_close(step.features, results[0][0].features, atol=1e-5, rtol=1e-5)
        assert_same_gradients(grads, results[0][1])
    assert asked == [5, 5, 3] * 3  # the generator once, the callable in each of two passes
    assert compressed.asked == 6
    torch.testing.assert_close(
        encode_bag(encoder, stream(), prepare=prepare, chunk=4), results[0][0].features, atol=1e-5, rtol=1e-5
    )


def test_normalised_as_encoders_do_it() -> None:
    tiles = pixels(2)
    expected = (tiles.permute(0, 3, 1, 2) / 255 - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / 0.25
    torch.testing.assert_close(Normalise((0.5, 0.4, 0.3), (0.25, 0.25, 0.25))(tiles), expected)


@pytest.mark.parametrize(
    ("bag", "options", "match"),
    [
        (pixels(0), {}, "the bag holds no tiles; leave out"),
        ([], {}, "the bag holds no tiles"),
        (images(), {}, r"uint8 of shape \(n, H, W, 3\), not torch.float32"),
        (pixels(4).permute(0, 3, 1, 2), {}, r"not torch.uint8 of shape \(4, 3, 32, 32\)"),
        (pixels(4)[0], {}, r"not torch.uint8 of shape \(32, 32, 3\)"),
        (["slide.svs"], {}, "not str"),
        (pixels(4), {"chunk": 0}, "chunk must be a whole number of at least 1 tile, not 0"),
        (pixels(4), {"scale": 0.0}, "scale must be a positive number, not 0.0"),
        (pixels(4), {"scale": float("nan")}, "positive number"),
    ],
)
def test_bad_bags_and_settings_are_refused(bag: Any, options: dict[str, Any], match: str) -> None:
    encoder, head = PromptedViT(build_vit(), 1), build_head("mean", 192)
    with pytest.raises(PromptError, match=match):
        bag_backward(encoder, head, bag, 0, **options)
    assert all(value.grad is None for value in [*encoder.parameters(), *head.parameters()])


def test_encoders_that_do_not_repeat_themselves_are_found_out() -> None:
    encoder, head = PromptedViT(build_vit(), 1), build_head("mean", 192)
    rng = np.random.default_rng(0)
    elsewhere = lambda tiles: Normalise()(tiles) + float(rng.normal())  # noqa: E731 - not torch's generator
    with pytest.raises(PromptError, match=r"differed by .* from one pass to the other"):
        bag_backward(encoder, head, pixels(9), 0, prepare=elsewhere, chunk=4)
    counts = iter((9, 13, 9, 5))
    for _ in range(2):
        with pytest.raises(PromptError, match="gave 9 tiles in one pass and another number"):
            bag_backward(encoder, head, lambda: pixels(next(counts)).split(1), 0, chunk=4)
    with pytest.raises(PromptError, match=r"features of shape \(4, 3, 32, 32\) for 4 tiles"):
        bag_backward(nn.Identity(), head, pixels(9), 0, chunk=4)


def test_the_generators_are_as_one_graph_leaves_them_when_the_encoder_fails() -> None:
    head, calls = build_head("mean", 192), []

    def encoder(tiles: Tensor) -> Tensor:
        calls.append(len(tiles))
        if len(calls) > 3:
            raise RuntimeError("out of memory")
        return torch.rand(len(tiles), 192)

    torch.manual_seed(4)
    with pytest.raises(RuntimeError, match="out of memory"):
        bag_backward(encoder, head.eval(), pixels(6), 0, chunk=2)
    torch.manual_seed(4)
    torch.rand(2, 192), torch.rand(2, 192), torch.rand(2, 192)
    after = torch.rand(3)
    torch.manual_seed(4)
    calls.clear()
    with pytest.raises(RuntimeError):
        bag_backward(encoder, head, pixels(6), 0, chunk=2)
    assert torch.equal(torch.rand(3), after)


def test_steps_along_these_gradients_lower_the_loss() -> None:
    """The prompts alone, under a fresh head that never moves, make dark and bright tiles easier to tell."""
    bags = [(pixels(6) // 4, 0), (255 - pixels(6) // 4, 1)]
    encoder = PromptedViT(build_vit(), 4, deep=True, pooling="mean")
    head = build_head("mean", encoder.dim, dropout=0.0).requires_grad_(False)
    optimiser = torch.optim.Adam(encoder.parameters(), lr=0.03)
    losses = []
    for _ in range(15):
        losses.append(sum(bag_backward(encoder, head, bag, label, chunk=4, scale=0.5).loss for bag, label in bags))
        optimiser.step()
        optimiser.zero_grad()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.75 * losses[0]
