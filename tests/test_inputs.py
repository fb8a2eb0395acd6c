"""Lists of slides: folders, CSVs, names that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsi_engine.errors import InputError
from wsi_engine.inputs import check_slide_id, find_slides


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def ids(folder: Path, *inputs: str) -> list[str]:
    return [source.slide_id for source in find_slides([folder / name for name in inputs])]


def test_folders_are_searched_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "b.svs", "a.NDPI", "sub/c.mrxs", "sub/c/Data0.dat", "notes.txt", ".hidden/d.svs", "x.zarr/e.tif")
    assert ids(tmp_path, ".") == ["a", "b", "c"]


def test_one_dicom_slide_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "one/1.dcm", "one/2.dcm", "two/3.dcm")
    assert ids(tmp_path, ".") == ["1", "3"]


def test_files_keep_their_order(tmp_path: Path) -> None:
    assert ids(tmp_path, "z.svs", "a.svs") == ["z", "a"]
    assert find_slides(["s3://bucket/k/x.svs"])[0].slide_id == "x"


def test_csv(tmp_path: Path) -> None:
    table = tmp_path / "slides.csv"
    table.write_text("slide,slide_id,mpp,label\nsub/a.svs,first,0.25,x\n/abs/b.svs,,,y\ns3://bucket/c.svs,,,\n")
    first, second, third = find_slides([table], mpp=0.5)
    assert (first.path, first.slide_id, first.mpp) == (str(tmp_path / "sub/a.svs"), "first", 0.25)
    assert (second.path, second.slide_id, second.mpp) == ("/abs/b.svs", "b", 0.5)
    assert third.path == "s3://bucket/c.svs"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("path\na.svs\n", 'no column "slide"'),
        ("", 'no column "slide"'),
        ("slide\n", "lists no slide"),
        ("slide,mpp\na.svs,wide\n", "line 2: mpp"),
        ("slide,mpp\na.svs,0.5\n,\n", 'line 3: the column "slide" is empty'),
        ("slide\na.svs\nother/a.svs\n", 'both be kept as "a"'),
        ("slide,slide_id\na.svs,x\nb.svs,X\n", "both be kept as"),
        ("slide,slide_id\na.svs,../x\n", "line 2"),
        ("slide,slide_id\na.svs,a/b\n", "cannot name a store"),
    ],
)
def test_bad_csvs_get_one_sentence(tmp_path: Path, content: str, match: str) -> None:
    table = tmp_path / "slides.csv"
    table.write_text(content)
    with pytest.raises(InputError, match=match) as caught:
        find_slides([table])
    assert "\n" not in str(caught.value)


def test_a_csv_that_is_none(tmp_path: Path) -> None:
    table = tmp_path / "slides.csv"
    table.write_bytes(b"\xff\xfe\x00slide")
    with pytest.raises(InputError, match="UTF-8"):
        find_slides([table])
    with pytest.raises(InputError, match="cannot read"):
        find_slides([tmp_path / "missing.csv"])


def test_nothing_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no slide"):
        find_slides([tmp_path])
    with pytest.raises(InputError, match="no slide was named"):
        find_slides([])


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "a\0b", "a:b", "x" * 201, "a\nb"])
def test_names_that_would_leave_the_folder(name: str) -> None:
    with pytest.raises(InputError):
        check_slide_id(name, "here")


def test_ordinary_names_pass() -> None:
    for name in ("TCGA-CR-7395-01Z-00-DX1.8E6B", "slide 12 (b)", "Präparat_7", "x" * 200):
        assert check_slide_id(name, "here") == name
