"""Methods on one picture: the baseline against its parts, the built-in student against the baseline, scales, errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.data import immunohistochemistry
from skimage.filters import threshold_local, threshold_otsu

from wsi_engine.errors import ModelError, ScaleError, SettingsError
from wsi_engine.kernels import measure_regions, nuclei_from_attention
from wsi_engine.metrics.nuclei import aji, panoptic_quality
from wsi_engine.models.nuclei_net import NucleiNet, NucleiNetSettings, load_nuclei_net, save_nuclei_net
from wsi_engine.nuclei.images import resample_image, resample_labels
from wsi_engine.nuclei.method import NucleiMethod, create_method
from wsi_engine.nuclei.segmentation import segment_nuclei
from wsi_engine.nuclei.stain import StainSettings, segment_by_stain
from wsi_engine.nuclei.student_method import BUILTIN_WEIGHTS, StudentMethod
from wsi_engine.synthetic import SlideSpec, SyntheticSlide

METHODS = ("student", "stain")
"""Those that need no training first."""

Pixels = np.ndarray
Labels = np.ndarray


@cache
def load(name: str) -> NucleiMethod:
    return create_method(name, device="cpu")


def find(image: Pixels, mpp: float, method: str = "student") -> Labels:
    """Nuclei of a picture as a label image."""
    return segment_nuclei(image, load(method), mpp, tissue=None, allow_dark=True).labels()


@pytest.fixture(scope="module")
def tissue() -> tuple[Pixels, Labels]:
    """A painted slide's corner at 0.25 µm per pixel and its truth."""
    slide = SyntheticSlide(SlideSpec(width=1600, height=1200, mpp=0.25, coverage=1, seed=4))
    return slide.paint(500, 300, 640, 512), slide.truth.labels(500, 300, 640, 512)


def test_the_baseline_equals_scikit_image(tissue: tuple[Pixels, Labels]) -> None:
    image = tissue[0]
    stain = ndimage.gaussian_filter(rgb2hed(image)[..., 0].astype(np.float32), 1.0)
    mask = (stain > threshold_local(stain, 151)) & (stain > 0.9 * threshold_otsu(stain))
    expected = nuclei_from_attention(mask, fill=True, min_area=60)
    ours = segment_by_stain(image)
    assert ours.max() > 10
    assert ((ours > 0) == (expected > 0)).mean() > 0.999
    assert panoptic_quality(expected, ours)[2] > 0.97


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_painted_nuclei(tissue: tuple[Pixels, Labels], method: str) -> None:
    image, truth = tissue
    found = find(image, 0.25, method)
    assert found.dtype == np.int32
    assert found.shape == truth.shape
    assert np.array_equal(np.unique(found), np.arange(found.max() + 1))
    assert aji(truth, found) > 0.5


@pytest.mark.parametrize("method", METHODS)
def test_results_repeat_bit_for_bit(tissue: tuple[Pixels, Labels], method: str) -> None:
    image = tissue[0][:256, :256]
    assert np.array_equal(find(image, 0.25, method), find(image, 0.25, method))


def test_the_student_splits_and_outlines_better_than_the_baseline(tissue: tuple[Pixels, Labels]) -> None:
    image, truth = tissue
    student, stain = (panoptic_quality(truth, find(image, 0.25, method))[2] for method in ("student", "stain"))
    assert student > stain


def test_nuclei_under_another_stain_have_their_usual_shape_and_size() -> None:
    """On real tissue with a blue counterstain and brown cytoplasm."""
    table = measure_regions(find(immunohistochemistry(), 0.5))
    assert 150 < len(table) < 1500
    assert np.median(table.solidity) > 0.88
    assert 10 < np.median(table.area) * 0.25 < 80


@pytest.mark.parametrize("mpp", [0.25, 0.33, 0.5, 0.7])
def test_nuclei_are_the_same_at_every_scale(mpp: float) -> None:
    slide = SyntheticSlide(SlideSpec(width=2400, height=1800, mpp=0.25, coverage=1, seed=4))
    image, truth = slide.paint(500, 300, 800, 640), slide.truth.labels(500, 300, 800, 640)
    scaled = resample_image(image, 0.25, mpp)
    found = find(scaled, mpp)
    assert found.shape == scaled.shape[:2]
    assert aji(resample_labels(truth, *found.shape), found) > 0.45


