"""Fixtures that all tests share."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import settings
from numpy.typing import NDArray
from PIL import Image
from support import HEIGHT, WIDTH, Files, paint
from support_study import draw_study

from wsi_engine.tiffwriter import TiffLayout, write_pyramid

settings.register_profile("engine", deadline=None)  # a busy machine is not a failure
settings.load_profile("engine")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a job in the background has it, and what it starts inherits
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch with one thread: small products are faster so, and tests of other modules keep theirs."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real slides and nuclei beside the project; skips the test where it is absent."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real data folder {folder}")
    return folder


@pytest.fixture(scope="session")
def tissue_image() -> NDArray[np.uint8]:
    """A picture, uint8 (1200, 1600, 3), to be taken for 0.5 µm per pixel: a pink disk with texture on white glass."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:1200, :1600]
    inside = (x - 700) ** 2 + (y - 600) ** 2 < 450**2
    noise = rng.integers(-12, 13, (1200, 1600, 1))
    pink = np.clip(np.array([210, 130, 180]) + noise, 0, 255)
    glass = np.clip(244 + rng.integers(-2, 3, (1200, 1600, 1)) + np.zeros(3, int), 0, 255)
    image: NDArray[np.uint8] = np.where(inside[..., None], pink, glass).astype(np.uint8)
    return image


@pytest.fixture
def picture(tmp_path: Path, tissue_image: NDArray[np.uint8]) -> Path:
    """``tissue_image`` as the only PNG in a folder of its own."""
    path = tmp_path / "slides" / "picture.png"
    path.parent.mkdir()
    Image.fromarray(tissue_image).save(path)
    return path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A generated JPEG slide of three levels at 0.2527 µm per pixel, and its level 0 as PNG."""
    folder = tmp_path_factory.mktemp("slides")
    slide = folder / "slide.svs"
    layout = TiffLayout(tile_px=128, levels=3, quality=90)
    write_pyramid(slide, WIDTH, HEIGHT, paint, mpp=0.2527, layout=layout)
    with tifffile.TiffFile(slide) as tiff:
        Image.fromarray(tiff.pages.first.asarray()).save(folder / "picture.png")
    return Files(slide, folder / "picture.png")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """An S3 server for one test; see ``support_s3.S3Server``."""
    from support_s3 import serve_s3  # skips the test where moto is not installed

    with serve_s3(monkeypatch) as server:
        yield server


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study."""
    return draw_study(tmp_path_factory.mktemp("drawn")).parent


@pytest.fixture
def study(drawn: Path, tmp_path: Path) -> Path:
    """``cohort.csv`` beside the pictures, to be changed."""
    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    return tmp_path / "cohort.csv"
