"""The student network and its training: shapes, reach, files, losses, batches, scenes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import ndimage

from wsi_engine.errors import InputError, ModelError, SettingsError
from wsi_engine.models.nuclei_net import (
    NucleiNet,
    NucleiNetError,
    NucleiNetSettings,
    load_nuclei_net,
    save_nuclei_net,
)
from wsi_engine.nuclei.method import create_method
from wsi_engine.nuclei.student_batches import Batcher, depth_of, make_field
from wsi_engine.nuclei.student_colours import stain_scene
from wsi_engine.nuclei.student_inference import SplitSettings, StudentPredictor, split_nuclei
from wsi_engine.nuclei.student_labels import TrustSettings, agree_on_labels
from wsi_engine.nuclei.student_losses import depth_loss, mask_loss, student_loss
from wsi_engine.nuclei.student_recipe import read_source
from wsi_engine.nuclei.student_scenes import paint_scene
from wsi_engine.nuclei.student_training import (
    Round,
    StudentTrainingSettings,
    TrainingImage,
    paint_field,
    train_student,
)

SMALL = NucleiNetSettings((4, 6, 8))


def small_net(seed: int = 0) -> NucleiNet:
    torch.manual_seed(seed)
    net = NucleiNet(SMALL)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.bias.data.fill_(1.0)  # no unit is off everywhere
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


@pytest.mark.parametrize("widths", [(4, 6), (4, 6, 8), (4, 4, 4, 4)])
def test_outputs_have_the_size_of_the_input(widths: tuple[int, ...]) -> None:
    net = NucleiNet(NucleiNetSettings(widths)).eval()
    assert net.stride == 2 ** (len(widths) - 1)
    with torch.inference_mode():
        assert net(torch.zeros(2, 3, 3 * net.stride, 5 * net.stride)).shape == (2, 2, 3 * net.stride, 5 * net.stride)


def test_pixels_beyond_the_reach_do_not_matter() -> None:
    net = small_net().double()
    side = 2 * (net.reach + 4 * net.stride)
    side -= side % net.stride
    middle = side // 2
    image = torch.rand(1, 3, side, side, dtype=torch.float64) * 255
    image.requires_grad_()
    farthest = 0
    for step in range(net.stride):  # every place relative to the pools
        place = middle + step
        (gradient,) = torch.autograd.grad(net(image)[0, :, place, place].sum(), image)
        reached = torch.nonzero(gradient[0].abs().sum(0))
        assert len(reached)
        farthest = max(farthest, int((reached - place).abs().max()))
    assert net.reach // 2 < farthest <= net.reach


def test_the_same_input_gives_the_same_output() -> None:
    image = torch.rand(1, 3, 64, 64) * 255
    with torch.inference_mode():
        assert torch.equal(small_net()(image), small_net()(image))


def test_a_network_comes_back_from_its_file(tmp_path: Path) -> None:
    net = small_net()
    save_nuclei_net(net, tmp_path / "a.safetensors", 0.5, {"licence": "CC0-1.0"})
    again, card = load_nuclei_net(tmp_path / "a.safetensors")
    assert (card["mpp"], card["licence"], card["widths"]) == (0.5, "CC0-1.0", [4, 6, 8])
    assert not again.training
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(again.state_dict()[name], tensor.half().float())


def test_files_that_are_no_student_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(NucleiNetError, match="there is no file"):
        load_nuclei_net(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(NucleiNetError, match="cannot be read as safetensors"):
        load_nuclei_net(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(NucleiNetError, match="no card of a nuclei network"):
        load_nuclei_net(path)
    save_nuclei_net(small_net(), path, 0.5)
    tensors = load_file(path)
    tensors["head.weight"][:] = torch.nan
    net = small_net()
    net.load_state_dict(tensors, strict=False)
    save_nuclei_net(net, path, 0.5)
    with pytest.raises(NucleiNetError, match="NaN"):
        load_nuclei_net(path)


@pytest.mark.parametrize("mpp", [0.0, -0.5, 0.05, 50.0, float("inf")])
def test_a_scale_that_cannot_be_is_refused(mpp: float, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    card = json.dumps({"version": 1, "widths": [4, 8], "mpp": mpp})
    save_file({"x": torch.zeros(2)}, path, {"wsi_engine.nuclei_net": card})
    with pytest.raises(NucleiNetError, match="µm per pixel"):
        load_nuclei_net(path)
    with pytest.raises(ModelError, match="true mpp"):
        create_method(path, device="cpu")


def test_weights_that_cannot_be_written_are_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        save_nuclei_net(small_net(), tmp_path / "nowhere" / "a.safetensors", 0.5)


@pytest.mark.parametrize("widths", [(), (8,), (8, 0), (8, 2.5)])
def test_impossible_networks_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="widths"):
        NucleiNetSettings(widths)
    with pytest.raises(SettingsError):
        StudentTrainingSettings(widths=widths)


def test_losses_equal_plain_sums() -> None:
    rng = np.random.default_rng(0)
    logits, depth, target = (rng.normal(size=(2, 7, 9)) for _ in range(3))
    mask, trust = (rng.random((2, 7, 9)) > 0.6) * 1.0, rng.random((2, 7, 9))
    chance = 1 / (1 + np.exp(-logits))
    entropy = -(trust * (mask * np.log(chance) + (1 - mask) * np.log(1 - chance))).sum() / trust.sum()
    dices = [
        (2 * (c * m * t).sum() + 20) / (((c + m) * t).sum() + 20) for c, m, t in zip(chance, mask, trust, strict=True)
    ]

    def smooth(away: np.ndarray, weight: np.ndarray) -> float:
        away = np.abs(away)
        return float((np.where(away < 0.1, away**2 / 0.2, away - 0.05) * weight).sum() / max(weight.sum(), 1))

    away, inside = depth - target, trust * mask
    slopes = smooth(away[:, 1:] - away[:, :-1], inside[:, 1:] * inside[:, :-1])
    slopes += smooth(away[..., 1:] - away[..., :-1], inside[..., 1:] * inside[..., :-1])
    parts = (entropy + 0.5 * (1 - np.mean(dices)), smooth(away, trust * (0.3 + mask)) + slopes)
    tensors = [torch.from_numpy(one) for one in (logits, depth, target, mask, trust)]
    assert mask_loss(tensors[0], tensors[3], tensors[4]).item() == pytest.approx(parts[0])
    assert depth_loss(tensors[1], tensors[2], tensors[3], tensors[4]).item() == pytest.approx(parts[1])
    both = student_loss(torch.stack(tensors[:2], 1), tensors[3], tensors[2], tensors[4]).item()
    assert both == pytest.approx(parts[0] + 1.5 * parts[1], rel=1e-5)


def test_untrusted_pixels_teach_nothing() -> None:
    out = torch.randn(1, 2, 8, 8, requires_grad=True)
    trust = torch.zeros(1, 8, 8)
    trust[:, :4] = 1
    student_loss(out, torch.ones(1, 8, 8), torch.ones(1, 8, 8), trust).backward()
    assert out.grad is not None
    assert (out.grad[..., :4, :] != 0).all()
    assert (out.grad[..., 4:, :] == 0).all()


def test_depth_is_the_distance_to_the_outside_of_ones_own_nucleus() -> None:
    labels = np.zeros((40, 60), np.int32)
    labels[5:25, 5:30], labels[5:25, 30:50], labels[30:31, 3:9] = 1, 2, 3
    depth = depth_of(labels)
    assert ((depth > 0) == (labels > 0)).all()
    for number in (1, 2):
        own = ndimage.distance_transform_edt(np.pad(labels == number, 1))[1:-1, 1:-1]
        inside = labels == number
        assert depth[inside].max() == 1
        assert np.abs(depth - own / own.max())[inside].max() < 0.06
    assert depth[15, 29] < 0.15  # where the two touch
    assert depth[15, 30] < 0.15


def test_scenes_are_functions_of_their_seed_with_whole_nuclei() -> None:
    first, again = (paint_scene(np.random.default_rng(3), 96) for _ in range(2))
    assert np.array_equal(first.density, again.density)
    assert np.array_equal(first.labels, again.labels)
    assert first.density.shape == (96, 96, 3)
    assert (first.density >= 0).all()
    counts = []
    for seed in range(12):
        labels = paint_scene(np.random.default_rng(seed), 96).labels
        sizes = np.bincount(labels.ravel())[1:]
        assert (sizes >= 12).all()
        counts.append(len(sizes))
    assert max(counts) > 10
    assert len(set(counts)) > 6


def test_nuclei_of_a_scene_hold_more_haematoxylin_and_look_darker() -> None:
    rng = np.random.default_rng(5)
    within, without = [], []
    for _ in range(12):
        scene = paint_scene(rng, 96)
        grey = stain_scene(rng, scene.density).mean(-1)
        if (scene.labels > 0).any():
            within.append(grey[scene.labels > 0].mean())
            without.append(grey[scene.labels == 0].mean())
    assert np.mean(within) < np.mean(without) - 20


def test_batches_move_picture_and_labels_together() -> None:
    """Where colour and optics are left alone, white squares stay under their labels."""
    labels = np.zeros((120, 100), np.int32)
    labels[20:50, 20:60], labels[70:100, 30:80] = 1, 2
    image = np.where(labels[..., None] > 0, 230, 20).astype(np.uint8).repeat(3, -1)
    batcher = Batcher([make_field(image, labels)], 64, seed=1, colour=0)
    pixels, mask, depth, trust = batcher.draw(8)
    assert pixels.shape == (8, 3, 64, 64)
    assert mask.shape == depth.shape == trust.shape == (8, 64, 64)
    bright = pixels.mean(1) > 125
    assert (bright == (mask > 0)).float().mean() > 0.97
    assert 0.05 < mask.mean() < 0.8
    assert depth[mask == 0].max() < 0.3
    other = Batcher([make_field(image, labels)], 64, seed=1, colour=0).draw(8)
    assert torch.equal(other[0], pixels)


def test_fields_of_no_weight_are_not_drawn() -> None:
    labels = np.zeros((64, 64), np.int32)
    fields = [make_field(np.full((64, 64, 3), value, np.uint8), labels) for value in (40, 220)]
    pixels, *_ = Batcher(fields, 32, seed=0, weights=np.array([0.0, 1.0]), colour=0).draw(12)
    assert pixels.mean((1, 2, 3)).min() > 150


TINY = StudentTrainingSettings(
    widths=(6, 8, 10),
    scenes=2,
    side=64,
    batch=4,
    painted=2,
    real=2,
    steps=30,
    rounds=(Round(4, 1e-3, TrustSettings()),),
    views=1,
    scales=(1.0,),
    rate=1e-2,
    keep=0.8,
)


def losses(lines: list[str]) -> list[float]:
    return [float(line.rsplit(" ", 1)[1]) for line in lines if "loss" in line]


def test_training_lowers_the_loss_and_repeats_itself() -> None:
    fields = [paint_field(1, number) for number in range(2)]
    batch = Batcher(fields, 64, seed=9).draw(8)

    def loss_after(steps: int) -> tuple[float, NucleiNet]:
        net = train_student([], dataclasses.replace(TINY, steps=steps))
        with torch.inference_mode():
            return student_loss(net(batch[0]), *batch[1:]).item(), net

    (early, _), (late, net), (_, again) = loss_after(1), loss_after(30), loss_after(30)
    assert late < 0.9 * early
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_round_learns_from_unlabelled_images() -> None:
    field = paint_field(1, 2)
    image = TrainingImage(np.ascontiguousarray(field.planes[:3].transpose(1, 2, 0)), 0.5)
    lines: list[str] = []
    train_student([image], dataclasses.replace(TINY, steps=5), lines.append)
    assert any("round 1: labelled 1 of 1 images" in line for line in lines)
    assert lines[-1].startswith("step 4 of 4")
    assert np.isfinite(losses(lines)).all()


def test_images_without_nuclei_are_refused() -> None:
    blank = TrainingImage(np.full((128, 128, 3), 240, np.uint8), 0.5)
    with pytest.raises(InputError, match="nothing that looks like a nucleus"):
        train_student([blank], dataclasses.replace(TINY, steps=1))


def test_labels_need_the_agreement_of_both_or_a_good_shape() -> None:
    rows, columns = np.mgrid[:120, :160]

    def disk(y: int, x: int, radius: int) -> np.ndarray:
        return np.hypot(rows - y, columns - x) <= radius

    def maps_of(*disks: tuple[int, int, int]) -> np.ndarray:
        depth = np.max([np.clip(1 - np.hypot(rows - y, columns - x) / r, 0, 1) for y, x, r in disks], axis=0)
        return np.stack([np.where(depth > 0, 0.7, 0.02), depth]).astype(np.float32)

    both, seen_alone, stained_alone = (30, 30, 9), (30, 80, 9), (80, 30, 9)
    stained = np.zeros((120, 160), np.int32)
    stained[disk(*both)], stained[disk(*stained_alone)] = 1, 2
    stained[70:73, 60:150] = 3  # no nucleus has this shape
    stained[70:110, 60:63] = 3
    image = np.full((120, 160, 3), 230, np.uint8)
    for spot in (both, seen_alone, stained_alone):
        image[disk(*spot)] = (90, 60, 140)
    labels, trust = agree_on_labels(image, stained, maps_of(both, seen_alone), 0.5, TrustSettings(sure=0.8))
    assert labels[30, 30] > 0
    assert labels[80, 30] > 0
    assert labels[30, 80] == labels[71, 100] == 0
    assert trust[30, 80] == trust[71, 100] == 0
    assert trust[5, 150] == trust[30, 30] == 1
    labels, _ = agree_on_labels(image, stained, maps_of(both, seen_alone), 0.5, TrustSettings(sure=0.5))
    assert labels[30, 80] > 0
    image[disk(*seen_alone)] = 228  # what the student sees there has no stain
    labels, trust = agree_on_labels(image, stained, maps_of(both, seen_alone), 0.5, TrustSettings(sure=0.5))
    assert labels[30, 80] == 0
    assert trust[30, 80] == 0.5


def test_maps_do_not_depend_on_how_the_image_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = StudentPredictor(small_net(), precision="fp32")
    image = np.random.default_rng(0).integers(0, 256, (150, 203, 3)).astype(np.uint8)
    whole = predictor.predict_maps(image)
    assert whole.shape == (2, 150, 203)
    monkeypatch.setattr("wsi_engine.nuclei.student_inference.STRIP", 48)
    assert np.abs(predictor.predict_maps(image) - whole).max() < 1e-5


def test_views_are_turned_back() -> None:
    """A network that knows no direction gives the same maps in every view."""
    net = small_net()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
                module.weight.copy_(module.weight.mean((2, 3), keepdim=True).expand_as(module.weight))
    image = np.random.default_rng(1).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    one, eight = (StudentPredictor(net, precision="fp32", views=views).predict_maps(image) for views in (1, 8))
    assert np.abs(one - eight).max() < 1e-4
    with pytest.raises(SettingsError, match="views"):
        StudentPredictor(net, views=9)


def test_nuclei_are_split_where_the_depth_descends() -> None:
    rows, columns = np.mgrid[:60, :90]
    depth = np.maximum(1 - np.hypot(rows - 30, columns - 30) / 14, 0.9 - np.hypot(rows - 30, columns - 52) / 14).clip(0)
    maps = np.stack([(depth > 0).astype(np.float32), depth.astype(np.float32)])
    assert split_nuclei(maps, 0.5).max() == 2
    assert split_nuclei(maps, 0.5, SplitSettings(rise=0.9)).max() == 1
    assert split_nuclei(maps, 0.5, SplitSettings(least_area_um2=1000)).max() == 0
    assert split_nuclei(np.zeros_like(maps), 0.5).max() == 0
    with pytest.raises(SettingsError, match="threshold"):
        SplitSettings(threshold=2)


def test_sources_are_read_without_their_labels(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (128, 160, 3)).astype(np.uint8)
    for name in ("a.png", "a_label.png", "b.png", "b_foreground.png"):
        Image.fromarray(picture).save(tmp_path / name)
    pieces = read_source(f"{tmp_path}@0.25*2")
    assert len(pieces) == 2
    assert pieces[0].pixels.shape == (64, 80, 3)
    assert pieces[0].weight == pytest.approx(2 * 64 * 80 / 1e6)
    with pytest.raises(InputError, match="check the path"):
        read_source(str(tmp_path / "c.png"))
    with pytest.raises(InputError, match="numbers"):
        read_source(f"{tmp_path}@fine")


def test_training_goes_on_from_a_finished_stage_to_the_same_weights() -> None:
    field = paint_field(1, 2)
    image = TrainingImage(np.ascontiguousarray(field.planes[:3].transpose(1, 2, 0)), 0.5)
    turn = Round(3, 1e-3, TrustSettings(least_seen=0.2), collages=1)
    settings = dataclasses.replace(TINY, steps=4, rounds=(turn, turn))
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def keep(stage: int, net: NucleiNet) -> None:
        kept[stage] = {name: one.clone() for name, one in net.state_dict().items()}

    whole = train_student([image], settings, after_stage=keep)
    assert list(kept) == [0, 1, 2]
    first = NucleiNet(NucleiNetSettings(TINY.widths))
    first.load_state_dict(kept[1])
    resumed = train_student([image], settings, done=(1, first))
    for name, one in whole.state_dict().items():
        if one.is_floating_point():
            assert torch.equal(one, resumed.state_dict()[name])
            assert torch.equal(one, one.half().float())
