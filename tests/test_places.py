"""Folders by URL, and the leases in them, on a real S3 server."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress

import pytest
from support_s3 import S3Server

from wsi_engine.errors import BusyError, InputError
from wsi_engine.lease import hold_lease
from wsi_engine.places import RemotePath, as_place, list_files, list_folders, list_names, list_stores, make_folder

HOLDER = """
import pathlib, sys, time
from wsi_engine.errors import BusyError, InputError
from wsi_engine.lease import hold_lease
from wsi_engine.places import as_place
sys.stdin.readline()
try:
    with hold_lease(as_place(sys.argv[1]), pause=None) as lease:
        lease.check()
        print("held", flush=True)
        time.sleep(2)
        lease.check()
except BusyError:
    print("busy", flush=True)
"""


def test_one_of_many_gets_a_lease(s3: S3Server) -> None:
    """Processes that ask at one time: first where there is none, then where there is that of a killed one."""
    for round in ("free", "left"):
        if round == "left":
            code = (
                "import os, sys; from wsi_engine.lease import hold_lease; from wsi_engine.places import as_place\n"
                "with hold_lease(as_place(sys.argv[1])): os.kill(os.getpid(), 9)"
            )
            assert subprocess.run([sys.executable, "-c", code, f"{s3.url}/.a.lease"], check=False).returncode == -9
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", HOLDER, f"{s3.url}/.a.lease"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for _ in range(4)
        ]  # fmt: skip
        for process in processes:
            process.stdin.write("\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        said = [process.communicate(timeout=60)[0].strip() for process in processes]
        assert sorted(said) == ["busy", "busy", "busy", "held"], round
        assert s3.keys() == []


def test_the_lease_of_another_machine(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is watched: while its heartbeat changes its holder lives, and when it does not any more it is taken over."""
    place = as_place(f"{s3.url}/.a.lease")
    monkeypatch.setattr("wsi_engine.lease.STALE_SECONDS", 0.5)
    monkeypatch.setattr("wsi_engine.lease.HEARTBEAT_SECONDS", 0.05)
    with hold_lease(place) as lease:
        monkeypatch.setattr("wsi_engine.holder._place", lambda: "another machine")
        with pytest.raises(BusyError, match=f"process {os.getpid()}"), hold_lease(place):
            pass
        lease._done.set()  # it stands still
        lease._beat.join()
        with suppress(BusyError), hold_lease(place):  # its last heartbeat may be news to the first look
            pass
        with hold_lease(place) as mine:
            mine.check()
            with pytest.raises(BusyError, match="taken over"):
                lease.check()
        with pytest.raises(BusyError, match="is gone"):
            lease.check()
    assert s3.keys() == []


@pytest.mark.parametrize("scheme", ["s3", "memory"])
def test_remote_paths(s3: S3Server, scheme: str) -> None:
    root = as_place(f"{s3.url}/folder" if scheme == "s3" else "memory://places/folder")
    assert isinstance(root, RemotePath)
    assert as_place(f"{root}/") == root
    assert (root.name, root.parent.name) == ("folder", "a-bucket" if scheme == "s3" else "places")
    assert not root.exists()
    assert list_folders(root) == []
    with pytest.raises(FileNotFoundError, match="there is nothing of this name"):
        list_names(root)
    file = root / "a" / "b.zarr" / "zarr.json"
    assert file.create_bytes(b"first")
    assert not file.create_bytes(b"second")
    assert file.read_bytes() == b"first"
    file.write_bytes(bytes(range(200)))
    assert file.read_bytes(7) == bytes(range(7))
    assert file.read_ranges([(0, 2), (190, 10)]) == [b"\x00\x01", bytes(range(190, 200))]
    assert file.size() == 200
    assert (file.suffix, file.stem) == (".json", "zarr")
    (root / "empty").write_bytes(b"")
    assert (root / "empty").read_bytes() == (root / "empty").read_bytes(10) == b""
    assert list_names(root) == ["a", "empty"]
    assert list_folders(root) == ["a"]
    assert list_stores(root / "a") == [root / "a" / "b.zarr"]
    assert list_files(root) == ["a/b.zarr/zarr.json", "empty"]
    assert ((root / "a").is_dir(), (root / "a").is_file()) == (True, False)
    assert (file.is_dir(), file.is_file()) == (False, True)
    for name in list_files(root):
        (root / name).unlink()
    (root / "empty").unlink(missing_ok=True)
    assert not root.exists()
    with pytest.raises(FileNotFoundError):
        file.read_bytes()


def test_other_errors_are_of_the_operating_system() -> None:
    with pytest.raises(OSError, match="nonsense"):
        as_place("nonsense://place/a").read_bytes()


def test_web_servers_are_not_asked_for_lists() -> None:
    """fsspec would fetch a whole slide to look for links in it; nobody listens there, and nobody is asked."""
    slide = as_place("http://127.0.0.1:1/slides/slide.svs?signature=secret")
    assert isinstance(slide, RemotePath)
    assert not slide.is_dir()
    assert list_folders(slide) == list_stores(slide) == []
    with pytest.raises(FileNotFoundError):
        list_names(slide)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", fail)
    with pytest.raises(InputError, match=r'output folder s3://bucket/a: .*pip install "wsi-engine\[s3\]"'):
        make_folder(as_place("s3://bucket/a"))
    with pytest.raises(OSError, match="a package for gs:// is missing; Install s3fs"):
        as_place("gs://bucket/a").exists()
