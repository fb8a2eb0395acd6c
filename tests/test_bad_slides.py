"""What readers say of files that are absent, broken, cut off or lying: one sentence, never another exception."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from wsi_engine.errors import SlideError
from wsi_engine.readers import READERS, open_reader
from wsi_engine.tiffwriter import TiffLayout, write_pyramid

WIDTH, HEIGHT, TILE = 500, 400, 64
CHOICES = ("auto", *READERS)


def paint(x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[y : y + height, x : x + width]
    return np.stack([columns * 255 // WIDTH, rows * 255 // HEIGHT, (rows + columns) % 200], axis=-1).astype(np.uint8)


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    path = tmp_path / "slide.svs"
    write_pyramid(path, WIDTH, HEIGHT, paint, mpp=0.5, layout=TiffLayout(tile_px=TILE, levels=2))
    return path


def read_all(path: Path | str, reader: str = "auto") -> list[NDArray[np.uint8]]:
    """Pixels of every level, read a strip at a time as a run would."""
    opened = open_reader(path, reader)
    try:
        return [
            np.concatenate(
                [
                    opened.read(number, 0, top, level.width, min(256, level.height - top))
                    for top in range(0, level.height, 256)
                ]
            )
            for number, level in enumerate(opened.levels)
        ]
    finally:
        opened.close()


def refusal(path: Path | str, reader: str = "auto") -> str:
    """The sentence with which a source is refused, at opening or at reading."""
    with pytest.raises(SlideError) as caught:
        read_all(path, reader)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1000
    assert os.path.basename(path) in text
    return text


# ---- what is no slide at all ----


def test_no_such_file(tmp_path: Path) -> None:
    assert "there is no file" in refusal(tmp_path / "absent.svs")
    assert "there is no file" in refusal(tmp_path / "absent.svs", "image")
    assert "there is no file" in refusal((tmp_path / "absent.svs").as_uri())


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.svs").touch()
    assert "empty" in refusal(tmp_path / "empty.svs")


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "is a folder" in refusal(tmp_path / "folder")
    (tmp_path / "folder" / "b.dcm").touch()
    (tmp_path / "folder" / "a.dcm").touch()
    assert "a.dcm" in refusal(tmp_path / "folder")
    (tmp_path / "mirax").mkdir()
    (tmp_path / "mirax.mrxs").write_bytes(b"\xff\xd8\xff")
    assert "mirax.mrxs" in refusal(tmp_path / "mirax")


def test_an_mrxs_file_without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "alone.mrxs").write_bytes(b"\xff\xd8\xff\xe0 a thumbnail")
    assert "data folder" in refusal(tmp_path / "alone.mrxs")


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.svs")
    assert "no regular file" in refusal(tmp_path / "pipe.svs")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(slide: Path) -> None:
    slide.chmod(0)
    assert "permission denied" in refusal(slide)


def test_permission_errors_are_explained(slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert "permission denied" in refusal(slide)


def test_a_path_that_cannot_be() -> None:
    with pytest.raises(SlideError, match="cannot read"):
        open_reader("a\0b.svs")
    with pytest.raises(SlideError, match="cannot read"):
        open_reader("x" * 5000)


@pytest.mark.parametrize("size", [1, 3, 7, 100, 20_000])
@pytest.mark.parametrize("head", [b"", b"II*\0", b"MM\0*", b"II+\0\x08\0\0\0", b"II*\0\x08\0\0\0\xff\xff"])
def test_random_bytes(size: int, head: bytes, tmp_path: Path) -> None:
    noise = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    path = tmp_path / "noise.svs"
    path.write_bytes(head + noise)
    for reader in CHOICES:
        assert refusal(path, reader).startswith(f"cannot read {path}: ")


def test_the_sentence_names_what_was_tried(tmp_path: Path) -> None:
    (tmp_path / "notes.svs").write_text("This is a note about a slide, not the slide.")
    text = refusal(tmp_path / "notes.svs")
    assert all(reader in text for reader in READERS)
    assert text.count("notes.svs") == 1


# ---- names that lie ----


def test_pictures_named_like_slides(tmp_path: Path) -> None:
    pixels = paint(0, 0, 90, 70)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    (tmp_path / "photo.jpg").rename(tmp_path / "photo.svs")
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    (tmp_path / "photo.png").rename(tmp_path / "photo.tif")
    assert 'is a JPEG picture named .svs; rename it or open it with reader "image"' in refusal(tmp_path / "photo.svs")
    assert "is a PNG picture named .tif" in refusal(tmp_path / "photo.tif")
    np.testing.assert_array_equal(read_all(tmp_path / "photo.tif", "image")[0], pixels)
    assert read_all(tmp_path / "photo.svs", "image")[0].shape == pixels.shape


def test_damaged_pictures(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (200, 300, 3), np.uint8)
    for suffix in (".png", ".jpg"):
        path = tmp_path / f"picture{suffix}"
        Image.fromarray(noise).save(path)
        data = path.read_bytes()
        for part in (4, 20, 60, len(data) // 3, len(data) - 500):
            path.write_bytes(data[:part])
            assert refusal(path).startswith(f"cannot read {path}: tried ")


# ---- cut off ----


@pytest.mark.parametrize("reader", CHOICES)
def test_a_slide_cut_off_anywhere(reader: str, slide: Path) -> None:
    whole = read_all(slide, reader)
    data = slide.read_bytes()
    for percent in range(1, 100):
        slide.write_bytes(data[: len(data) * percent // 100])
        text = refusal(slide, reader)
        assert "level 0, x" not in text, "it should be refused when it is opened, not in the middle of a run"
    slide.write_bytes(data)
    for level, pixels in enumerate(whole):
        np.testing.assert_array_equal(read_all(slide, reader)[level], pixels)


@pytest.mark.parametrize("compression", ["jpeg2000", "lzw"])
def test_a_slide_for_openslide_cut_off_anywhere(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    layout = TiffLayout(tile_px=TILE, levels=2, compression=compression)  # type: ignore[arg-type]
    write_pyramid(path, WIDTH, HEIGHT, paint, mpp=0.5, layout=layout)
    data = path.read_bytes()
    for percent in range(5, 100, 10):
        path.write_bytes(data[: len(data) * percent // 100])
        assert "ends early" in refusal(path)


@pytest.mark.parametrize("reader", CHOICES)
def test_real_slide_cut_off(reader: str, shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "slides" / "CMU-1-Small-Region.svs"
    data = source.read_bytes()
    path = tmp_path / "cut.svs"
    for percent in range(0, 100, 5):
        path.write_bytes(data[: len(data) * percent // 100])
        text = refusal(path, reader)
        assert re.search("cannot read|ends early", text)
        assert "level 0, x" not in text


def test_other_real_slides_cut_off(shared_data: Path, tmp_path: Path) -> None:
    for name in ("TCGA-CR-7395-jpeg2000-no-mpp.svs", "camelyon-overview.dcm", "fluorescence-DAPI.ndpi"):
        source = shared_data / "slides" / name
        data = source.read_bytes()
        path = tmp_path / f"cut{source.suffix}"
        for percent in (10, 50, 90):
            path.write_bytes(data[: len(data) * percent // 100])
            assert re.search("cannot read|ends early", refusal(path))


# ---- tables that lie ----


def overwrite(path: Path, changes: dict[str, Callable[[int | tuple[int, ...]], int | tuple[int, ...]]]) -> None:
    """Change tags of the first directory in place."""
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for name, change in changes.items():
            tag = tiff.pages.first.tags[name]
            new = change(tag.value)
            tag.overwrite(new, dtype="I")


def zeros(value: int | tuple[int, ...]) -> tuple[int, ...]:
    assert isinstance(value, tuple)
    return (0,) * len(value)


LIES: dict[str, dict[str, Callable[[int | tuple[int, ...]], int | tuple[int, ...]]]] = {
    "no tile has bytes": {"TileByteCounts": zeros},
    "no tile has a place": {"TileOffsets": zeros, "TileByteCounts": zeros},
    "tiles lie past the end": {"TileOffsets": lambda v: tuple(n + 10_000_000 for n in v)},  # type: ignore[union-attr]
    "one tile reaches past the end": {"TileByteCounts": lambda v: (*v[:-1], 2**31)},  # type: ignore[index]
    "offsets at the limit": {"TileOffsets": lambda v: (2**32 - 1,) * len(v)},  # type: ignore[arg-type]
    "one tile in the table": {"TileOffsets": lambda v: v[0], "TileByteCounts": lambda v: v[0]},  # type: ignore[index]
    "absurd width": {"ImageWidth": lambda _: 2**31 - 1},
    "absurd size": {"ImageWidth": lambda _: 2**32 - 1, "ImageLength": lambda _: 2**32 - 1},
    "no width": {"ImageWidth": lambda _: 0},
    "no tile width": {"TileWidth": lambda _: 0},
    "absurd tiles": {"TileWidth": lambda _: 2**30, "TileLength": lambda _: 2**30},
    "one absurd tile": dict.fromkeys(("ImageWidth", "ImageLength", "TileWidth", "TileLength"), lambda _: 2**30),
    "unknown compression": {"Compression": lambda _: 60_001},
}

SAID = {
    "no tile has bytes": "has no pixels",
    "no tile has a place": "has no pixels",
    "tiles lie past the end": "ends early: 56 of 56 tiles",
    "one tile reaches past the end": "ends early: 1 of 56 tiles",
    "offsets at the limit": "ends early: 56 of 56 tiles",
    "one tile in the table": "its table lists 1;",
    "absurd width": "2147483647 x 400 pixels by its header",
    "absurd size": "4294967295 x 4294967295 pixels by its header",
    "no width": "cannot read",
    "no tile width": "cannot read",
    "absurd tiles": "has tiles of 1073741824 x 1073741824 pixels",
    "one absurd tile": "has tiles of 1073741824 x 1073741824 pixels",
    "unknown compression": "60001",
}
"""What a refusal of each says, whichever reader looks."""


@pytest.mark.parametrize("reader", CHOICES)
@pytest.mark.parametrize("lie", LIES)
def test_tables_that_lie(reader: str, lie: str, slide: Path) -> None:
    overwrite(slide, LIES[lie])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SAID[lie] in refusal(slide, reader)


@pytest.mark.parametrize("reader", CHOICES)
def test_directories_in_a_circle(reader: str, slide: Path) -> None:
    with tifffile.TiffFile(slide) as tiff:
        layout, last, first = tiff.tiff, tiff.pages[-1], tiff.pages[0]
        tags = len(last.tags)
        position = last.offset + layout.tagnosize + tags * layout.tagsize
        target = first.offset
    data = bytearray(slide.read_bytes())
    data[position : position + 4] = target.to_bytes(4, "little")
    slide.write_bytes(data)
    try:
        pixels = read_all(slide, reader)
    except SlideError:
        assert "cannot read" in refusal(slide, reader)
        return
    assert np.abs(pixels[0].astype(int) - paint(0, 0, WIDTH, HEIGHT)).mean() < 8


@pytest.mark.parametrize("reader", CHOICES)
def test_a_tile_of_noise(reader: str, slide: Path) -> None:
    with tifffile.TiffFile(slide) as tiff:
        offset, count = tiff.pages.first.dataoffsets[9], tiff.pages.first.databytecounts[9]
    data = bytearray(slide.read_bytes())
    data[offset : offset + count] = np.random.default_rng(5).integers(0, 255, count, np.uint8).tobytes()
    slide.write_bytes(data)
    assert re.search("not a JPEG", refusal(slide, reader), re.IGNORECASE)


def test_openslide_stays_refused_after_an_error(slide: Path) -> None:
    with tifffile.TiffFile(slide) as tiff:
        offset, count = tiff.pages.first.dataoffsets[9], tiff.pages.first.databytecounts[9]
    data = bytearray(slide.read_bytes())
    data[offset : offset + count] = bytes(count)
    slide.write_bytes(data)
    reader = open_reader(slide, "openslide")
    assert reader.read(0, 0, 0, TILE, TILE).shape == (TILE, TILE, 3)
    for _ in range(2):
        with pytest.raises(SlideError, match="OpenSlide says"):
            reader.read(0, 0, 0, WIDTH, HEIGHT)
    with pytest.raises(SlideError, match="OpenSlide says"):
        reader.read(0, 0, 0, TILE, TILE)
    reader.close()
