"""The methods with networks on slides: the student, scale attention, and which method a file of weights belongs to."""

from __future__ import annotations

from dataclasses import asdict
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
from wsi_engine.models.scale_files import load_scale_attention, save_scale_attention
from wsi_engine.nuclei.frame import FrameReader, TissueRaster, frame_slide
from wsi_engine.nuclei.images import resample_image
from wsi_engine.nuclei.instances import InstanceSet
from wsi_engine.nuclei.method import LARGEST_HOLE_UM2, METHOD_HOMES, NucleiMethod, create_method
from wsi_engine.nuclei.scale_method import ScaleMethod
from wsi_engine.nuclei.scale_stains import measure_look
from wsi_engine.nuclei.segmentation import segment_nuclei
from wsi_engine.nuclei.stain_method import StainMethod
from wsi_engine.nuclei.student_inference import StudentPredictor, average_views, enlarge_maps, split_nuclei, view_maps
from wsi_engine.nuclei.student_method import FittedStudent, StudentMethod
from wsi_engine.nuclei.windows import WindowPlan
from wsi_engine.slide import open_slide
from wsi_engine.synthetic import SlideSpec, SyntheticSlide
from wsi_engine.tissue import TissueMask

Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def picture() -> Pixels:
    """Dense tissue, 1400 × 1200 at 0.25 µm: one window of the student, smaller than on a slide."""
    return SyntheticSlide(SlideSpec(width=1400, height=1200, coverage=1, seed=4)).paint(0, 0, 1400, 1200)


@pytest.fixture(scope="module")
def long_picture() -> Pixels:
    """Dense tissue, 2600 × 500 at 0.25 µm: two windows of the student."""
    return SyntheticSlide(SlideSpec(width=2600, height=1200, coverage=1, seed=4)).paint(0, 300, 2600, 500)


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


class Counter:
    """Counts tiles."""

    def __init__(self) -> None:
        self.tiles = 0

    def slide_started(self, slide_id: str, tiles: int, done: int) -> None:
        self.tiles = tiles

    def tiles_done(self, tiles: int) -> None:
        pass


def test_tiles_and_threads_do_not_change_the_students_nuclei(long_picture: Pixels, student: StudentMethod) -> None:
    before, found, tiles = torch.get_num_threads(), [], []
    try:
        for tile_px, threads in ((1024, 1), (2048, 2)):
            torch.set_num_threads(threads)
            set_thread_count(threads)
            counter = Counter()
            found.append(
                segment_nuclei(long_picture, student, 0.25, tile_px=tile_px, workers=threads, progress=counter)
            )
            tiles.append(counter.tiles)
    finally:
        torch.set_num_threads(before)
        set_thread_count(None)
    assert tiles == [2, 1]
    assert len(found[0]) > 200
    assert_same(*found)


@pytest.mark.parametrize(
    ("width", "height", "side"), [(200, 100, 128), (640, 704, 384), (2048, 90, 1024), (2600, 500, 1024)]
)
def test_small_pictures_get_small_windows(student: StudentMethod, width: int, height: int, side: int) -> None:
    with open_slide(np.zeros((height, width, 3), np.uint8), 0.25) as slide:
        frame = frame_slide(slide, student.mpp)
        for tile_px in (64, 1024):
            reader = FrameReader(slide, frame)
            plan = WindowPlan(reader, TissueRaster(frame, slide.mpp, None), student, tile_px)
            assert plan.side == side
    assert (plan.side + 2 * student.margin_px) % student.predictor.stride == 0


def find_whole(image: Pixels, student: StudentMethod) -> NDArray[np.int32]:
    """Nuclei of an image at 0.25 µm from maps of all of it at once."""
    maps = student.predictor.predict_maps(resample_image(image, 0.25, student.mpp))
    grown = enlarge_maps(maps, *image.shape[:2])
    return split_nuclei(grown, 0.25, student.settings, largest_hole_um2=LARGEST_HOLE_UM2)


