"""Slides in, features out: equal to a plain loop, safe to kill, one bad slide stops nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support_extraction import MeanEncoder, data_files, options

from wsi_engine import FeatureStore, TissueSettings, extract, lay_grid, open_slide
from wsi_engine.errors import EncoderError, SettingsError
from wsi_engine.extraction import extract_sources, guess_tiles
from wsi_engine.grid import GridSettings
from wsi_engine.inputs import find_slides
from wsi_engine.jobs import ExtractSettings, SlideResult


def test_features_equal_a_plain_loop(picture: Path, tmp_path: Path, tissue_image: np.ndarray) -> None:
    encoder = MeanEncoder()
    report = extract(picture, tmp_path / "out", encoder, **options())  # type: ignore[arg-type]
    (result,) = report.results
    assert result.status == "done"
    store = FeatureStore.open(result.store)
    with open_slide(tissue_image, mpp=0.5) as slide:
        origins = lay_grid(slide, mpp=0.5, tile_px=64).origins
    assert np.array_equal(store.origins(), origins)
    assert result.tiles == len(origins) > 100
    tiles = np.stack([tissue_image[y : y + 64, x : x + 64] for x, y in origins if y + 64 <= 1200])
    assert np.array_equal(store.features("mean")[: len(tiles)], MeanEncoder().encode(tiles))
    assert encoder.shapes == {(16, 64, 64, 3)}  # the last batch is padded to the same shape
    assert set(result.seconds) == {"read", "decode", "resample", "encode", "write"}
    assert result.seconds["encode"] > 0


def test_threads_and_batches_do_not_change_features(picture: Path, tmp_path: Path) -> None:
    stores = []
    for number, changes in enumerate(({"workers": 1}, {"workers": 4}, {"batch_size": 7})):
        report = extract(picture, tmp_path / str(number), MeanEncoder(), **options(**changes))  # type: ignore[arg-type]
        stores.append(FeatureStore.open(report.results[0].store).features())
    assert np.array_equal(stores[0], stores[1])
    assert np.array_equal(stores[0], stores[2])


def test_running_again_skips_what_is_complete(picture: Path, tmp_path: Path) -> None:
    first = extract(picture, tmp_path / "out", MeanEncoder(), **options())  # type: ignore[arg-type]
    before = data_files(tmp_path / "out" / "picture.zarr")
    encoder = MeanEncoder()
    again = extract(picture, tmp_path / "out", encoder, **options())  # type: ignore[arg-type]
    assert again.results[0].status == "already complete"
    assert again.results[0].tiles == first.results[0].tiles
    assert encoder.shapes == set()
    assert data_files(tmp_path / "out" / "picture.zarr") == before


@pytest.mark.parametrize(
    ("changes", "digest", "match"),
    [
        ({"min_tissue": 0.9}, "1" * 64, "min_tissue"),
        ({"tissue": None}, "1" * 64, "tissue"),
        ({"tissue": TissueSettings(median_px=9)}, "1" * 64, "tissue"),
        ({}, "2" * 64, "weights_digest"),
        ({"dtype": "float16"}, "1" * 64, "dtype"),
        ({"slide_mpp": 0.6}, "1" * 64, "mpp"),
    ],
)
def test_other_settings_never_mix(
    picture: Path, tmp_path: Path, changes: dict[str, object], digest: str, match: str
) -> None:
    extract(picture, tmp_path / "out", MeanEncoder(), **options())  # type: ignore[arg-type]
    before = data_files(tmp_path / "out" / "picture.zarr")
    report = extract(picture, tmp_path / "out", MeanEncoder(digest), **options(**changes))  # type: ignore[arg-type]
    assert report.results[0].status == "failed"
    assert match in report.results[0].message
    assert data_files(tmp_path / "out" / "picture.zarr") == before


def test_two_encoders_share_a_store(picture: Path, tmp_path: Path) -> None:
    extract(picture, tmp_path / "out", MeanEncoder(), **options())  # type: ignore[arg-type]
    extract(picture, tmp_path / "out", "texture", **options())  # type: ignore[arg-type]
    store = FeatureStore.open(tmp_path / "out" / "picture.zarr")
    assert store.encoders() == ("mean", "texture")
    assert len(store.features("mean")) == len(store.features("texture")) == len(store.origins())


def test_a_slide_without_tissue_is_complete_and_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "blank.png"
    Image.fromarray(np.full((300, 400, 3), 240, np.uint8)).save(path)
    report = extract(path, tmp_path / "out", MeanEncoder(), **options())  # type: ignore[arg-type]
    (result,) = report.results
    assert result.status == "no tissue"
    assert '"saturation"' in result.message
    assert "--tissue none" in result.message
    assert "saturation" in caplog.text
    store = FeatureStore.open(result.store)
    assert store.features("mean").shape == (0, 6)
    assert extract(path, tmp_path / "out", MeanEncoder(), **options()).results[0].status == "already complete"  # type: ignore[arg-type]
    everything = extract(path, tmp_path / "all", MeanEncoder(), **options(tissue=None))  # type: ignore[arg-type]
    assert everything.results[0].tiles == 5 * 7


def test_missing_scale_names_the_flag(picture: Path, tmp_path: Path) -> None:
    report = extract(picture, tmp_path / "out", MeanEncoder(), **options(slide_mpp=None))  # type: ignore[arg-type]
    assert "--slide-mpp" in report.failed[0].message
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.endswith(".failed.json")] == []


def test_a_slide_that_another_process_writes_is_left_to_it(picture: Path, tmp_path: Path) -> None:
    from wsi_engine.lease import hold_lease

    out = tmp_path / "out"
    out.mkdir()
    with hold_lease(out / ".picture.lease"):
        report = extract(picture, out, MeanEncoder(), **options())  # type: ignore[arg-type]
    assert report.results[0].status == "busy"
    assert report.failed == ()


@pytest.mark.parametrize(
    "changes", [{"batch_size": 0}, {"workers": 0}, {"dtype": "int8"}, {"tissue": "trees"}, {"mpp": -1}, {"tile_px": 0}]
)
def test_settings_are_checked_before_anything_is_done(
    picture: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    with pytest.raises(SettingsError):
        extract(picture, tmp_path / "out", MeanEncoder(), **options(**changes))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_unknown_encoder(picture: Path, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="wsi encoders"):
        extract(picture, tmp_path / "out", "resnet51", **options())  # type: ignore[arg-type]


def test_progress_hears_of_every_tile(picture: Path, tmp_path: Path) -> None:
    heard: list[tuple[object, ...]] = []

    class Listener:
        def run_started(self, slides: int) -> None:
            heard.append(("run", slides))

        def slide_started(self, slide_id: str, tiles: int, done: int) -> None:
            heard.append(("slide", slide_id, tiles, done))

        def tiles_done(self, tiles: int) -> None:
            heard.append(("tiles", tiles))

        def slide_finished(self, result: SlideResult) -> None:
            heard.append(("end", result.status))

    sources = find_slides([picture], 0.5)
    out = tmp_path / "out"
    out.mkdir()
    settings = ExtractSettings(GridSettings(tile_px=64), batch_size=16)
    report = extract_sources(sources, out, MeanEncoder(), settings, Listener())
    tiles = report.tiles
    assert heard[:2] == [("run", 1), ("slide", "picture", tiles, 0)]
    assert sum(one[1] for one in heard if one[0] == "tiles") == tiles  # type: ignore[misc]
    assert heard[-1] == ("end", "done")


_SLOW_RUN = """
import sys, time
import wsi_engine.encoders.texture as texture
plain = texture.TextureEncoder.encode
def slow(self, pixels):
    time.sleep(0.02)
    return plain(self, pixels)
