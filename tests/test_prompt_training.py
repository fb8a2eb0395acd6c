"""Training of prompts: settings, tiles, and one fold against a plain loop."""

from __future__ import annotations

import threading
from dataclasses import replace
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_prompt import QUICK, SIDE, TILE, make_encoder, make_task, slide_tiles, write_slides

from wsi_engine import create_encoder
from wsi_engine.cohorts.splits import Fold
from wsi_engine.encoders.weights import digest_state
from wsi_engine.errors import EncoderError, ModelError, SettingsError, SlideError
from wsi_engine.inputs import SlideSource
from wsi_engine.slide import open_slide
from wsi_engine.training import prompt_fold
from wsi_engine.training.optimisation import learning_rate
from wsi_engine.training.prompt_fold import PromptTraining, build_tuned, fit_prompts
from wsi_engine.training.prompt_memory import MemoryWatch
from wsi_engine.training.prompt_settings import PromptSettings, Tuning
from wsi_engine.training.prompt_tiles import EncodedBags, SlideTiles, read_ahead, turn_tiles
from wsi_engine.training.sampling import Stream, torch_seed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slides(tmp_path_factory.mktemp("cohort"))


def test_defaults_are_those_of_the_paper() -> None:
    settings = PromptSettings()
    assert (settings.optimiser, settings.learning_rate, settings.weight_decay) == ("adamw", 1e-4, 1e-2)
    assert (settings.epochs, settings.bags_per_step, settings.schedule) == (40, 8, "cosine")
    assert learning_rate(settings, 0, settings.least_rate) == pytest.approx(1e-4)
    assert learning_rate(settings, 40, settings.least_rate) == pytest.approx(5e-6)
    assert learning_rate(settings, 20, settings.least_rate) == pytest.approx((1e-4 + 5e-6) / 2)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PromptSettings(chunk=0), "chunk must be a whole number of at least 1"),
        (lambda: PromptSettings(least_rate=1.0), "least_rate must be at most 0.0001"),
        (lambda: PromptSettings(keep_share=float("nan")), "keep_share must be a number"),
        (lambda: PromptSettings(epochs=0), "epochs must be"),
        (lambda: PromptSettings(augment=1), "augment must be True or False"),  # type: ignore[arg-type]
        (lambda: Tuning("tune"), "mode 'tune' is unknown; use one of prompt, conventional, finetune"),  # type: ignore[arg-type]
        (lambda: Tuning(prompts=0), "prompts must be a whole number of at least 1"),
        (lambda: Tuning("finetune", deep=True), "deep is about prompts"),
        (lambda: Tuning("prompt", tune_blocks=1), "tune_blocks is for the mode finetune"),
    ],
)
def test_settings_are_checked(make: Any, match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        make()


def test_turned_tiles_are_the_eight_symmetries_and_repeat_with_the_generator() -> None:
    tile = torch.arange(3 * 16, dtype=torch.uint8).view(1, 4, 4, 3)
    torch.manual_seed(0)
    turned = turn_tiles(tile.expand(400, -1, -1, -1))
    torch.manual_seed(0)
    assert torch.equal(turned, turn_tiles(tile.expand(400, -1, -1, -1)))
    plain = tile[0].numpy()
    expected = {np.rot90(one, k).tobytes() for one in (plain, plain[::-1]) for k in range(4)}
    assert {one.numpy().tobytes() for one in turned} == expected
    assert len(expected) == 8


def test_tiles_are_the_slides_pixels_and_decoded_once_where_they_fit(
    cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = slide_tiles(cohort)
    with open_slide(str(cohort / "slides" / "s01.png"), 0.5) as slide:
        picture = slide.read_region(0, 0, SIDE, SIDE)
    expected = picture.reshape(3, TILE, 3, TILE, 3).swapaxes(1, 2).reshape(9, TILE, TILE, 3)
    rows = np.array([1, 4, 8])
    assert np.array_equal(tiles.read(1, rows), expected[rows])
    decoded = []
    decode = SlideTiles._decode
    monkeypatch.setattr(
        SlideTiles, "_decode", lambda self, place, which: (decoded.append(place), decode(self, place, which))[1]
    )
    for source in (tiles, slide_tiles(cohort, share=0.0)):
        decoded.clear()
        for place, pixels in read_ahead(source, [(1, None), (0, rows), (1, rows), (1, None)]):
            own = expected if len(pixels) == 9 else expected[rows]
            assert (place == 1) == np.array_equal(pixels, own)
        assert decoded == ([1, 0] if source is tiles else [1, 0, 1, 1])


def test_an_epoch_is_a_plain_loop(cohort: Path) -> None:
    """AdamW on the mean loss of two bags, each whole in one graph; the same prompts and head to rounding."""
    settings = replace(QUICK, epochs=2, balanced=False, augment=False)
    task = make_task(cohort, settings=settings)
    fold = Fold(tuple(range(5)), (), ())
    fitted = fit_prompts(task, fold)
    from wsi_engine.training.sampling import open_stream

    encoder = build_tuned(task.encoder, task.tuning, torch_seed(0, 0, 0, Stream.PROMPTS))
    head = task.plan.build(torch_seed(0, 0, 0, Stream.WEIGHTS))
    both = [*encoder.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(both, 1e-2, weight_decay=1e-2)
    for epoch in range(2):
        optimiser.param_groups[0]["lr"] = learning_rate(settings, epoch, 5e-6)
        order = [int(place) for place in open_stream(0, 0, epoch, Stream.SLIDES).permutation(5)]
        for step in (order[:2], order[2:4], order[4:]):
            optimiser.zero_grad()
            bags = [torch.from_numpy(task.tiles.read(place)) for place in step]
            losses = [
                head.loss(head(encoder(task.encoder.prepare(bag))), place % 2)
                for bag, place in zip(bags, step, strict=True)
            ]
            torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    assert fitted.encoder is not None
    torch.testing.assert_close(fitted.encoder.prompts, encoder.prompts, atol=2e-5, rtol=1e-4)
    for name, weight in head.state_dict().items():
        if not name.endswith("attention_c.bias"):  # its gradient is rounding alone
            torch.testing.assert_close(fitted.head.state_dict()[name], weight, atol=2e-5, rtol=1e-4)
    assert "no validation slides" in fitted.warnings[0]


@pytest.mark.parametrize("mode", ["prompt", "finetune"])
def test_the_given_encoder_is_left_as_it_was(cohort: Path, mode: Any) -> None:
    encoder = make_encoder()
    before = digest_state(encoder.backbone.state_dict())
    task = make_task(cohort, encoder=encoder, tuning=Tuning(mode), settings=replace(QUICK, epochs=1, augment=True))
    fitted = fit_prompts(task, Fold((0, 1, 2, 3), (4, 5), (6, 7)))
    assert digest_state(encoder.backbone.state_dict()) == before
    assert fitted.encoder is not None
    if mode == "finetune":
        assert digest_state(fitted.encoder.state_dict()) != before
    assert fitted.history[0].memory_mb is None or fitted.history[0].memory_mb >= 0
    assert fitted.test.shape == (2, 2)


def test_tuned_blocks_alone_learn() -> None:
    encoder = make_encoder()
    tuned: Any = build_tuned(encoder, Tuning("finetune", tune_blocks=1), 0)
    learning = {name for name, weight in tuned.named_parameters() if weight.requires_grad}
    assert learning
    assert all(name.startswith(("network.blocks.1.", "network.norm.")) for name in learning)
    assert sum(weight.numel() for weight in build_tuned(encoder, Tuning(prompts=1), 0).parameters()) == 192
    deep = build_tuned(encoder, Tuning(prompts=3, deep=True), 0)
    assert sum(weight.numel() for weight in deep.parameters()) == 2 * 3 * 192
    with pytest.raises(SettingsError, match="tune_blocks is 3 and the encoder has 2 blocks"):
        build_tuned(encoder, Tuning("finetune", tune_blocks=3), 0)


def test_memory_is_watched() -> None:
    watch = MemoryWatch(torch.device("cpu"))
    if watch.read() is None:
        pytest.skip("the system does not tell")
    watch.reset()
    with mmap(-1, 24 * 2**20) as block:  # from the system itself: the C library might give freed memory again
        block.write(b"\1" * len(block))
        grown = watch.read()
    assert grown is not None
    assert grown >= 20


def test_a_slide_that_breaks_while_training_is_named(cohort: Path, tmp_path: Path) -> None:
    tiles = slide_tiles(cohort, 2)
    gone = SlideSource(str(tmp_path / "gone.png"), "gone", 0.5)
    broken = SlideTiles([gone, gone], tiles._grids)
    with pytest.raises(SlideError, match=r"gone\.png"):
        fit_prompts(make_task(cohort, tiles=broken, labels=np.array([0, 1])), Fold((0, 1), (), ()))


def test_the_next_slide_is_decoded_while_one_is_encoded(cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder, busy with the first slide, waits until the second is being decoded."""
    task = make_task(cohort, tiles=slide_tiles(cohort, 4, share=0.0))
    training = PromptTraining(task, Fold((0, 1), (2,), (3,)), 0)
    expected = [training.bags.load(place) for place in (2, 1, 3)]
    begun = threading.Event()
    decode, encode = SlideTiles._decode, EncodedBags._encode

    def decode_told(self: SlideTiles, place: int, rows: Any) -> Any:
        if place == 1:
            begun.set()
        return decode(self, place, rows)

    def encode_late(self: EncodedBags, pixels: Any) -> Any:
        assert begun.wait(60), "slides are decoded and encoded in turn"
        return encode(self, pixels)

    monkeypatch.setattr(SlideTiles, "_decode", decode_told)
    monkeypatch.setattr(EncodedBags, "_encode", encode_late)
    assert training.predict([2, 1, 3]).shape == (3, 2)
    found = list(training.bags.load_ahead([2, 1, 3]))
    assert [place for place, _ in found] == [2, 1, 3]
    for (_, features), wanted in zip(found, expected, strict=True):
        assert np.array_equal(features, wanted)


def test_memory_that_runs_out_is_one_sentence(cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = torch.OutOfMemoryError("the device is full")
    monkeypatch.setattr(prompt_fold, "bag_backward", lambda *_, **__: (_ for _ in ()).throw(full))
    with pytest.raises(ModelError, match=r"^fold 2 does not fit in the memory of cpu: lower --chunk or --max-tiles$"):
        fit_prompts(make_task(cohort), Fold((0, 1), (), ()), 2)


def test_a_network_of_stages_is_no_transformer() -> None:
    """The stages of a convolutional network are called blocks too."""
    encoder = create_encoder("timm:test_efficientnet", "random:0", "cpu", "fp32")
    with pytest.raises(EncoderError, match="fine-tuning needs a vision transformer, and EfficientNet is none"):
        build_tuned(encoder, Tuning("finetune", tune_blocks=1), 0)  # type: ignore[arg-type]
