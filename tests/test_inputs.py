"""Lists of slides: folders, CSVs, names that are refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from wsi_engine.cohorts.roster import Roster
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
        ("slide,mpp\na.svs,0.5\n,0.5\n", 'line 3: the column "slide" is empty'),
        ("slide,mpp\n\na.svs,0.5\n,0.5\n", 'line 4: the column "slide" is empty'),
        ('slide,note,mpp\na.svs,"two\nlines",0.5\nb.svs,,0\n', "line 4: mpp must be micrometres per pixel within"),
        ("slide,mpp\na.svs,nan\n", 'line 2: mpp must be .*, not "nan"'),
        ("slide,mpp\na.svs,-3\n", 'line 2: mpp must be .*, not "-3"'),
        ("slide,mpp,mpp\na.svs,0.5,0.25\n", "has more than one column mpp"),
        ("slide,mpp\na, b.svs,0.5\n", "line 2: has 3 cells and the header 2; put texts with commas in quotes"),
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


def test_what_spreadsheets_leave(tmp_path: Path) -> None:
    table = tmp_path / "slides.csv"
    table.write_bytes(b"\xef\xbb\xbfslide , slide_id,,\r\n\r\na.svs, one ,,\r\nfile:///far/b.svs,,,\r\n,,,\r\n,\r\n")
    first, second = find_slides([table])
    assert (first.path, first.slide_id) == (str(tmp_path / "a.svs"), "one")
    assert (second.path, second.slide_id) == ("/far/b.svs", "b")


def test_slides_and_cohorts_read_a_csv_alike(tmp_path: Path) -> None:
    table = tmp_path / "slides.csv"
    table.write_text(
        "slide, mpp ,slide_id\n./sub/a.svs,0.25,\nfile:///b.svs,,c\ns3://x/y/d.svs?v=1,,\n/far/e.svs,,\n,,\n"
    )
    assert [(one.path, one.slide_id) for one in find_slides([table])] == [
        (row.slide, row.slide_id) for row in Roster.read(table)
    ]


@pytest.fixture
def bucket() -> Iterator[Any]:
    """An object store in memory, empty before and after."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


def test_a_folder_by_url(bucket: Any) -> None:
    for name in ("b.svs", "a.NDPI", "sub/c.tif", "notes.txt", ".hidden/d.svs", "x.zarr/e.tif", "dicom/1.dcm",
                 "dicom/2.dcm", "h.vms", "h/part.jpg"):  # fmt: skip
        bucket.pipe(f"/bucket/slides/{name}", b"x")
    bucket.pipe("/bucket/slides-of-others/z.svs", b"x")
    wanted = ["a", "b", "1", "h", "c"]
    for folder in ("memory://bucket/slides", "memory://bucket/slides/"):
        found = find_slides([folder], mpp=0.5)
        assert [source.slide_id for source in found] == wanted
        assert found[0].path == "memory://bucket/slides/a.NDPI"
        assert found[0].mpp == 0.5
    with pytest.raises(InputError, match="memory://bucket/slides/sub/none holds no slide") as caught:
        bucket.pipe("/bucket/slides/sub/none/notes.txt", b"x")
        find_slides(["memory://bucket/slides/sub/none"])
    assert "\n" not in str(caught.value)


def test_an_object_by_url_is_a_slide_whatever_its_name(bucket: Any) -> None:
    bucket.pipe("/bucket/slide", b"x")
    bucket.pipe("/bucket/slide.svs/part.tif", b"x")  # an ending of slides is believed, and nothing is asked
    for url in ("memory://bucket/slide", "memory://bucket/slide.svs", "memory://bucket/none", "nowhere://bucket/x"):
        assert [source.path for source in find_slides([url])] == [url]


def test_a_csv_by_url(bucket: Any) -> None:
    bucket.pipe(
        "/bucket/lists/slides.csv",
        b"slide,slide_id,mpp\n./sub/a.svs,,0.25\n../b.svs,,\n/far/c.svs,,\ns3://x/d.svs,e,\n",
    )
    url = "memory://bucket/lists/slides.csv"
    found = find_slides([url])
    assert [source.path for source in found] == [
        "memory://bucket/lists/sub/a.svs", "memory://bucket/b.svs", "/far/c.svs", "s3://x/d.svs",
    ]  # fmt: skip
    assert [source.slide_id for source in found] == ["a", "b", "c", "e"]
    assert [row.slide for row in Roster.read(url)] == [source.path for source in found]
    with pytest.raises(InputError, match=r"cannot read memory://bucket/lists/none\.csv"):
        find_slides(["memory://bucket/lists/none.csv"])


def test_pictures_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.jpg", "slide.vms", "slide/part.jpg")
    monkeypatch.chdir(tmp_path)
    assert [source.slide_id for source in find_slides(["."])] == ["a", "slide"]


def test_nothing_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no slide"):
        find_slides([tmp_path])
    with pytest.raises(InputError, match="no slide was named"):
        find_slides([])


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "a\0b", "a:b", "x" * 151, "é" * 76, "a\nb"]
)
def test_names_that_would_leave_the_folder(name: str) -> None:
    with pytest.raises(InputError):
        check_slide_id(name, "here")


def test_ordinary_names_pass() -> None:
    for name in ("TCGA-CR-7395-01Z-00-DX1.8E6B", "slide 12 (b)", "Präparat_7", "x" * 150, "é" * 75):
        assert check_slide_id(name, "here") == name


def test_names_that_are_not_in_utf_8(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.svs")
    Path(path).touch()
    for given in (path, tmp_path):
        with pytest.raises(InputError, match=r"'\\udcff' .* is not in UTF-8: rename the file") as caught:
            find_slides([given])
        str(caught.value).encode()  # it can be printed