def test_labels_change_size_by_their_centres() -> None:
    labels = np.zeros((8, 12), np.int32)
    labels[:4, :6], labels[4:, 6:], labels[0, 11] = 1, 2, 3
    small = resample_labels(labels, 4, 6)
    assert np.array_equal(small, np.kron([[1, 0], [0, 2]], np.ones((2, 3), int)))
    large = resample_labels(labels, 16, 24)
    assert np.array_equal(large, np.kron(labels, np.ones((2, 2), int)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0, 128, 243, 255])
def test_one_colour_holds_no_nucleus(method: str, value: int) -> None:
    assert not find(np.full((160, 130, 3), value, np.uint8), 0.25, method).any()


def blank(height: int, width: int) -> Pixels:
    return np.full((height, width, 3), 200, np.uint8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: segment_nuclei(blank(99, 99), "magic", 0.25), SettingsError, "student, stain"),
        (lambda: segment_nuclei(blank(99, 99).astype(float), "stain", 0.25), SettingsError, "pass uint8"),
        (lambda: segment_nuclei(blank(99, 99), "stain"), ScaleError, "--slide-mpp"),
        (lambda: segment_nuclei(blank(99, 99), "stain", 25), ScaleError, "check the scale"),
        (lambda: segment_nuclei(blank(99, 99), "stain", 0.05), ScaleError, "finer than any slide scanner"),
        (lambda: segment_nuclei(blank(99, 99), "stain", float("nan")), SettingsError, "must be positive"),
        (lambda: segment_nuclei(blank(40, 300), "student", 0.25), SettingsError, "give a larger picture"),
        (lambda: segment_nuclei(blank(20, 300), "stain", 0.25), SettingsError, "give a larger picture"),
        (lambda: resample_image(blank(40, 300), 0.25, 0.5), SettingsError, "give a larger image"),
        (lambda: segment_nuclei(blank(99, 99), mpp=0.25, weights="nowhere"), ModelError, "check the path"),
        (lambda: segment_nuclei(blank(99, 99), "stain", 0.25, weights="nowhere"), SettingsError, "has no weights"),
        (lambda: StainSettings(window=150), SettingsError, "odd"),
        (lambda: StainSettings(sigma=-1), SettingsError, "sigma"),
    ],
)
def test_what_cannot_be_is_answered_in_one_sentence(
    call: Callable[[], object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert not str(caught.value).endswith(".")


def test_weights_of_the_users_own_are_used(tmp_path: Path, tissue: tuple[Pixels, Labels]) -> None:
    net = NucleiNet(NucleiNetSettings((4, 4)))
    for name, bias in (("none", -50.0), ("all", 50.0)):
        with torch.no_grad():
            net.head.weight.zero_()
            net.head.bias[:] = torch.tensor([bias, 0.5])
        save_nuclei_net(net, tmp_path / f"{name}.safetensors", 0.5)
    image = tissue[0][:128, :128]
    none, everywhere = (segment_nuclei(image, tmp_path / f"{name}.safetensors", 0.25) for name in ("none", "all"))
    assert len(none) == 0
    assert len(everywhere) == 1
    assert (everywhere.labels() > 0).mean() > 0.95  # all but its corners


def test_the_built_in_weights_are_small_documented_and_free() -> None:
    assert BUILTIN_WEIGHTS.stat().st_size < 8_000_000
    _, card = load_nuclei_net(BUILTIN_WEIGHTS)
    assert card["mpp"] == StudentMethod(device="cpu").mpp == 0.5
    assert card["licence"] == "Apache-2.0"
    text = BUILTIN_WEIGHTS.with_suffix(".md").read_text(encoding="utf-8")
    for word in ("Licence", "Data", "Recipe", "seed", "AJI", "without labels"):
        assert word in text


@pytest.mark.parametrize("folder", ["monuseg_train", "dsb2018_he", "nucls"])
def test_the_student_beats_the_baseline_on_real_nuclei(shared_data: Path, folder: str) -> None:
    """Means over a few pictures, of which at most 512 × 512 pixels each are looked at."""
    gains = []
    for path in sorted((shared_data / "nuclei" / folder).glob("*_label.png"))[::3][:5]:
        image = np.asarray(Image.open(path.with_name(path.name.replace("_label", ""))).convert("RGB"))[:512, :512]
        truth = np.asarray(Image.open(path)).astype(np.int32)[:512, :512]
        student, stain = (aji(truth, find(image, 0.25, method)) for method in ("student", "stain"))
        gains.append(student - stain)
    assert len(gains) == 5
    assert np.mean(gains) > 0.03
