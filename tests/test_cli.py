"""The command line: what it prints, where, and how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from wsi_engine import FeatureStore
from wsi_engine.cli.app import app


def wsi(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_help_names_every_command() -> None:
    result = wsi("--help")
    assert result.exit_code == 0
    commands = "info encoders extract train evaluate classify nuclei status check import export bench demo"
    for command in commands.split():
        assert command in result.stdout
        assert wsi(command, "--help").exit_code == 0


def test_version() -> None:
    from wsi_engine.version import __version__

    assert wsi("--version").stdout == f"wsi-engine {__version__}\n"


def test_info(picture: Path) -> None:
    result = wsi("info", picture, "--slide-mpp", 0.5)
    assert result.exit_code == 0
    assert "1600 × 1200 px" in result.stdout
    assert "reader       image" in result.stdout
    assert "override" in result.stdout
    facts = json.loads(wsi("info", picture, "--json").stdout)
    assert facts["mpp"] is None
    assert "--slide-mpp" in facts["mpp_problem"]
    assert facts["reader"] == "image"


def test_encoders_are_listed() -> None:
    cards = json.loads(wsi("encoders", "--json").stdout)
    names = {card["name"] for card in cards}
    assert {"texture", "resnet50", "uni", "virchow2"} <= names
    for name in names:
        assert name in wsi("encoders").stdout


def test_extract(picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = wsi("extract", picture, "-o", out, "--encoder", "texture", "--slide-mpp", 0.5, "--tile-px", 64)
    assert result.exit_code == 0, result.output
    assert "1 done" in result.stdout
    assert "thread-seconds" in result.stdout
    assert len(FeatureStore.open(out / "picture.zarr").features("texture")) > 100
    again = wsi("extract", picture, "-o", out, "--encoder", "texture", "--slide-mpp", 0.5, "--tile-px", 64)
    assert again.exit_code == 0
    assert "already complete" in again.output


def test_extract_json_is_one_document(picture: Path, tmp_path: Path) -> None:
    arguments = ("extract", picture, "-o", tmp_path / "o", "--encoder", "texture", "--slide-mpp", 0.5, "--json")
    report = json.loads(wsi(*arguments).stdout)
    assert report["encoder"] == "texture"
    assert report["slides"][0]["status"] == "done"


def test_one_bad_slide_ends_in_1_after_the_others(picture: Path, tmp_path: Path) -> None:
    (picture.parent / "broken.svs").write_bytes(b"no slide")
    result = wsi("extract", picture.parent, "-o", tmp_path / "o", "--encoder", "texture", "--slide-mpp", 0.5)
    assert result.exit_code == 1
    assert "1 failed, 1 done" in result.stdout
    assert "broken" in result.stdout
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (("extract", "{slides}", "-o", "{out}", "--encoder", "resnet51"), 1, "resnet51"),
        (("extract", "{slides}", "-o", "{out}", "--encoder", "texture", "--mpp", "-1"), 2, "--mpp"),
        (("extract", "{slides}", "-o", "{out}", "--encoder", "texture", "--tile-px", "0"), 2, "--tile-px"),
        (("extract", "{empty}", "-o", "{out}", "--encoder", "texture"), 2, "holds no slide"),
        (("extract", "{csv}", "-o", "{out}", "--encoder", "texture"), 2, 'no column "slide"'),
        (("extract", "{escape}", "-o", "{out}", "--encoder", "texture"), 2, "cannot name a store"),
        (("extract", "{slides}", "-o", "{file}", "--encoder", "texture"), 2, "output folder"),
        (("extract", "{slides}"), 2, "--out"),
        (("extract", "{slides}", "-o", "{out}", "--dtype", "int8"), 2, "dtype"),
        (("info", "{missing}"), 1, "missing.svs"),
        (("export", "trident", "{empty}", "-o", "{out}"), 2, "no store"),
        (("export", "slideflow", "{empty}", "-o", "{out}"), 2, "slideflow"),
        (("import", "clam", "{empty}", "-o", "{out}"), 2, "--encoder"),
        (("import", "clam", "{empty}", "-o", "{out}", "--encoder", "uni"), 1, "--slide-mpp"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_wrong_usage_is_one_sentence(
    picture: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, match: str
) -> None:
    places = {name: tmp_path / name for name in ("out", "empty", "file", "csv", "escape", "missing")}
    places["csv"], places["escape"] = tmp_path / "a.csv", tmp_path / "b.csv"
    places["missing"] = tmp_path / "missing.svs"
    places["empty"].mkdir()
    places["file"].touch()
    places["csv"].write_text("path\nx\n")
    places["escape"].write_text("slide,slide_id\nx.svs,../x\n")
    filled = [argument.format(slides=picture.parent, **places) for argument in arguments]
    result = wsi(*filled)
    assert result.exit_code == code, result.output
    assert match in result.output.replace("\n", " ")
    assert "Traceback" not in result.output
    assert not places["out"].exists() or not any(places["out"].iterdir())


def test_export_and_import(picture: Path, tmp_path: Path) -> None:
    wsi("extract", picture, "-o", tmp_path / "o", "--encoder", "texture", "--slide-mpp", 0.5)
    for layout, extra in (("trident", ()), ("clam", ("--encoder", "texture", "--slide-mpp", 0.5))):
        assert wsi("export", layout, tmp_path / "o", "-o", tmp_path / layout).exit_code == 0
        source = next((tmp_path / layout).iterdir()) if layout == "trident" else tmp_path / layout
        result = wsi("import", layout, source, "-o", tmp_path / f"{layout}-back", *extra)
        assert result.exit_code == 0, result.output
        back = FeatureStore.open(tmp_path / f"{layout}-back" / "picture.zarr")
        store = FeatureStore.open(tmp_path / "o" / "picture.zarr")
        assert np.array_equal(back.features("texture"), store.features("texture"))
        assert np.array_equal(back.origins(), store.origins())


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    code = "from wsi_engine.cli import main; main()"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *arguments, "info", str(tmp_path / "missing.svs")]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    done = run("--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    done = run()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


_SLOW_WSI = """
import sys, time
from wsi_engine.extraction import extract_sources
import wsi_engine.encoders.texture as texture
plain = texture.TextureEncoder.encode
calls = 0
def slow(self, pixels):
    global calls
    calls += 1
    print("encoding", flush=True)
    time.sleep(60 if calls == 4 else 0)  # until the signal comes
    return plain(self, pixels)
texture.TextureEncoder.encode = slow
from wsi_engine.cli import main
main()
"""


def test_ctrl_c_ends_cleanly_and_the_next_run_goes_on(picture: Path, tmp_path: Path) -> None:
    options = ["extract", str(picture), "-o", str(tmp_path / "o"), "--encoder", "texture", "--slide-mpp", "0.5"]
    options += ["--tile-px", "48", "--batch-size", "8"]
    command = [sys.executable, "-c", _SLOW_WSI, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(4):
            process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["picture.zarr"]  # the lease is given back
    result = wsi(*options)
    assert result.exit_code == 0
    assert "already stored" in result.output


def test_tables_cut_no_word() -> None:
    """A path that is wider than the terminal is broken over lines, and all of it is there."""
    import io

    from rich.console import Console
    from rich.text import Text

    from wsi_engine.cli.console import make_table

    path, target = "/a/" + "long-folder/" * 12 + "slide.svs", io.StringIO()
    table = make_table("failed", "why")
    table.add_row(Text("slide"), Text(f"cannot read {path}: it is damaged"))
    Console(file=target, width=60).print(table)
    assert path in "".join(target.getvalue().split()).replace("failedwhy", "")
