"""``wsi export`` and ``wsi import`` of every layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support_formats import make_full_store, make_store
from typer.testing import CliRunner, Result

from wsi_engine import FeatureStore
from wsi_engine.cli.app import app


def wsi(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("layout", ["trident", "clam", "stamp", "anndata", "spatialdata"])
def test_there_and_back(layout: str, tmp_path: Path) -> None:
    if layout == "spatialdata":
        pytest.importorskip("pyarrow")
    store = make_full_store(tmp_path / "stores/s1.zarr")
    exported = wsi("export", layout, tmp_path / "stores", "-o", tmp_path / layout)
    assert exported.exit_code == 0, exported.output
    assert "s1: " in exported.output
    source = next((tmp_path / layout).iterdir()) if layout == "trident" else tmp_path / layout
    extra = {"clam": ("--encoder", "uni", "--slide-mpp", 0.2527), "stamp": ("--slide-mpp", 0.2527)}.get(layout, ())
    imported = wsi("import", layout, source, "-o", tmp_path / "back", *extra)
    assert imported.exit_code == 0, imported.output
    back = FeatureStore.open(tmp_path / "back/s1.zarr")
    assert np.array_equal(back.features("uni"), store.features("uni"))
    assert np.array_equal(back.origins(), store.origins())


def test_predictions_have_a_place_in_two_layouts(tmp_path: Path) -> None:
    make_store(tmp_path / "s1.zarr")
    (tmp_path / "p.csv").write_text("slide_id,prediction,prob_a,prob_b\ns1,b,0.25,0.75\n")
    for layout, code in (("anndata", 0), ("trident", 2)):
        done = wsi("export", layout, tmp_path / "s1.zarr", "-o", tmp_path / layout, "--predictions", tmp_path / "p.csv")
        assert done.exit_code == code, done.output
    assert (tmp_path / "anndata/s1.zarr/obs/prob_b/zarr.json").exists()


def test_one_bad_store_leaves_the_others_done(tmp_path: Path) -> None:
    make_store(tmp_path / "stores/s1.zarr")
    make_store(tmp_path / "stores/s2.zarr", name="s2")
    (tmp_path / "stores/s1.zarr/zarr.json").write_text("{")
    done = wsi("export", "stamp", tmp_path / "stores", "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "s1.zarr" in done.output
    assert (tmp_path / "out/uni/s2.h5").exists()
    assert "Traceback" not in done.output


def test_one_bad_file_leaves_the_others_imported(tmp_path: Path) -> None:
    for name in ("s1", "s2", "s3"):
        make_store(tmp_path / f"stores/{name}.zarr", name=name)
    wsi("export", "stamp", tmp_path / "stores", "-o", tmp_path / "out")
    (tmp_path / "out/uni/s1.h5").write_bytes(b"no HDF5")
    done = wsi("import", "stamp", tmp_path / "out", "-o", tmp_path / "back", "--slide-mpp", 0.2527)
    assert done.exit_code == 1
    assert done.stdout.split() == [str(tmp_path / "back/s2.zarr"), str(tmp_path / "back/s3.zarr")]
    assert "1 of 3 slides were not imported" in done.stderr
    assert "s1.h5" in done.stderr
    assert sorted(path.name for path in (tmp_path / "back").glob("*.zarr")) == ["s2.zarr", "s3.zarr"]


@pytest.mark.parametrize("option", [("--encoder", "uni"), ("--slide-mpp", 0.25)])
def test_options_that_mean_nothing_are_refused(tmp_path: Path, option: tuple[object, ...]) -> None:
    make_store(tmp_path / "s1.zarr")
    wsi("export", "anndata", tmp_path / "s1.zarr", "-o", tmp_path / "out")
    done = wsi("import", "anndata", tmp_path / "out", "-o", tmp_path / "back", *option)
    assert done.exit_code == 2
    assert f"leave out {option[0]}" in done.stderr
    assert not (tmp_path / "back").exists()


def test_wrong_usage(tmp_path: Path) -> None:
    assert wsi("export", "slideflow", tmp_path, "-o", tmp_path / "out").exit_code == 2
    assert wsi("export", "stamp", tmp_path, "-o", tmp_path / "out").exit_code == 2
    assert wsi("import", "stamp", tmp_path, "-o", tmp_path / "out").exit_code == 1
