"""Slides and stores by URL, on a real S3 server: the same bytes as on a disk, and no more of a slide than is needed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from skimage.data import immunohistochemistry
from support_cohort import write_cohort
from support_faults import MeanEncoder
from support_s3 import BUCKET, S3Server
from typer.testing import CliRunner

import wsi_engine as we
from wsi_engine.bags import StoredBags
from wsi_engine.classification.explanation import ExplainSettings
from wsi_engine.classification.slides import classify
from wsi_engine.cli.app import app
from wsi_engine.cluster.choice import ClusterChoice
from wsi_engine.errors import FeatureError, InputError, StoreError
from wsi_engine.nuclei.slides import segment_slides
from wsi_engine.tiffwriter import TiffLayout, write_pyramid
from wsi_engine.training.run import train_head

SIDE, TILE, TISSUE = 3072, 256, 1024
"""Pixels of the slide, of its tiles, and of the tissue in its upper left corner."""

GRID = {"mpp": 0.5, "tile_px": TILE, "batch_size": 4, "workers": 2}


def paint(x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
    """Noise everywhere, so that no part of the file is small; purple where there is tissue."""
    rows, columns = np.mgrid[y : y + height, x : x + width]
    noise = ((rows * 7919 + columns * 104_729) % 31).astype(np.uint8)
    tissue = (rows < TISSUE) & (columns < TISSUE)
    return np.where(tissue[..., None], np.array([150, 80, 160], np.uint8), np.uint8(224)) + noise[..., None]


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "slide.svs"
    write_pyramid(path, SIDE, SIDE, paint, mpp=0.5, layout=TiffLayout(tile_px=TILE, levels=3, quality=90))
    return path


@pytest.fixture(scope="module")
def local(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same slide's store on a disk."""
    out = tmp_path_factory.mktemp("local")
    assert not we.extract(slide, out, MeanEncoder(), reader="tiffslide", **GRID).failed
    return out / "slide.zarr"


@pytest.fixture
def on_s3(s3: S3Server, slide: Path) -> str:
    return s3.put("slides/slide.svs", slide.read_bytes())


@pytest.fixture
def out(s3: S3Server) -> str:
    return f"{s3.url}/features"


def data_of(s3: S3Server) -> dict[str, bytes]:
    """Every chunk of the store, by its path in it; the attributes hold times."""
    prefix = "features/slide.zarr/"
    return {key.removeprefix(prefix): s3.get(key) for key in s3.keys(prefix) if "/c/" in key}


def data_in(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if "c" in p.parts and p.is_file()}


def overlaps(spans: list[tuple[int, int]], first: int, last: int) -> bool:
    return any(start <= last and first <= end for start, end in spans)


def test_a_store_on_s3_is_that_of_a_disk(s3: S3Server, on_s3: str, out: str, local: Path) -> None:
    (result,) = we.extract(on_s3, out, MeanEncoder(), **GRID).results
    assert (result.status, result.store) == ("done", f"{out}/slide.zarr")
    assert data_of(s3) == data_in(local)
    assert not [key for key in s3.keys("features/") if key.startswith("features/.")]  # no lease, no draft, no failure
    store, expected = we.FeatureStore.open(f"{out}/slide.zarr"), we.FeatureStore.open(local)
    assert np.array_equal(store.features(), expected.features())
    assert np.array_equal(store.origins(), expected.origins())
    assert store.slide == expected.slide
    assert np.array_equal(store.tissue().mask, expected.tissue().mask)  # type: ignore[union-attr]
    assert np.array_equal(StoredBags([f"{out}/slide.zarr"]).load(0), expected.features())
    (again,) = we.extract(on_s3, out, MeanEncoder(), **GRID).results
    assert again.status == "already complete"