texture.TextureEncoder.encode = slow
from wsi_engine import extract
print("ready", flush=True)
extract(sys.argv[1], sys.argv[2], "texture", slide_mpp=0.5, tile_px=48, batch_size=8)
"""


def test_kill_at_any_moment_and_run_again(picture: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, some of them in the middle of a write; then one run to the end."""
    extract(picture, tmp_path / "whole", "texture", slide_mpp=0.5, tile_px=48, batch_size=8)
    expected = data_files(tmp_path / "whole" / "picture.zarr")
    rng = np.random.default_rng(3)
    out = tmp_path / "killed"
    store = out / "picture.zarr"
    partial = store / "features" / "texture" / "partial"
    resumed = 0
    for number, moment in enumerate(rng.uniform(0.0, 1.0, 5)):  # the first wherever it is, the others among the batches
        with subprocess.Popen(
            [sys.executable, "-c", _SLOW_RUN, str(picture), str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            patience = time.monotonic() + 60
            while number > 0 and not partial.exists() and process.poll() is None and time.monotonic() < patience:
                time.sleep(0.01)
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
        if (store / "zarr.json").exists():
            assert FeatureStore.open(store).encoders() in ((), ("texture",))
            resumed += partial.exists()
    assert resumed > 0
    report = extract(picture, out, "texture", slide_mpp=0.5, tile_px=48, batch_size=8)
    assert report.results[0].status in ("done", "already complete")
    assert data_files(out / "picture.zarr") == expected
    assert os.listdir(out) == ["picture.zarr"]


def test_real_slide(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "slides" / "CMU-1-Small-Region.svs"
    report = extract(path, tmp_path / "out", "texture")
    assert report.results[0].status == "done"
    store = FeatureStore.open(tmp_path / "out" / "CMU-1-Small-Region.zarr")
    features = store.features("texture")
    assert len(features) == len(store.origins()) > 40
    assert np.isfinite(features).all()
    assert store.slide.mpp_source == "aperio MPP"


def test_real_slide_equals_openslide_and_timm(shared_data: Path, tmp_path: Path) -> None:
    """The features of the engine against OpenSlide's pixels, an area mean in plain NumPy, and timm called directly."""
    import openslide
    import timm
    import torch

    path = shared_data / "slides" / "CMU-1-Small-Region.svs"
    extract(
        path,
        tmp_path / "out",
        "resnet50",
        "random:0",
        mpp=1.0,
        dtype="float32",
        batch_size=8,
        precision="fp32",
        exact_resample=True,
    )
    store = FeatureStore.open(tmp_path / "out" / "CMU-1-Small-Region.zarr")
    torch.manual_seed(0)
    model = timm.create_model("resnet50.tv_in1k", pretrained=False, features_only=True, out_indices=(3,)).eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with openslide.OpenSlide(str(path)) as slide:
        scale = 1.0 / float(slide.properties["openslide.mpp-x"])
        side = int(np.ceil(256 * scale))
        rows = [0, len(store.origins()) // 2, len(store.origins()) - 1]
        tiles = []
        for x, y in store.origins()[rows].tolist():
            rgba = np.asarray(slide.read_region((x, y), 0, (side, side))).astype(float)
            pixels = rgba[..., :3] * (rgba[..., 3:] / 255) + 255 - rgba[..., 3:]
            tiles.append(_area_mean(_area_mean(pixels, scale, 256).transpose(1, 0, 2), scale, 256).transpose(1, 0, 2))
    batch = torch.tensor(np.rint(np.stack(tiles)), dtype=torch.float32).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        expected = model((batch - mean) / std)[0].mean(dim=(2, 3)).numpy()
    got = store.features("resnet50")[rows]
    assert np.abs(got - expected).max() <= 1e-3 * max(1.0, np.abs(expected).max())


def _area_mean(pixels: np.ndarray, scale: float, n: int) -> np.ndarray:
    """Exact area means along the first axis."""
    integral = np.concatenate([np.zeros((1, *pixels.shape[1:])), np.cumsum(pixels, axis=0)])
    edges = np.arange(n + 1) * scale
    low = np.minimum(edges.astype(int), len(pixels) - 1)
    at_edges = integral[low] + (edges - low)[:, None, None] * (integral[low + 1] - integral[low])
    return np.diff(at_edges, axis=0) / scale


def test_batches_run_on_through_all_slides(picture: Path, tmp_path: Path) -> None:
    for name in ("b", "c"):
        (picture.parent / f"{name}.png").write_bytes(picture.read_bytes())
    calls = []

    class Counting(MeanEncoder):
        def encode(self, pixels: np.ndarray) -> np.ndarray:
            calls.append(len(pixels))
            return super().encode(pixels)

    report = extract(picture.parent, tmp_path / "all", Counting(), **options())  # type: ignore[arg-type]
    assert [result.status for result in report.results] == ["done"] * 3
    assert len(calls) == -(-report.tiles // 16)
    alone = extract(picture, tmp_path / "one", MeanEncoder(), **options())  # type: ignore[arg-type]
    expected = data_files(Path(alone.results[0].store))
    for result in report.results:
        assert data_files(Path(result.store)) == expected


def test_the_number_of_tiles_is_guessed_from_sizes(picture: Path, tmp_path: Path) -> None:
    sources = find_slides([picture], 0.5)
    settings = ExtractSettings(GridSettings(0.5, 64), tissue=None)
    assert guess_tiles(sources, settings) == round(1600 * 1200 / 64**2)
    assert guess_tiles(sources, ExtractSettings(GridSettings(1.0, 64), tissue=None)) == round(1600 * 1200 / 128**2)
    assert guess_tiles(sources, ExtractSettings(GridSettings(0.5, 64))) < guess_tiles(sources, settings)
    (tmp_path / "bad.svs").write_bytes(b"no slide")
    assert guess_tiles(find_slides([tmp_path / "bad.svs"]), settings) == 0


def test_features_made_with_another_resampling_never_mix(picture: Path, tmp_path: Path) -> None:
    extract(picture, tmp_path / "out", MeanEncoder(), **options())  # type: ignore[arg-type]
    report = extract(picture, tmp_path / "out", MeanEncoder(), **options(exact_resample=True))  # type: ignore[arg-type]
    assert "exact_resample False, now True" in report.failed[0].message
