"""TRIDENT's and CLAM's files: exact layouts, and round trips that lose nothing."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from wsi_engine import FeatureStore, TileGrid
from wsi_engine.encoders.base import EncoderCard
from wsi_engine.errors import FormatError, MismatchError, PartialImportError, StoreError
from wsi_engine.formats.clam import export_clam, import_clam
from wsi_engine.formats.trident import export_trident, import_trident
from wsi_engine.slide_record import SlideRecord
from wsi_engine.writer import FeatureIdentity, write_features


def make_store(
    path: Path, dtype: str = "float16", n: int = 9, name: str = "s1", slide_mpp: float = 0.25, mpp: float = 0.5
) -> FeatureStore:
    rng = np.random.default_rng(0)
    origins = np.stack([np.arange(n) * 512, np.arange(n) * 7], axis=1).astype(np.int64)
    side = 256 * mpp / slide_mpp
    grid = TileGrid(origins, 256, 192, mpp, (side, side), 20)
    store = FeatureStore.create(
        path, SlideRecord(name, "f", (9000, 8000), (slide_mpp, slide_mpp), "aperio MPP", "aperio", "turbo")
    )
    store.write_grid("256px_0.5mpp_stride192", grid, {}, None)
    card = EncoderCard("uni", "timm", "vit", 224, 6, "cls", "gated", weights_digest="d")
    identity = FeatureIdentity(card, "256px_0.5mpp_stride192", grid, "fp32", dtype)  # type: ignore[arg-type]
    write_features(store, identity, rng.normal(size=(n, 6)).astype(dtype), {"format": "test"})
    return store


def h5_content(path: Path) -> dict[str, object]:
    """Everything in an HDF5 file: datasets with type, shape and bytes, and their attributes."""
    found: dict[str, object] = {}
    with h5py.File(path) as file:
        for name, data in file.items():
            found[name] = (data.dtype.str, data.shape, data[...].tobytes())
            for key, value in data.attrs.items():
                found[f"{name}.{key}"] = np.asarray(value).tolist()
    return found


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_trident_layout(tmp_path: Path, dtype: str) -> None:
    store = make_store(tmp_path / "s1.zarr", dtype)
    files = export_trident(store, tmp_path / "job")
    assert files.coords == tmp_path / "job/20x_256px_64px_overlap/patches/s1_patches.h5"
    assert files.features == tmp_path / "job/20x_256px_64px_overlap/features_uni/s1.h5"
    with h5py.File(files.coords) as file:
        coords = file["coords"]
        assert list(file) == ["coords"]
        assert coords.dtype == np.int64
        assert np.array_equal(coords[:], store.origins())
        assert dict(coords.attrs) == {
            "patch_size": 256,
            "patch_size_level0": 512,
            "level0_magnification": 40,
            "target_magnification": 20,
            "overlap": 64,
            "name": "s1",
            "savetodir": str(files.coords.parent),
            "level0_width": 9000,
            "level0_height": 8000,
        }
        attrs = dict(coords.attrs)
    with h5py.File(files.features) as file:
        assert sorted(file) == ["coords", "features"]
        assert file["features"].dtype == dtype
        assert np.array_equal(file["features"][:], store.features())
        assert dict(file["features"].attrs) == {
            "name": "s1",
            "savetodir": str(files.features.parent),
            "encoder": "uni",
        }
        assert dict(file["coords"].attrs) == attrs


def test_trident_round_trip_is_bit_equal(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s1.zarr")
    first = export_trident(store, tmp_path / "job")
    (path,) = import_trident(tmp_path / "job/20x_256px_64px_overlap", tmp_path / "back")
    back = FeatureStore.open(path)
    assert back.features("uni").dtype == store.features().dtype
    assert np.array_equal(back.features("uni"), store.features())
    assert np.array_equal(back.origins(), store.origins())
    assert (back.grid().tile_px, back.grid().stride_px, back.grid().mpp) == (256, 192, 0.5)
    assert back.grid().tile_size_level0 == (512.0, 512.0)
    assert (back.slide.dimensions, back.slide.mpp) == ((9000, 8000), (0.25, 0.25))
    again = export_trident(back, tmp_path / "again")
    assert h5_content(again.coords) == h5_content(first.coords)
    assert {k: v for k, v in h5_content(again.features).items() if k != "features.savetodir"} == {
        k: v for k, v in h5_content(first.features).items() if k != "features.savetodir"
    }


def test_trident_of_an_empty_slide(tmp_path: Path) -> None:
    files = export_trident(make_store(tmp_path / "s1.zarr", n=0), tmp_path / "job")
    with h5py.File(files.features) as file:
        assert file["features"].shape == (0, 6)
        assert file["coords"].shape == (0, 2)
    (path,) = import_trident(files.features.parent.parent, tmp_path / "back")
    assert FeatureStore.open(path).features().shape == (0, 6)


def test_trident_with_the_true_scale(tmp_path: Path) -> None:
    export_trident(make_store(tmp_path / "s1.zarr"), tmp_path / "job")
    (path,) = import_trident(tmp_path / "job/20x_256px_64px_overlap", tmp_path / "back", slide_mpp=0.2527)
    assert FeatureStore.open(path).slide.mpp == (0.2527, 0.2527)


@pytest.mark.parametrize(("mpp", "back"), [(0.65, 0.65), (0.44, 0.44), (0.2277, 0.2277), (0.2525, 0.25), (0.97, 1.0)])
def test_magnifications_are_those_of_objectives_or_exact(tmp_path: Path, mpp: float, back: float) -> None:
    """TRIDENT keeps magnifications: what is within 5 % of an objective's becomes that, anything else stays."""
    store = make_store(tmp_path / "s1.zarr", slide_mpp=mpp, mpp=mpp)
    files = export_trident(store, tmp_path / "job")
    with h5py.File(files.coords) as file:
        assert file["coords"].attrs["target_magnification"] == file["coords"].attrs["level0_magnification"] == 10 / back
    assert files.coords.parent.parent.name.startswith(f"{10 / back:g}x_")
    (path,) = import_trident(files.coords.parent.parent, tmp_path / "back")
    assert FeatureStore.open(path).slide.mpp == (back, back)
    assert FeatureStore.open(path).grid().mpp == back