def test_only_the_bytes_that_are_needed(
    s3: S3Server,
    on_s3: str,
    out: str,
    slide: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wsi_engine.readers.tiffslide.BLOCK_BYTES", 1 << 15)
    monkeypatch.setattr("wsi_engine.fingerprint._ENDS", 1 << 12)
    monkeypatch.setattr("wsi_engine.fingerprint._SAMPLE", 1 << 10)
    (result,) = we.extract(on_s3, out, MeanEncoder(), **GRID).results
    assert result.tiles == (TISSUE // TILE) ** 2
    asked = [one for one in s3.reads_of("slide.svs") if one.range is not None]
    assert len(asked) == len(s3.reads_of("slide.svs"))  # the slide is never fetched whole
    blocks = [one.range for one in asked if one.sent > 1 << 12]
    assert len(blocks) == len(set(blocks))  # nothing twice
    with tifffile.TiffFile(slide) as file:
        page = file.pages[0]
        spans = [(at, at + n - 1) for at, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
        across = SIDE // TILE
        needed = [spans[row * across + column] for row in range(TISSUE // TILE) for column in range(TISSUE // TILE)]
        others = [page.offset for page in file.pages] + [at for page in file.pages[1:] for at in page.dataoffsets]
    level0 = [
        block for block in blocks if overlaps(spans, *block) and not any(block[0] <= at <= block[1] for at in others)
    ]
    assert level0
    assert all(overlaps(needed, *block) for block in level0)  # every block of level 0 holds some of a tile with tissue
    assert sum(one.sent for one in asked) < slide.stat().st_size / 2


class StoppedEncoder(MeanEncoder):
    """Fails after some batches."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left = batches

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.left -= 1
        if self.left < 0:
            raise FeatureError("that is enough")
        return super().encode(pixels)


def test_a_run_goes_on_where_it_stopped(s3: S3Server, on_s3: str, out: str, local: Path) -> None:
    (failed,) = we.extract(on_s3, out, StoppedEncoder(2), **GRID).failed
    assert failed.message == "that is enough"
    assert [one.detail for one in we.Cohort.read([{"slide": on_s3}]).status(out=out).having("failed")] == [
        "that is enough"
    ]
    encoder = StoppedEncoder(2)  # four batches, of which two are there
    assert not we.extract(on_s3, out, encoder, **GRID).failed
    assert encoder.left == 0
    assert data_of(s3) == data_in(local)


@pytest.mark.parametrize("torn", [b"", b"\x00" * 100])
def test_a_torn_batch_is_made_again(s3: S3Server, on_s3: str, out: str, local: Path, torn: bytes) -> None:
    we.extract(on_s3, out, StoppedEncoder(3), **GRID)
    batches = s3.keys("features/slide.zarr/features/mean/partial/c/")
    assert len(batches) == 3
    s3.put(batches[-1], torn)
    encoder = StoppedEncoder(2)
    assert not we.extract(on_s3, out, encoder, **GRID).failed
    assert encoder.left == 0
    assert data_of(s3) == data_in(local)


def test_a_server_that_stumbles(s3: S3Server, on_s3: str, out: str, local: Path) -> None:
    """A few answers are 503, as of a server that is asked too often."""
    s3.fault = lambda method, path, number: 503 if number % 7 in (3, 4) else None
    assert not we.extract(on_s3, out, MeanEncoder(), **GRID).failed
    s3.fault = lambda method, path, number: None
    assert data_of(s3) == data_in(local)


def test_a_server_that_refuses_to_write(s3: S3Server, on_s3: str, out: str, local: Path) -> None:
    s3.fault = lambda method, path, number: 403 if method == "PUT" and "/partial/c/" in path else None
    (failed,) = we.extract(on_s3, out, MeanEncoder(), **GRID).failed
    assert failed.message.startswith(f"cannot use the store {out}/slide.zarr: ")
    assert "\n" not in failed.message
    s3.fault = lambda method, path, number: 403 if method == "PUT" else None
    with pytest.raises(InputError, match=f"cannot write to the output folder {out}"):
        we.extract(on_s3, out, MeanEncoder(), **GRID)
    s3.fault = lambda method, path, number: None
    assert not we.extract(on_s3, out, MeanEncoder(), **GRID).failed
    assert data_of(s3) == data_in(local)


def test_damage_is_noticed(s3: S3Server, on_s3: str, out: str) -> None:
    we.extract(on_s3, out, MeanEncoder(), **GRID)
    assert not we.check_stores(out).findings
    (shard,) = s3.keys("features/slide.zarr/features/mean/values/c/")
    data = bytearray(s3.get(shard))
    data[10] ^= 1
    s3.put(shard, bytes(data))
    (finding,) = we.check_stores(out).findings
    assert (finding.kind, finding.path) == ("damaged", f"s3://{BUCKET}/{shard}")
    with pytest.raises(StoreError, match=r"is damaged .*checksum"):
        we.FeatureStore.open(f"{out}/slide.zarr").features()
    with pytest.raises(StoreError, match="there is no store at"):
        we.FeatureStore.open(f"{out}/other.zarr")


def test_the_command_line(s3: S3Server, on_s3: str, out: str, local: Path) -> None:
    def wsi(*arguments: str) -> str:
        done = CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        return done.stdout

    shared = ["--encoder", "texture", "--mpp", "0.5", "--tile-px", str(TILE)]
    assert f"1 done in {out}" in wsi("extract", on_s3, "-o", out, *shared)
    report = json.loads(wsi("status", out, "--json"))
    assert report["jobs"]["features/texture"]["done"] == 1
    assert "1 store and 0 runs" in wsi("check", out)


KILLED = """
import os, sys
from skimage.data import immunohistochemistry
from support_cohort import write_cohort
from support_faults import MeanEncoder
import wsi_engine as we

class Killed(MeanEncoder):
    left = 3
    def encode(self, pixels):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), 9)
        return super().encode(pixels)

we.extract(sys.argv[1], sys.argv[2], Killed(), mpp=0.5, tile_px=256, batch_size=4, workers=2)
"""


def test_a_killed_process(s3: S3Server, on_s3: str, out: str, local: Path) -> None:
    """Its lease is taken over at once, and what it stored is gone on with."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    killed = subprocess.run([sys.executable, "-c", KILLED, on_s3, out], env=environment, timeout=120, check=False)
    assert killed.returncode == -9
    assert "features/.slide.lease" in s3.keys("features/.")
    state = we.Cohort.read([{"slide": on_s3}]).status(["features/mean"], out=out)
    assert [one.state for one in state.states] == ["pending"]
    assert [one.kind for one in we.check_stores(out).findings if ".lease" in one.path] == ["leftover"] * 2
    assert not we.extract(on_s3, out, MeanEncoder(), **GRID).failed
    assert data_of(s3) == data_in(local)
    assert not s3.keys("features/.")


@pytest.fixture(autouse=True)
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that stumbles is asked again after longer and longer pauses."""
    import s3fs.core

    sleep = s3fs.core.asyncio.sleep
    monkeypatch.setattr(s3fs.core.asyncio, "sleep", lambda seconds, *rest: sleep(min(seconds, 0.01), *rest))


def test_a_server_without_conditional_puts(s3: S3Server, on_s3: str, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsi_engine.leaserecord._proven", set())
    s3.conditional = False
    (failed,) = we.extract(on_s3, out, MeanEncoder(), **GRID).failed
    assert "conditional puts (If-None-Match)" in failed.message
    assert all(
        key.endswith(".failed.json") for key in s3.keys("features/")
    )  # no store, and no lease that is in the way


def test_training_and_classifying_by_url(s3: S3Server, tmp_path: Path) -> None:
    """Features that lie in a bucket alone: the run and its predictions are those of features on a disk."""
    cohort = write_cohort(tmp_path, 16, 8)
    for file in sorted((cohort / "features").rglob("*")):
        if file.is_file():
            s3.put(str(file.relative_to(cohort)), file.read_bytes())
    settings = {"settings": we.TrainSettings(epochs=2, device="cpu"), "splits": we.SplitSettings(folds=2)}
    for where, features in (("disk", cohort / "features"), ("url", f"{s3.url}/features")):
        train_head(cohort / "cohort.csv", features, "subtype", tmp_path / where / "run", head="abmil", **settings)  # type: ignore[arg-type]
        report = classify(
            features, tmp_path / where / "run", tmp_path / where / "out", device="cpu",
            settings=ExplainSettings(heatmaps=False, geojson=False, sheets=False),
        )  # fmt: skip
        assert not report.failed
        assert len(report.results) == 16
    for name in ("run/fold-0/head.safetensors", "run/predictions.csv"):
        assert (tmp_path / "disk" / name).read_bytes() == (tmp_path / "url" / name).read_bytes()
    stores = [we.FeatureStore.open(f"{root}/slide-03.zarr") for root in (cohort / "features", f"{s3.url}/features")]
    assert np.array_equal(*(store.attention("run") for store in stores))


def test_workers_of_a_cluster(s3: S3Server, on_s3: str, out: str, tmp_path: Path) -> None:
    """Local workers share a slide that is too large for one of them, and write to the bucket."""
    pytest.importorskip("distributed")
    grid = {"tile_px": 64, "mpp": 0.5, "batch_size": 32, "workers": 1}
    assert not we.extract(on_s3, tmp_path, "texture", **grid).failed
    choice = ClusterChoice.parse("local:2")
    report = we.extract(on_s3, out, "texture", cluster=dataclasses.replace(choice, part_tiles=64), **grid)
    assert [one.status for one in report.results] == ["done"]
    assert data_of(s3) == data_in(tmp_path / "slide.zarr")
    assert not s3.keys("features/.")


def test_nuclei_by_url(s3: S3Server, tmp_path: Path) -> None:
    """Store and files are those of a disk; what is there is not made again."""
    path = tmp_path / "ihc.svs"
    tissue = immunohistochemistry()
    height, width = tissue.shape[:2]
    layout = TiffLayout(tile_px=TILE, levels=1, quality=95)
    write_pyramid(path, width, height, lambda x, y, w, h: tissue[y : y + h, x : x + w], mpp=0.5, layout=layout)
    url, out = s3.put("slides/ihc.svs", path.read_bytes()), f"{s3.url}/nuclei"
    (here,) = segment_slides(path, tmp_path / "out", "stain", reader="tiffslide").results
    (there,) = segment_slides(url, out, "stain").results
    assert there.nuclei == here.nuclei > 50
    files = {name.removeprefix("nuclei/") for name in s3.keys("nuclei/")}
    assert files == {str(one.relative_to(tmp_path / "out")) for one in (tmp_path / "out").rglob("*") if one.is_file()}
    for name in files:
        if not name.endswith("zarr.json"):
            assert s3.get(f"nuclei/{name}") == (tmp_path / "out" / name).read_bytes(), name
    (again,) = segment_slides(url, out, "stain").results
    assert (again.status, again.nuclei) == ("already complete", here.nuclei)
