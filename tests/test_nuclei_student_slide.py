"""The methods with networks on slides: the student, scale attention, and which method a file of weights belongs to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from wsi_engine import errors
from wsi_engine.kernels import nuclei_from_attention, set_thread_count
from wsi_engine.metrics import aji
from wsi_engine.models.nuclei_net import NucleiNet, NucleiNetSettings, save_nuclei_net
from wsi_engine.models.scale_attention import ScaleAttention, ScaleAttentionSettings, normalise_pixels
from wsi_engine.models.scale_files import save_scale_attention
from wsi_engine.nuclei.images import segment_image
from wsi_engine.nuclei.instances import InstanceSet
from wsi_engine.nuclei.method import LARGEST_HOLE_UM2, METHOD_HOMES, NucleiMethod, create_method
from wsi_engine.nuclei.scale_method import ScaleMethod
from wsi_engine.nuclei.segmentation import segment_nuclei
from wsi_engine.nuclei.stain_method import StainMethod
from wsi_engine.nuclei.student_inference import StudentPredictor, enlarge_maps
from wsi_engine.nuclei.student_method import FittedStudent, StudentMethod, average_views, view_maps
from wsi_engine.slide import open_slide
from wsi_engine.synthetic import SlideSpec, SyntheticSlide
from wsi_engine.tissue import TissueMask

Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def picture() -> Pixels:
    """Dense tissue, 1400 × 1200 at 0.25 µm: four windows of the student."""
    return SyntheticSlide(SlideSpec(width=1400, height=1200, coverage=1, seed=4)).paint(0, 0, 1400, 1200)


@pytest.fixture(scope="module")
def student() -> StudentMethod:
    return StudentMethod(device="cpu")


@pytest.fixture(scope="module")
def whole(picture: Pixels, student: StudentMethod) -> InstanceSet:
    return segment_nuclei(picture, student, 0.25)


@pytest.fixture(scope="module")
def scale_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scale attention with a small network that looks for dark pixels."""
    network = ScaleAttention(ScaleAttentionSettings(width=4, dilations=(1, 2)), seed=3).eval()
    net = network.attention_net
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.mul_(0.02 if ".res." in name else 0.0)
        stem = net[0].main
        stem[0].weight[0, 0], stem[1].weight[0] = -1 / 9, 1.0  # dark in red, over 3 × 3 pixels
        net[-1].weight[0, 0] = 1.0
        network.tau.fill_(0.25)
    path = tmp_path_factory.mktemp("weights") / "attention.safetensors"
    save_scale_attention(network, path)
    return path


def assert_same(ours: InstanceSet, theirs: InstanceSet) -> None:
    assert np.array_equal(ours.offsets, theirs.offsets)
    assert np.array_equal(ours.points, theirs.points)
    for name, values in theirs.table().items():
        assert np.array_equal(ours.table()[name], values), name


@pytest.mark.parametrize(("tile_px", "threads"), [(512, 1), (2048, 2)])
def test_tiles_and_threads_do_not_change_the_students_nuclei(
    picture: Pixels, student: StudentMethod, whole: InstanceSet, tile_px: int, threads: int
) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        set_thread_count(threads)
        assert_same(segment_nuclei(picture, student, 0.25, tile_px=tile_px, workers=threads), whole)
    finally:
        torch.set_num_threads(before)
        set_thread_count(None)
    assert len(whole) > 300


def test_the_student_finds_what_it_finds_in_an_image(picture: Pixels, student: StudentMethod) -> None:
    part = picture[:640, :704]  # one window
    ours, image = segment_nuclei(part, student, 0.25).labels(), segment_image(part, 0.25, student)
    assert aji(image, ours) > 0.97
    assert abs(int(ours.max()) - int(image.max())) <= 0.02 * image.max()


def test_the_student_finds_most_true_nuclei(picture: Pixels, whole: InstanceSet) -> None:
    truth = SyntheticSlide(SlideSpec(width=1400, height=1200, coverage=1, seed=4)).truth.labels(0, 0, 1400, 1200)
    assert aji(truth, whole.labels()) > 0.55
    assert whole.record.method_mpp == 0.25
    assert whole.record.method == "student"
    assert whole.record.fitted["device"] == "cpu"


def test_real_images_come_out_as_by_the_image_alone(shared_data: Path, student: StudentMethod) -> None:
    images = [path for path in sorted((shared_data / "nuclei" / "nucls").glob("*.png")) if "_label" not in path.stem]
    agreement = []
    for path in images[:3]:
        image = np.asarray(Image.open(path).convert("RGB"))
        agreement.append(aji(segment_image(image, 0.25, student), segment_nuclei(image, student, 0.25).labels()))
    assert min(agreement) > 0.9


