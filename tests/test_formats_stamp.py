"""STAMP's files, CLAM's bare tensors, and what may not be read out of a foreign HDF5 file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from support_formats import h5_content, make_store

from wsi_engine import FeatureStore
from wsi_engine.errors import FormatError, MismatchError
from wsi_engine.formats.clam import export_clam, import_clam
from wsi_engine.formats.stamp import export_stamp, import_stamp
from wsi_engine.formats.trident import export_trident, import_trident

MPP = 0.2527


def write_stamp(path: Path, coords: np.ndarray, feats: np.ndarray, **changes: object) -> Path:
    """A file as STAMP writes it: types of coordinates, features and attributes as in its source."""
    path.parent.mkdir(parents=True, exist_ok=True)
    attrs = {
        "stamp_version": "2.3.0", "extractor": "uni2", "unit": "um", "tile_size_um": 256.0, "tile_size_px": 224,
        "code_hash": "0a1b2c3d", "feat_type": "tile",
    } | changes  # fmt: skip
    with h5py.File(path, "w") as file:
        file["coords"], file["feats"] = coords, feats
        for name, value in attrs.items():
            if value is not None:
                file.attrs[name] = value
    return path


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_layout(tmp_path: Path, dtype: str) -> None:
    store = make_store(tmp_path / "s1.zarr", dtype)
    path = export_stamp(store, tmp_path / "stamp").features
    assert path == tmp_path / "stamp/uni/s1.h5"
    with h5py.File(path) as file:
        assert sorted(file) == ["coords", "feats"]
        assert file["feats"].dtype == dtype
        assert np.array_equal(file["feats"][:], store.features())
        assert file["coords"].dtype == np.float32
        assert np.array_equal(file["coords"][:], (store.origins() * MPP).astype(np.float32))
        attrs = dict(file.attrs)
    assert len(attrs.pop("code_hash")) == 8
    assert attrs == {
        "stamp_version": "2.1.0", "extractor": "uni", "unit": "um", "tile_size_um": 128.0, "tile_size_px": 256,
        "feat_type": "tile",
    }  # fmt: skip


def test_round_trip_of_a_store(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s1.zarr")
    first = export_stamp(store, tmp_path / "stamp")
    (path,) = import_stamp(tmp_path / "stamp", tmp_path / "back", slide_mpp=MPP)
    back = FeatureStore.open(path)
    assert back.encoders() == ("uni",)
    assert back.features().tobytes() == store.features().tobytes()
    assert np.array_equal(back.origins(), store.origins())
    assert (back.grid().tile_px, back.grid().mpp) == (256, 0.5)
    assert back.slide.mpp == (MPP, MPP)
    assert h5_content(export_stamp(back, tmp_path / "again").features) == h5_content(first.features)


def test_round_trip_of_stamps_own_file_is_bit_equal(tmp_path: Path) -> None:
    lattice = np.stack(np.meshgrid(np.arange(7), np.arange(5)), -1).reshape(-1, 2)
    coords = (lattice * 256.0 + 1 / 3).astype(np.float32)  # whole micrometres are no whole pixels
    feats = np.random.default_rng(3).normal(size=(35, 8)).astype(np.float16)
    first = write_stamp(tmp_path / "features/uni2-0a1b2c3d/site/slide.h5", coords, feats)
    (path,) = import_stamp(tmp_path / "features", tmp_path / "back", slide_mpp=MPP)
    back = FeatureStore.open(path)
    assert path.name == "slide.zarr"
    assert np.array_equal(back.origins(), np.rint(coords.astype(float) / MPP))
    assert back.grid().mpp == 256 / 224
    assert back.grid().tile_size_level0 == (256 / MPP, 256 / MPP)
    assert back.slide.dimensions[0] == int(np.ceil(round(float(coords[-1, 0]) / MPP) + 256 / MPP))
    again = export_stamp(back, tmp_path / "again").features
    assert h5_content(again) == h5_content(first)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unit": "px"}, "px"), ({"feat_type": "slide"}, "slide"), ({"tile_size_px": None}, "tile_size_px"),
        ({"tile_size_um": -1.0}, "tile_size_um"), ({"tile_size_um": float("nan")}, "tile_size_um"),
        ({"tile_size_px": "many"}, "tile_size_px"), ({"extractor": None}, "extractor"),
        ({"extractor": ".."}, "--encoder"), ({"extractor": "a\nb"}, "--encoder"), ({"big": "x" * 100_000}, "big"),
    ],
)  # fmt: skip
def test_attributes_that_cannot_be(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    write_stamp(tmp_path / "f/slide.h5", np.zeros((2, 2), np.float32), np.ones((2, 3), np.float16), **changes)
    with pytest.raises(FormatError, match=words) as caught:
        import_stamp(tmp_path / "f", tmp_path / "back", slide_mpp=MPP)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_coordinates_that_no_slide_has(tmp_path: Path, value: float) -> None:
    write_stamp(tmp_path / "f/slide.h5", np.full((2, 2), value, np.float32), np.ones((2, 3), np.float16))
    with pytest.raises(FormatError, match="coordinates"):
        import_stamp(tmp_path / "f", tmp_path / "back", slide_mpp=MPP)


def test_what_stamp_does_not_record_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="--slide-mpp"):
        import_stamp(tmp_path, tmp_path / "back")
    with pytest.raises(FormatError, match="holds no"):
        import_stamp(tmp_path, tmp_path / "back", slide_mpp=MPP)
    for folder in ("a", "b"):
        write_stamp(tmp_path / f"f/{folder}/slide.h5", np.zeros((2, 2), np.float32), np.ones((2, 3), np.float16))
    with pytest.raises(FormatError, match="twice"):
        import_stamp(tmp_path / "f", tmp_path / "back", slide_mpp=MPP)


def test_an_encoder_with_a_slash_stays_in_its_folder(tmp_path: Path) -> None:
    feats = np.ones((2, 3), np.float16)
    write_stamp(tmp_path / "f/slide.h5", np.zeros((2, 2), np.float32), feats, extractor="../../out/of/here")
    (path,) = import_stamp(tmp_path / "f", tmp_path / "in/back", slide_mpp=MPP)
    store = FeatureStore.open(path)
    for write in (export_stamp, export_trident, export_clam):
        files = write(store, tmp_path / "in/out/deep")  # type: ignore[operator]
        assert files.features.resolve().is_relative_to(tmp_path / "in/out/deep")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["f", "in"]


def clam_folder(folder: Path) -> tuple[FeatureStore, Path]:
    """CLAM's files without ``h5_files``, as its faster scripts leave them; and the tensor's path."""
    store = make_store(folder.parent / "s1.zarr")
    files = export_clam(store, folder)
    files.features.unlink()
    files.features.parent.rmdir()
    return store, files.tensor


def test_bare_tensors_of_clam(tmp_path: Path) -> None:
    store, tensor = clam_folder(tmp_path / "clam")
    (path,) = import_clam(tmp_path / "clam", tmp_path / "back", "uni", MPP)
    assert np.array_equal(FeatureStore.open(path).features(), store.features())
    torch.save(torch.from_numpy(store.features()), tensor)
    (path,) = import_clam(tmp_path / "clam", tmp_path / "half", "uni", MPP)
    assert FeatureStore.open(path).features().tobytes() == store.features().tobytes()


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.parametrize(
    "kind", ["payload", "dict", "list", "int", "stretched", "sparse", "noise", "1d", "rows", "pipe"]
)
def test_bad_tensors_of_clam(tmp_path: Path, kind: str) -> None:
    _, path = clam_folder(tmp_path / "clam")
    mark = tmp_path / "ran"
    values = {
        "payload": Payload(mark), "dict": {"a": torch.ones(9, 6)}, "list": [1], "int": torch.ones(9, 6, dtype=int),
        "stretched": torch.zeros(1).expand(9, 1 << 40), "sparse": torch.eye(9).to_sparse(), "1d": torch.ones(9),
        "rows": torch.ones(8, 6),
    }  # fmt: skip
    if kind == "noise":
        path.write_bytes(path.read_bytes()[:300])
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        torch.save(values[kind], path)
    with pytest.raises(FormatError, match="s1"):
        import_clam(tmp_path / "clam", tmp_path / "back", "uni", MPP)
    assert not mark.exists()


def break_features(path: Path, kind: str) -> None:
    """Put something else in the place of the features of a TRIDENT file."""
    outside = path.parent / "outside"
    with h5py.File(path, "r+") as file:
        del file["features"]
        if kind == "external link":
            with h5py.File(outside, "w") as other:
                other["features"] = np.ones((9, 6), np.float32)
            file["features"] = h5py.ExternalLink(str(outside), "features")
        elif kind == "soft link":
            file["features"] = h5py.SoftLink("/coords")
        elif kind == "external bytes":
            outside.write_bytes(bytes(9 * 6 * 4))
            file.create_dataset("features", (9, 6), np.float32, external=[(str(outside), 0, 9 * 6 * 4)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout((9, 6), np.float32)
            with h5py.File(outside, "w") as other:
                other["features"] = np.ones((9, 6), np.float32)
            layout[...] = h5py.VirtualSource(str(outside), "features", (9, 6))
            file.create_virtual_dataset("features", layout)
        elif kind == "absurd shape":
            file.create_dataset("features", (1 << 40, 1 << 20), np.float32, chunks=(1024, 1024))
        elif kind == "group":
            file.create_group("features")
        file["features"].attrs["encoder"] = "uni"


@pytest.mark.parametrize("kind", ["external link", "soft link", "external bytes", "virtual", "absurd shape", "group"])
def test_what_is_not_read_from_hdf5(tmp_path: Path, kind: str) -> None:
    files = export_trident(make_store(tmp_path / "s1.zarr"), tmp_path / "job")
    break_features(files.features, kind)
    with pytest.raises(FormatError, match=r"s1\.h5.*features"):
        import_trident(files.features.parent.parent, tmp_path / "back")


def test_other_tiles_under_the_same_name_are_refused(tmp_path: Path) -> None:
    coords, feats = np.float32([[0, 0], [50, 0]]), np.ones((2, 3), np.float16)
    write_stamp(tmp_path / "a/slide.h5", coords, feats)
    write_stamp(tmp_path / "b/slide.h5", coords[::-1], feats, extractor="other")
    import_stamp(tmp_path / "a", tmp_path / "back", slide_mpp=MPP)
    with pytest.raises(MismatchError, match="other tiles"):
        import_stamp(tmp_path / "b", tmp_path / "back", slide_mpp=MPP)
