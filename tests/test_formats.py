"""TRIDENT's and CLAM's files: exact layouts, and round trips that lose nothing."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from wsi_engine import FeatureStore, TileGrid
from wsi_engine.encoders.base import EncoderCard
from wsi_engine.errors import FormatError, MismatchError, StoreError
from wsi_engine.formats.clam import export_clam, import_clam
from wsi_engine.formats.trident import export_trident, import_trident
from wsi_engine.store import SlideRecord
from wsi_engine.writer import FeatureIdentity, write_features


def make_store(path: Path, dtype: str = "float16", n: int = 9) -> FeatureStore:
    rng = np.random.default_rng(0)
    origins = np.stack([np.arange(n) * 512, np.arange(n) * 7], axis=1).astype(np.int64)
    grid = TileGrid(origins, 256, 192, 0.5, (512.0, 512.0), 20)
    store = FeatureStore.create(
        path, SlideRecord("s1", "f", (9000, 8000), (0.25, 0.25), "aperio MPP", "aperio", "turbo")
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