def test_the_student_finds_what_it_finds_in_the_whole(picture: Pixels, student: StudentMethod) -> None:
    part = picture[:640, :704]  # one window
    ours, whole = segment_nuclei(part, student, 0.25).labels(), find_whole(part, student)
    assert aji(whole, ours) > 0.97
    assert abs(int(ours.max()) - int(whole.max())) <= 0.02 * whole.max()


def test_the_student_finds_most_true_nuclei(picture: Pixels, whole: InstanceSet) -> None:
    truth = SyntheticSlide(SlideSpec(width=1400, height=1200, coverage=1, seed=4)).truth.labels(0, 0, 1400, 1200)
    assert aji(truth, whole.labels()) > 0.55
    assert whole.record.method_mpp == 0.25
    assert whole.record.method == "student"
    assert whole.record.fitted["device"] == "cpu"


def test_real_images_come_out_as_from_maps_of_the_whole(shared_data: Path, student: StudentMethod) -> None:
    images = [path for path in sorted((shared_data / "nuclei" / "nucls").glob("*.png")) if "_label" not in path.stem]
    agreement = []
    for path in images[:3]:
        image = np.asarray(Image.open(path).convert("RGB"))
        agreement.append(aji(find_whole(image, student), segment_nuclei(image, student, 0.25).labels()))
    assert min(agreement) > 0.9


def test_a_real_slide_is_the_same_whatever_the_tiles(shared_data: Path, student: StudentMethod) -> None:
    tissue = np.zeros((186, 139), bool)
    tissue[50:80, 40:70] = True
    with open_slide(shared_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        found = [segment_nuclei(slide, student, tile_px=t, tissue=TissueMask(tissue, 8.0)) for t in (1024, 2048)]
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
        method = create_method(name)
        assert isinstance(method, NucleiMethod)
        assert method.name == name


@pytest.mark.parametrize(
    ("model", "weights", "words"),
    [
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


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("reinhard", "lacks its kind"),
        ({"kind": "reinhard"}, "lacks its kind"),
        ({"kind": "reinhard", "rows": [["a"]]}, "rows of numbers"),
        ({"kind": "vahadane", "rows": [[1, 2, 3], [1, 2, 3]]}, "kind is 'vahadane'"),
        ({"kind": "reinhard", "rows": [[1, 2, 3], [1, 2]]}, "3, 2 numbers"),
        ({"kind": "macenko", "rows": [[1, 2, 3], [1, 2, 4]]}, "3, 3 numbers"),
        ({"kind": "reinhard", "rows": [[1, 2, 3], [1, 0, 3]]}, "not above 0"),
        ({"kind": "macenko", "rows": [[0.6, 0.7, 0.3], [0.6, 0.7, 0.3], [1, 1]]}, "parallel"),
    ],
)
def test_a_damaged_look_is_refused(scale_file: Path, tmp_path: Path, entry: object, words: str) -> None:
    network, _ = load_scale_attention(scale_file)
    path = tmp_path / "attention.safetensors"
    save_scale_attention(network, path, {"normalisation": entry})
    with pytest.raises(errors.ModelError, match=words) as caught:
        ScaleMethod(path, device="cpu")
    assert "damaged normalisation" in str(caught.value)


@pytest.mark.parametrize("kind", ["reinhard", "macenko"])
def test_a_look_comes_back_from_the_card(scale_file: Path, tmp_path: Path, picture: Pixels, kind: str) -> None:
    network, _ = load_scale_attention(scale_file)
    look = measure_look(picture[:300, :300], kind)
    save_scale_attention(network, tmp_path / "a.safetensors", {"normalisation": asdict(look)})
    assert ScaleMethod(tmp_path / "a.safetensors", device="cpu").reference == look


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(errors.EncoderError, match="not available"):
        StudentMethod(device="cuda:99")