def test_a_real_slide_is_the_same_whatever_the_tiles(shared_data: Path, student: StudentMethod) -> None:
    tissue = np.zeros((186, 139), bool)
    tissue[50:80, 40:70] = True
    with open_slide(shared_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        found = [segment_nuclei(slide, student, tile_px=t, tissue=TissueMask(tissue, 8.0)) for t in (512, 1024)]
    assert_same(*found)
    assert len(found[0]) > 50


def test_windows_give_what_the_whole_gives(picture: Pixels, student: StudentMethod) -> None:
    side, margin = student.window_px, student.margin_px
    assert side is not None
    pixels, fitted = picture[: side + 64, :side], student.fit([])
    padded = np.pad(pixels, ((margin, margin + side - 64), (margin, margin), (0, 0)), mode="symmetric")
    plain = StudentMethod(device="cpu", precision="fp32", views=1)
    assert margin > plain.predictor.reach
    assert margin % plain.predictor.stride == 0
    expected = enlarge_maps(plain.predictor.predict_maps(pixels), 2 * len(pixels), 2 * side)
    for top, height in ((0, side), (side, 64)):
        window = padded[top : top + side + 2 * margin][None]
        inner = slice(2, 2 * height - 2), slice(2, -2)  # the picture's edge is interpolated otherwise
        part = expected[:, 2 * top : 2 * (top + height)][:, *inner]
        assert np.abs(plain.fit([]).foreground(window)[0][:, *inner] - part).max() < 1e-4
        assert np.abs(fitted.foreground(window)[0][:, *inner] - part).mean() < 0.02


def test_views_are_averaged_as_in_the_predictor(student: StudentMethod, picture: Pixels) -> None:
    network = NucleiNet(NucleiNetSettings((4, 8)))
    predictor = StudentPredictor(network, precision="fp32", views=8)
    pixels = torch.from_numpy(picture[:64, :64].copy()).permute(2, 0, 1)[None]
    joined = torch.cat([pixels, 255 - pixels])
    both = average_views([view_maps(predictor, joined, view) for view in range(8)])
    expected = predictor.predict_maps(picture[:64, :64])
    reach = predictor.reach
    inner = (slice(reach, -reach), slice(reach, -reach))
    assert np.allclose(both[0].numpy()[:, *inner], expected[:, *inner], atol=1e-5)
    assert not np.allclose(both[1].numpy(), both[0].numpy(), atol=1e-3)


def ring(outer: float, inner: float, side: int = 200) -> NDArray[np.float32]:
    """Maps of a ring around the middle, radii in pixels."""
    rows, columns = np.mgrid[:side, :side] - side / 2
    radius = np.hypot(rows, columns)
    inside = (radius < outer) & (radius > inner)
    return np.stack([np.where(inside, 0.95, 0), np.where(inside, 1, 0)]).astype(np.float32)


def test_small_holes_are_filled_and_lumens_are_not(student: StudentMethod) -> None:
    fitted = FittedStudent(student)
    small = ring(20, 3)
    filled = fitted.split(small, small[0] > 0.5)
    assert filled[100, 100] > 0
    wide = ring(60, 40)
    assert np.pi * 40**2 * student.fine_mpp**2 > LARGEST_HOLE_UM2
    found = fitted.split(wide, wide[0] > 0.5)
    assert np.array_equal(found > 0, wide[0] > 0.5)


def test_scale_attention_gives_the_papers_chain(scale_file: Path, picture: Pixels) -> None:
    method = ScaleMethod(scale_file, device="cpu", precision="fp32")
    assert isinstance(method, NucleiMethod)
    part = picture[:300, :420]
    margin = method.margin_px
    found = segment_nuclei(part, method, 0.25)
    padded = np.pad(part, ((margin, margin), (margin, margin), (0, 0)), mode="symmetric")
    with torch.inference_mode():
        attention = method.network.attend(normalise_pixels(torch.from_numpy(padded)[None]))[0, 0]
    expected = nuclei_from_attention(attention.numpy()[margin:-margin, margin:-margin])
    assert expected.max() > 20
    filled = found.labels()  # holes are filled in a label image of outlines
    assert ((filled > 0) >= (expected > 0)).mean() > 0.999
    assert aji(expected, filled) > 0.9


def test_scale_attention_does_not_depend_on_tiles(scale_file: Path, picture: Pixels) -> None:
    method = ScaleMethod(scale_file, device="cpu", views=3)
    found = [segment_nuclei(picture[:600, :700], method, 0.25, tile_px=tile_px) for tile_px in (512, 1024)]
    assert len(found[0]) > 20
    assert_same(*found)


def test_methods_are_known_by_name_and_by_their_weights(scale_file: Path, tmp_path: Path) -> None:
    assert isinstance(create_method("builtin"), StudentMethod)
    assert isinstance(create_method("stain"), StainMethod)
    own = tmp_path / "own.safetensors"
    save_nuclei_net(NucleiNet(NucleiNetSettings((4, 8))), own, 0.5)
    assert isinstance(create_method(own), StudentMethod)
    assert isinstance(create_method("builtin", own), StudentMethod)
    assert isinstance(create_method(str(scale_file)), ScaleMethod)
    assert create_method(own).to_json() != create_method("student").to_json()
    for name in METHOD_HOMES:
        method = create_method(name, scale_file if name == "scale-attention" else None)
        assert isinstance(method, NucleiMethod)
        assert method.name == name


@pytest.mark.parametrize(
    ("model", "weights", "words"),
    [
        ("scale-attention", None, "no built-in weights"),
        ("student", "scale", "no card of a nuclei network"),
        ("scale-attention", "student", "no card of a scale-attention network"),
        ("builtin", "missing.safetensors", "there is no file of weights"),
        ("missing.safetensors", None, "there is no file of weights"),
        ("builtin", "text", "cannot be read as safetensors"),
        ("builtin", "other", "weights of another model"),
    ],
)
def test_weights_of_another_model_are_refused(
    model: str, weights: str | None, words: str, scale_file: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "other")
    (tmp_path / "text").write_text("no weights")
    save_nuclei_net(NucleiNet(NucleiNetSettings((4, 8))), tmp_path / "student", 0.5)
    places = {"scale": scale_file, **{name: tmp_path / name for name in ("other", "text", "student")}}
    with pytest.raises(errors.ModelError, match=words) as caught:
        create_method(model, None if weights is None else places.get(weights, Path(weights)))
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(errors.EncoderError, match="not available"):
        StudentMethod(device="cuda:99")