def add_encoder(store: FeatureStore, name: str) -> FeatureStore:
    """Features of another encoder on the same tiles."""
    store = FeatureStore.create(store.path, store.slide)
    grid = store.grid()
    card = EncoderCard(name, "timm", "vit", 224, 3, "cls", "gated", weights_digest="e")
    identity = FeatureIdentity(card, "256px_0.5mpp_stride192", grid, "fp32", "float16")
    write_features(store, identity, np.ones((len(grid), 3), np.float16), {"format": "test"})
    return store


def test_two_encoders_in_one_folder_of_trident(tmp_path: Path) -> None:
    store = add_encoder(make_store(tmp_path / "s1.zarr"), "timm:a/b")
    first = export_trident(store, tmp_path / "job", "uni")
    before = first.coords.read_bytes()
    second = export_trident(store, tmp_path / "job", "timm:a/b")
    assert second.features == tmp_path / "job/20x_256px_64px_overlap/features_timm_a_b/s1.h5"
    assert second.coords == first.coords
    assert first.coords.read_bytes() == before
    with pytest.raises(FormatError, match=r"features_uni/s1\.h5 exists: .* --overwrite"):
        export_trident(store, tmp_path / "job", "uni")
    for encoder, dim in (("uni", 6), ("timm:a/b", 3)):
        (path,) = import_trident(first.coords.parent.parent, tmp_path / "back", encoder)
        assert FeatureStore.open(path).features(encoder).shape == (9, dim)
    with pytest.raises(FormatError, match="name one with --encoder"):
        import_trident(first.coords.parent.parent, tmp_path / "back")


@pytest.mark.parametrize("damage", ["other tiles", "another scale", "torn"])
def test_coordinates_of_other_tiles_are_not_replaced_unasked(tmp_path: Path, damage: str) -> None:
    store = add_encoder(make_store(tmp_path / "s1.zarr"), "b")
    files = export_trident(store, tmp_path / "job", "uni")
    sound = h5_content(files.coords)
    if damage == "torn":
        files.coords.write_bytes(files.coords.read_bytes()[:500])
    else:
        with h5py.File(files.coords, "r+") as file:
            if damage == "other tiles":
                file["coords"][0, 0] += 1
            else:
                file["coords"].attrs["level0_magnification"] = 20
    spoilt = files.coords.read_bytes()
    with pytest.raises(FormatError, match=r"s1_patches\.h5 holds other tiles: choose another folder, or pass --overwr"):
        export_trident(store, tmp_path / "job", "b")
    assert files.coords.read_bytes() == spoilt
    export_trident(store, tmp_path / "job", "b", overwrite=True)
    assert h5_content(files.coords) == sound


