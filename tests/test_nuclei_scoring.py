"""``wsi evaluate nuclei``: label images found by name, compared, and reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner, Result

from wsi_engine import errors
from wsi_engine.cli.app import app
from wsi_engine.metrics import score_nuclei
from wsi_engine.nuclei.scoring import compare_nuclei, list_label_images, read_labels

Labels = NDArray[np.int32]


def squares(shift: int = 0, count: int = 5) -> Labels:
    """Squares of 8 pixels, moved to the right."""
    out = np.zeros((40, 90), np.int32)
    for k in range(count):
        out[10:18, 10 + 14 * k + shift : 18 + 14 * k + shift] = 3 * k + 2
    return out


def save(labels: NDArray[np.integer], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, labels)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, labels.astype(np.uint32))
    else:
        Image.fromarray(labels.astype(np.uint16)).save(path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions as wsi nuclei writes them, and truth beside pictures."""
    predicted, truth = tmp_path / "predicted", tmp_path / "truth"
    for name, shift in (("a", 0), ("b.c", 2)):
        save(squares(shift), predicted / f"{name}.student.labels.tif")
        save(squares(), truth / f"{name}_label.png")
        Image.fromarray(np.zeros((40, 90, 3), np.uint8)).save(truth / f"{name}.png")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(predicted / "a.student.png")
    return predicted, truth


def wsi(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_folders_are_matched_by_name(folders: tuple[Path, Path]) -> None:
    found = compare_nuclei(*folders)
    assert [image.name for image in found.images] == ["a", "b.c"]
    assert found.images[0].scores is not None
    assert found.images[0].scores.aji == 1
    assert found.images[1].scores == score_nuclei(squares(), squares(2))
    assert not found.failed
    means = found.means()
    assert means["aji"] == pytest.approx((1 + score_nuclei(squares(), squares(2)).aji) / 2)
    assert means["true_count"] == 10


def test_two_images_need_no_common_name(tmp_path: Path) -> None:
    save(squares(1), tmp_path / "ours.npy")
    save(squares(), tmp_path / "truth.png")
    (image,) = compare_nuclei(tmp_path / "ours.npy", tmp_path / "truth.png").images
    assert image.scores == score_nuclei(squares(), squares(1))


def test_plain_names_do_when_nothing_is_marked(tmp_path: Path) -> None:
    save(squares(), tmp_path / "x.png")
    save(squares(), tmp_path / "y.tif")
    assert list(list_label_images(tmp_path)) == ["x", "y"]


def test_what_cannot_be_compared_is_said_and_the_rest_is_done(folders: tuple[Path, Path]) -> None:
    predicted, truth = folders
    save(squares(), predicted / "alone.stain.labels.tif")
    save(squares()[:20], truth / "b.c_label.png")
    save(squares(), truth / "missing_label.png")
    (truth / "text_label.png").write_text("no picture")
    save(squares(), predicted / "text.labels.tif")
    found = compare_nuclei(predicted, truth)
    problems = {image.name: image.problem for image in found.failed}
    assert set(problems) == {"b.c", "missing", "text"}
    assert "no predicted image" in problems["missing"]
    assert "cannot read the label image" in problems["text"]
    assert found.unused == ("alone",)
    result = wsi("evaluate", "nuclei", predicted, truth)
    assert result.exit_code == 1
    assert "mean of 1" in result.stdout
    assert "error: missing: no predicted image" in result.stderr
    assert "passed over: alone" in result.stderr


def test_damaged_label_images_do_not_end_the_comparison(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted, truth = folders
    for name in ("deflate", "empty", "bomb", "torn"):
        save(squares(), truth / f"{name}_label.png")
    tifffile.imwrite(predicted / "deflate.labels.tif", squares().astype(np.uint16), compression="zlib")
    with tifffile.TiffFile(predicted / "deflate.labels.tif") as file:
        start = file.pages[0].dataoffsets[0]
    data = bytearray((predicted / "deflate.labels.tif").read_bytes())
    data[start : start + 8] = b"\xff" * 8
    (predicted / "deflate.labels.tif").write_bytes(data)
    (predicted / "empty.labels.npy").write_bytes(b"")
    save(np.tile(squares(), (4, 4)), predicted / "bomb.labels.png")
    (predicted / "torn.labels.tif").write_bytes((predicted / "a.student.labels.tif").read_bytes()[:60])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)  # twice as many are a bomb
    found = compare_nuclei(predicted, truth)
    problems = {image.name: image.problem for image in found.failed}
    assert set(problems) == {"deflate", "empty", "bomb", "torn"}
    for problem in problems.values():
        assert problem.startswith("cannot read the label image")
        assert "\n" not in problem
    assert len(found.images) == 6


def test_distances_that_are_not_defined_do_not_spoil_the_mean(tmp_path: Path) -> None:
    for name, ours in (("a", squares(1)), ("b", np.zeros((40, 90), np.int32))):
        save(ours, tmp_path / "ours" / f"{name}.png")
        save(squares(), tmp_path / "truth" / f"{name}.png")
    result = wsi("evaluate", "nuclei", tmp_path / "ours", tmp_path / "truth", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["images"][1]["hausdorff_95"] is None
    assert report["mean"]["hausdorff_95"] == report["images"][0]["hausdorff_95"]
    assert report["mean"]["aji"] == pytest.approx(report["images"][0]["aji"] / 2)
    assert "n/a" in wsi("evaluate", "nuclei", tmp_path / "ours", tmp_path / "truth").stdout


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "colour.png")
    np.save(tmp_path / "float.npy", np.zeros((4, 4)))
    for name in ("colour.png", "float.npy"):
        with pytest.raises(errors.InputError, match="one channel of whole numbers"):
            read_labels(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.InputError, match="no label images"):
        compare_nuclei(tmp_path / "empty", tmp_path)
    save(squares(), tmp_path / "two" / "a.student.labels.tif")
    save(squares(), tmp_path / "two" / "a.stain.labels.tif")
    with pytest.raises(errors.InputError, match="two label images of a"):
        compare_nuclei(tmp_path / "two", tmp_path)
    result = wsi("evaluate", "nuclei", tmp_path / "nowhere", tmp_path)
    assert result.exit_code == 2
    assert "there is nothing at" in result.stderr


def test_a_run_is_still_evaluated_without_a_word_between(tmp_path: Path) -> None:
    for arguments in (("evaluate", tmp_path / "run"), ("evaluate", "run", tmp_path / "run")):
        result = wsi(*arguments)
        assert result.exit_code == 2
        assert "run" in result.stderr
    assert "--against" in wsi("evaluate", "run", "--help").stdout
    assert "nuclei" in wsi("evaluate", "--help").stdout
