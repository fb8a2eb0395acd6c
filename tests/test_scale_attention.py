"""Scale attention: the network against the reference's numbers, its losses against plain loops, and its windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from wsi_engine.models.scale_attention import (
    SCALES_MPP,
    ScaleAttention,
    ScaleAttentionError,
    ScaleAttentionSettings,
    ScaleClassifier,
    normalise_pixels,
    sharpen,
    threshold_of,
)
from wsi_engine.models.scale_files import load_scale_attention, save_scale_attention
from wsi_engine.models.scale_inference import attend_views, attend_windows, context_margin
from wsi_engine.models.scale_losses import (
    SYMMETRIES,
    apply_symmetries,
    apply_symmetry,
    halve,
    rigid_loss,
    scale_equivariance_loss,
    scale_loss,
    smoothness_loss,
    still_statistics,
    undo_symmetries,
    undo_symmetry,
)

SMALL = ScaleAttentionSettings(width=4, dilations=(1, 2), sharpness=5)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def trained(settings: ScaleAttentionSettings = SMALL) -> ScaleAttention:
    """A network with the statistics of a batch, in eval mode."""
    network = ScaleAttention(settings, seed=3)
    with torch.no_grad():
        for k in range(4):
            network(draw(2, 3, 48, 48, seed=k))
    return network.eval()


def plain_threshold(logits: NDArray[np.float32], share: float) -> float:
    rows = [sorted(image.ravel().tolist(), reverse=True) for image in logits]
    return float(np.mean([row[int(share * len(row))] for row in rows]))


def test_the_network_gives_the_numbers_of_the_reference(shared_data: Path) -> None:
    golden = np.load(shared_data.parent / "golden" / "attention_net.npz")
    network = ScaleAttention()
    state = {name[6:]: torch.from_numpy(golden[name]) for name in golden if name.startswith("param/")}
    network.attention_net.load_state_dict(state)
    network.eval()
    with torch.no_grad():
        logits = network.attention_net(torch.from_numpy(golden["in/images"]))
        tau = threshold_of(logits, 0.07)
        attention = network.attend(torch.from_numpy(golden["in/images"]), tau)
    assert np.abs(logits.numpy() - golden["out/logits"]).max() < 1e-4
    assert abs(float(tau) - float(golden["out/tau"])) < 1e-6
    assert np.abs(attention.numpy() - golden["out/attention"]).max() < 1e-4


def test_the_paper_s_network_has_its_size() -> None:
    network = ScaleAttention(seed=0)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(446_000, rel=0.005)
    assert network.settings.receptive_field == 167
    names = set(network.attention_net.state_dict())
    assert {"0.main.0.weight", "6.res.4.running_var", "7.bias"} <= names


def test_tau_is_the_mean_of_each_picture_s_quantile() -> None:
    logits = draw(3, 1, 17, 23)
    for share in (0.07, 0.5, 0.001):
        assert float(threshold_of(logits, share)) == pytest.approx(plain_threshold(logits.numpy(), share), abs=1e-6)


def test_about_the_share_of_pixels_is_above_one_half() -> None:
    logits = draw(1, 1, 60, 60)
    attention = sharpen(logits, threshold_of(logits, 0.07), 20)
    assert int((attention > 0.5).sum()) == int(0.07 * 3600)
    assert float(sharpen(torch.tensor(0.3), 0.3, 20)) == 0.5


def test_the_running_tau_starts_at_the_first_batch_and_keeps_nine_tenths() -> None:
    network = ScaleAttention(SMALL, seed=1)
    with pytest.raises(ScaleAttentionError, match="never trained"):
        network.eval()(draw(1, 3, 16, 16))
    network.train()
    first = network(draw(2, 3, 16, 16)).tau
    assert float(network.tau) == float(first)
    second = network(draw(2, 3, 16, 16, seed=5)).tau
    assert float(network.tau) == pytest.approx(0.9 * float(first) + 0.1 * float(second), abs=1e-6)
    running = float(network.tau)
    assert float(network.eval()(draw(1, 3, 16, 16)).tau) == running


def test_tau_carries_no_gradient_and_attention_does() -> None:
    network = ScaleAttention(SMALL, seed=1)
    maps = network(draw(2, 3, 16, 16))
    assert not maps.tau.requires_grad
    maps.attention.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_the_classifier_sees_the_picture_through_its_attention() -> None:
    classifier = ScaleClassifier(seed=0).eval()
    images = draw(2, 3, 64, 64)
    with torch.no_grad():
        seen = classifier(images, torch.ones(2, 1, 64, 64))
        hidden = classifier(images, torch.zeros(2, 1, 64, 64))
    assert seen.shape == (2, len(SCALES_MPP))
    assert not torch.allclose(seen[0], seen[1])
    assert torch.allclose(hidden[0], hidden[1])  # nothing is left to tell the two apart by
    again = ScaleClassifier(seed=0)
    assert all(torch.equal(a, b) for a, b in zip(classifier.parameters(), again.parameters(), strict=True))


def test_the_scale_loss_is_the_cross_entropy() -> None:
    logits, scales = draw(5, 3), torch.tensor([0, 2, 1, 1, 0])
    rows = logits.double().numpy()
    plain = np.mean([np.log(np.exp(row).sum()) - row[k] for row, k in zip(rows, scales.tolist(), strict=True)])
    assert float(scale_loss(logits, scales)) == pytest.approx(plain, abs=1e-6)


def test_smoothness_is_the_mean_step_along_both_axes() -> None:
    attention = draw(2, 1, 5, 7)
    a = attention.numpy()[:, 0]
    across = [abs(a[b, y, x + 1] - a[b, y, x]) for b in range(2) for y in range(5) for x in range(6)]
    down = [abs(a[b, y + 1, x] - a[b, y, x]) for b in range(2) for y in range(4) for x in range(7)]
    assert float(smoothness_loss(attention)) == pytest.approx(np.mean(across) + np.mean(down), abs=1e-6)
    assert float(smoothness_loss(torch.ones(1, 1, 4, 4))) == 0


def test_the_eight_symmetries_differ_and_are_undone_exactly() -> None:
    image = draw(1, 2, 6, 6)
    views = [apply_symmetry(image, k) for k in range(SYMMETRIES)]
    assert torch.equal(views[0], image)
    for k, view in enumerate(views):
        assert torch.equal(undo_symmetry(view, k), image)
        assert not any(torch.equal(view, other) for other in views[:k])
    wide = draw(1, 1, 4, 9)
    assert all(torch.equal(undo_symmetry(apply_symmetry(wide, k), k), wide) for k in range(SYMMETRIES))
    batch, chosen = draw(8, 1, 5, 5), list(range(SYMMETRIES))
    assert torch.equal(undo_symmetries(apply_symmetries(batch, chosen), chosen), batch)
    assert torch.equal(apply_symmetries(batch, chosen)[6], apply_symmetry(batch[6:7], 6)[0])


def test_the_rigid_loss_is_zero_for_an_equivariant_map_and_spares_its_target() -> None:
    images, chosen = draw(4, 1, 8, 8), [1, 3, 4, 7]
    returned = undo_symmetries(torch.sigmoid(apply_symmetries(images, chosen)), chosen)
    assert float(rigid_loss(torch.sigmoid(images), returned)) == 0
    a, b = draw(2, 1, 4, 4).requires_grad_(), draw(2, 1, 4, 4, seed=1).requires_grad_()
    loss = rigid_loss(a, b)
    assert float(loss.detach()) == pytest.approx(float(((a - b) ** 2).mean().detach()), abs=1e-6)
    loss.backward()
    assert a.grad is not None
    assert b.grad is None


def test_scale_equivariance_counts_the_two_finer_scales_by_class() -> None:
    attention, small = draw(5, 1, 8, 6).requires_grad_(), draw(5, 1, 4, 3, seed=2).requires_grad_()
    scales = torch.tensor([0, 1, 1, 2, 0])
    halved = attention.detach().reshape(5, 4, 2, 3, 2).mean(dim=(2, 4)).numpy()
    errors = ((halved - small.detach().numpy()[:, 0]) ** 2).mean(axis=(1, 2))
    plain = (errors[[0, 4]].mean() + errors[[1, 2]].mean()) / 2
    loss = scale_equivariance_loss(attention, small, scales)
    assert float(loss.detach()) == pytest.approx(plain, abs=1e-6)
    loss.backward()
    assert small.grad is None
    assert attention.grad is not None
    assert not attention.grad[3].any()
    assert float(scale_equivariance_loss(attention.detach(), small, torch.tensor([2] * 5))) == 0


def test_halving_is_bilinear() -> None:
    images = draw(1, 3, 10, 8)
    assert torch.allclose(halve(images), interpolate(images, scale_factor=0.5, mode="bilinear"), atol=1e-6)


def test_target_passes_leave_running_statistics_alone() -> None:
    network = ScaleAttention(SMALL, seed=1)
    network(draw(2, 3, 16, 16))
    norm = network.attention_net[0].main[1]
    before = norm.running_mean.clone()
    with still_statistics(network), torch.no_grad():
        still = network.attend(draw(2, 3, 16, 16, seed=9), 0.0)
    assert torch.equal(norm.running_mean, before)
    assert torch.equal(still, network.attend(draw(2, 3, 16, 16, seed=9), 0.0))  # by the batch's own statistics
    assert not torch.equal(norm.running_mean, before)


def test_pixels_beyond_the_receptive_field_do_not_matter() -> None:
    network = ScaleAttention(seed=2)
    network(draw(1, 3, 32, 32))
    network.eval()
    reach = network.settings.reach
    assert reach == 83
    side = 2 * reach + 5
    image, centre = draw(1, 3, side, side), side // 2
    with torch.no_grad():
        before = network.attention_net(image)[0, 0, centre, centre]
        for distance, matters in ((reach, True), (reach + 1, False)):
            changed = image.clone()
            changed[..., centre + distance, centre + distance] += 1000
            after = network.attention_net(changed)[0, 0, centre, centre]
            assert (after != before).item() is matters


@pytest.mark.parametrize("views", [1, 2, 8])
def test_windows_give_the_attention_of_the_whole_picture(views: int) -> None:
    network = trained()
    picture = draw(1, 3, 131, 173, seed=7)
    whole = attend_views(network, picture, views)[0, 0]
    for window in (32, 50, 400):
        put = torch.full((131, 173), float("nan"))

        def keep(top: int, left: int, part: Tensor, put: Tensor = put) -> None:
            put[top : top + part.shape[0], left : left + part.shape[1]] = part

        attend_windows(lambda y, x, h, w: picture[..., y : y + h, x : x + w], network, (131, 173), keep, window, views)
        assert float((put - whole).abs().max()) < 1e-5


def test_margins_below_the_reach_would_show() -> None:
    network = trained()
    picture = draw(1, 3, 80, 80)
    margin = context_margin(SMALL, 1)
    assert SMALL.reach <= margin <= SMALL.reach + 1
    whole, cut = attend_views(network, picture, 1), attend_views(network, picture[..., :, 20:], 1)
    differs = ((whole[..., :, 20:] - cut).abs() > 1e-6)[0, 0].any(dim=0)
    assert int(differs.nonzero().max()) == SMALL.reach - 1
    assert context_margin(ScaleAttentionSettings(), 2) >= 2 * ScaleAttentionSettings().receptive_field // 2 + 1


def test_the_mean_over_views_is_that_of_its_parts() -> None:
    network, image = trained(), draw(1, 3, 20, 26)
    plain = attend_views(network, image, 1)
    assert torch.equal(plain, network.attend(image))
    half = interpolate(network.attend(halve(image)), scale_factor=2, mode="bilinear")
    assert torch.allclose(attend_views(network, image, 2), (plain + half) / 2, atol=1e-6)
    flipped = network.attend(image.flip(-1)).flip(-1)
    other = network.attend(image.flip(-2)).flip(-2)
    three = attend_views(network, image, 3)
    assert any(torch.allclose(three, (plain + half + one) / 3, atol=1e-6) for one in (flipped, other))
    assert attend_views(network, image, 8).shape == (1, 1, 20, 26)
    with torch.no_grad():
        own = threshold_of(network.attention_net(image), 0.07)
    above = attend_views(network, image, 1, own) > 0.5
    assert int(above.sum()) == int(0.07 * 20 * 26)
    assert float(attend_views(network, image, 8, 1e6).max()) == 0  # all views judge by the threshold given
    assert attend_views(network, draw(2, 3, 21, 15), 8).shape == (2, 1, 21, 15)


def test_a_file_gives_the_network_back(tmp_path: Path) -> None:
    network = trained()
    path = tmp_path / "attention.safetensors"
    save_scale_attention(network, path, {"licence": "CC0"})
    loaded, card = load_scale_attention(path)
    assert card["licence"] == "CC0"
    assert loaded.settings == SMALL
    assert torch.equal(loaded.attend(draw(1, 3, 16, 16)), network.attend(draw(1, 3, 16, 16)))
    save_scale_attention(loaded, tmp_path / "again", {"licence": "CC0"})
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    from wsi_engine.models import create_head, save_head

    save_head(create_head("mean", in_dim=8, n_classes=2), tmp_path / "head.safetensors")
    with pytest.raises(ScaleAttentionError, match="no card of a scale-attention network"):
        load_scale_attention(tmp_path / "head.safetensors")
    with pytest.raises(ScaleAttentionError, match="there is no file"):
        load_scale_attention(tmp_path / "nothing")
    (tmp_path / "text").write_text("weights")
    with pytest.raises(ScaleAttentionError, match="cannot be read"):
        load_scale_attention(tmp_path / "text")


@pytest.mark.parametrize(
    "options", [{"width": 0}, {"dilations": ()}, {"dilations": (1, 0)}, {"sharpness": 0}, {"share": 1.0}]
)
def test_settings_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(ScaleAttentionError):
        ScaleAttentionSettings(**options)  # type: ignore[arg-type]


def test_wrong_calls_are_answered() -> None:
    network = trained()
    for views in (0, 9, True):
        with pytest.raises(ScaleAttentionError, match="views"):
            attend_views(network, draw(1, 3, 8, 8), views)
    with pytest.raises(ScaleAttentionError, match="training mode"):
        attend_views(ScaleAttention(SMALL), draw(1, 3, 8, 8), 1)
    with pytest.raises(ScaleAttentionError, match="even"):
        attend_windows(lambda y, x, h, w: draw(1, 3, h, w), network, (8, 8), lambda y, x, a: None, 7)
    with pytest.raises(ScaleAttentionError, match="uint8"):
        normalise_pixels(torch.zeros(1, 8, 8, 3))
    with pytest.raises(ScaleAttentionError, match="never trained"):
        save_scale_attention(ScaleAttention(SMALL), "nowhere")


def test_pixels_are_normalised_channel_by_channel() -> None:
    pixels = torch.tensor([[[[255, 0, 128]]]], dtype=torch.uint8)
    wanted = [(1 - 0.485) / 0.229, -0.456 / 0.224, (128 / 255 - 0.406) / 0.225]
    assert torch.allclose(normalise_pixels(pixels)[0, :, 0, 0], torch.tensor(wanted), atol=1e-6)
