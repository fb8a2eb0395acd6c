"""HDF5 files that the library crashes on or never ends: the other process meets them first."""

from __future__ import annotations

import threading
from pathlib import Path

import h5py
import numpy as np
import pytest

from wsi_engine.errors import FormatError
from wsi_engine.formats import probe
from wsi_engine.formats.hdf5 import reading

CRASHES = (
    "import os, sys, signal\nos.write(1, b'ready\\n')\nsys.stdin.readline()\nos.kill(os.getpid(), signal.SIGSEGV)\n"
)
HANGS = "import os, time\nos.write(1, b'ready\\n')\ntime.sleep(1000)\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = np.ones((3, 4))
        file.attrs["name"] = "a"
    return tmp_path / "a.h5"


def test_one_process_serves_many_files(file: Path) -> None:
    prober = probe._Prober()
    assert prober.check(file) == ""
    child = prober._child
    (file.parent / "b.h5").write_bytes(b"no HDF5 at all")
    assert prober.check(file.parent / "b.h5") == ""  # the reader says what is wrong with it
    assert prober.check(file) == ""
    assert prober._child is child
    prober.stop()
    assert prober.check(file) == ""
    prober.stop()


def test_threads_take_turns(file: Path) -> None:
    prober, found = probe._Prober(), []
    threads = [threading.Thread(target=lambda: found.append(prober.check(file))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    prober.stop()
    assert found == [""] * 8


DIES = "raise SystemExit(1)\n"
SAYS_OTHERWISE = "import os, time\nos.write(1, b'hello\\n')\ntime.sleep(1000)\n"


@pytest.mark.parametrize("code", [DIES, SAYS_OTHERWISE])
def test_a_process_that_does_not_start_is_told_of(file: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    (file.parent / "probe.py").write_text(code)
    monkeypatch.setattr(probe, "__file__", str(file.parent / "probe.py"))
    monkeypatch.setattr(probe, "_PROBER", probe._Prober())
    with pytest.raises(FormatError, match=r"^cannot start .* see that it can import h5py$"), reading(file):
        pass
    assert probe._PROBER._child is None


def test_h5py_may_come_through_the_path_of_python(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / "path").mkdir()
    (file.parent / "path" / "h5py.py").write_text(f"open({str(file.parent / 'found')!r}, 'w').close()\n")
    monkeypatch.setenv("PYTHONPATH", str(file.parent / "path"))
    prober = probe._Prober()
    assert prober.check(file) == ""
    prober.stop()
    assert (file.parent / "found").exists()


@pytest.mark.parametrize(("code", "words"), [(CRASHES, "crashes"), (HANGS, "does not end")])
def test_what_ends_the_other_process_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    (file.parent / "probe.py").write_text(code)
    monkeypatch.setattr(probe, "__file__", str(file.parent / "probe.py"))
    monkeypatch.setattr(probe, "SECONDS", 0.5)
    monkeypatch.setattr(probe, "_PROBER", probe._Prober())
    with pytest.raises(FormatError, match=words), reading(file):
        pass
    monkeypatch.undo()
    with reading(file) as opened:
        assert opened.attrs["name"] == "a"