def test_one_damaged_file_stops_no_other(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d", "e", "f"):
        files = export_trident(make_store(tmp_path / f"{name}.zarr", name=name), tmp_path / "job")
        if name in "acde":
            files.features.write_bytes(b"no HDF5")
    job = files.features.parent.parent
    with pytest.raises(PartialImportError, match=r"^4 of 6 slides were not imported \(.* and 1 more\): mend") as caught:
        import_trident(job, tmp_path / "back")
    told = str(caught.value)
    assert [name for name in "abcdef" if f"{name}.h5 is missing, damaged" in told] == ["a", "c", "d"]
    assert "\n" not in told
    assert caught.value.done == (tmp_path / "back/b.zarr", tmp_path / "back/f.zarr")
    assert all(FeatureStore.open(path).features("uni").shape == (9, 6) for path in caught.value.done)


@pytest.mark.parametrize("write", [export_trident, export_clam])
def test_a_full_disk_ends_in_a_sentence(tmp_path: Path, write: Callable[..., Any]) -> None:
    """A real limit of the system, at which HDF5 and torch themselves raise RuntimeError of several lines, or crash."""
    store = make_store(tmp_path / "s1.zarr", "float32", n=4000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
        with pytest.raises(FormatError, match=r"cannot write .*s1.*: File too large$") as caught:
            write(store, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_clam_layout(tmp_path: Path) -> None:
    import torch

    store = make_store(tmp_path / "s1.zarr")
    files = export_clam(store, tmp_path / "clam")
    with h5py.File(files.coords) as file:
        assert np.array_equal(file["coords"][:], store.origins())
        attrs = {name: np.asarray(value).tolist() for name, value in file["coords"].attrs.items()}
    assert attrs == {
        "patch_size": 512,
        "patch_level": 0,
        "downsample": [1.0, 1.0],
        "downsampled_level_dim": [9000, 8000],
        "level_dim": [9000, 8000],
        "name": "s1",
        "save_path": str(tmp_path / "clam" / "patches"),
    }
    with h5py.File(files.features) as file:
        assert (file["features"].dtype, file["coords"].dtype) == (np.float32, np.int32)
        assert np.array_equal(file["features"][:], store.features())
        assert np.array_equal(file["coords"][:], store.origins())
    tensor = torch.load(files.tensor, weights_only=True)
    assert tensor.dtype == torch.float32
    assert np.array_equal(tensor.numpy(), store.features())


def test_clam_round_trip_is_bit_equal(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s1.zarr", "float32")
    first = export_clam(store, tmp_path / "clam")
    (path,) = import_clam(tmp_path / "clam", tmp_path / "back", "uni", slide_mpp=0.25)
    back = FeatureStore.open(path)
    assert np.array_equal(back.features("uni"), store.features())
    assert np.array_equal(back.origins(), store.origins())
    assert back.slide.dimensions == (9000, 8000)
    again = export_clam(back, tmp_path / "again")
    assert h5_content(again.coords) == h5_content(first.coords)
    assert h5_content(again.features) == h5_content(first.features)
    assert again.tensor.read_bytes()[:2] == b"PK"


def test_clam_at_a_lower_level(tmp_path: Path) -> None:
    export_clam(make_store(tmp_path / "s1.zarr"), tmp_path / "clam")
    with h5py.File(tmp_path / "clam/patches/s1.h5", "r+") as file:
        for name, value in {
            "patch_size": 256,
            "patch_level": 1,
            "downsample": (2.0, 2.0),
            "level_dim": (4500, 4000),
        }.items():
            file["coords"].attrs[name] = value
    (path,) = import_clam(tmp_path / "clam", tmp_path / "back", "uni", slide_mpp=0.25)
    grid = FeatureStore.open(path).grid()
    assert (grid.tile_px, grid.mpp, grid.tile_size_level0) == (256, 0.5, (512.0, 512.0))
    assert FeatureStore.open(path).slide.dimensions == (9000, 8000)


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s1.zarr")
    files = export_clam(store, tmp_path / "clam")
    files.features.write_bytes(b"mine")
    with pytest.raises(FormatError, match="--overwrite"):
        export_clam(store, tmp_path / "clam")
    assert files.features.read_bytes() == b"mine"
    export_clam(store, tmp_path / "clam", overwrite=True)
    assert h5py.is_hdf5(files.features)


def test_importing_again_is_no_error_but_other_features_are(tmp_path: Path) -> None:
    export_trident(make_store(tmp_path / "s1.zarr"), tmp_path / "job")
    job = tmp_path / "job/20x_256px_64px_overlap"
    assert import_trident(job, tmp_path / "back") == import_trident(job, tmp_path / "back")
    with h5py.File(job / "features_uni/s1.h5", "r+") as file:
        del file["features"]
        file["features"] = np.zeros((9, 7), np.float32)
        file["features"].attrs["encoder"] = "uni"
    with pytest.raises(MismatchError):
        import_trident(job, tmp_path / "back")


@pytest.mark.parametrize("damage", ["truncated", "no coords", "no attributes", "int features", "another number"])
def test_damaged_files_get_one_sentence(tmp_path: Path, damage: str) -> None:
    files = export_trident(make_store(tmp_path / "s1.zarr"), tmp_path / "job")
    if damage == "truncated":
        files.features.write_bytes(files.features.read_bytes()[:1000])
    else:
        with h5py.File(files.features, "r+") as file:
            if damage == "no coords":
                del file["coords"]
            elif damage == "no attributes":
                del file["coords"].attrs["patch_size"]
            elif damage == "int features":
                del file["features"]
                file["features"] = np.zeros((9, 6), int)
            else:
                del file["features"]
                file["features"] = np.zeros((8, 6), np.float32)
    with pytest.raises(FormatError) as caught:
        import_trident(files.features.parent.parent, tmp_path / "back")
    assert "s1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="features_<encoder>"):
        import_trident(tmp_path, tmp_path / "back")
    with pytest.raises(FormatError, match="--slide-mpp"):
        import_clam(tmp_path, tmp_path / "back", "uni")
    with pytest.raises(FormatError, match="holds no"):
        import_clam(tmp_path, tmp_path / "back", "uni", 0.25)


def test_what_is_not_there_cannot_be_exported(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s1.zarr")
    with pytest.raises(StoreError, match="not there"):
        export_trident(store, tmp_path / "job", "resnet50")
    assert not (tmp_path / "job").exists()
