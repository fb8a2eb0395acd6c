"""Slides by URL: from a real S3 server and a real web server on this machine, and from memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
from numpy.typing import NDArray

from wsi_engine.errors import SlideError
from wsi_engine.readers import open_reader
from wsi_engine.tiffwriter import TiffLayout, write_pyramid

boto3 = pytest.importorskip("boto3")
moto_server = pytest.importorskip("moto.server")
s3fs = pytest.importorskip("s3fs")

WIDTH, HEIGHT = 900, 640
BUCKET = "slides-for-tests"


def paint(x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[y : y + height, x : x + width]
    noise = (rows * 7919 + columns * 104_729) % 61
    return np.stack([columns * 255 // WIDTH, rows * 255 // HEIGHT, 100 + noise], axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "slide.svs"
    write_pyramid(path, WIDTH, HEIGHT, paint, mpp=0.5, layout=TiffLayout(tile_px=128, levels=2, quality=95))
    return path


@pytest.fixture
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    s3fs.S3FileSystem.clear_instance_cache()  # a file system of another test would keep that test's address
    yield server
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def on_s3(s3_server: object, slide: Path) -> str:
    boto3.client("s3").upload_file(str(slide), BUCKET, "folder/slide.svs")
    return f"s3://{BUCKET}/folder/slide.svs"


def assert_equal_to_local(url: str, slide: Path) -> None:
    remote, local = open_reader(url), open_reader(slide)
    assert remote.name == "tiffslide"
    assert remote.levels == local.levels
    assert remote.metadata.mpp == local.metadata.mpp == (0.5, 0.5)
    for level, size in enumerate(local.levels):
        box = (level, -20, -10, size.width + 50, size.height + 40)
        assert np.abs(remote.read(*box).astype(int) - local.read(*box)).max() <= 2
    remote.close()
    local.close()
    with pytest.raises(SlideError, match="closed"):
        remote.read(0, 0, 0, 10, 10)


def test_a_slide_on_s3_reads_like_the_local_one(on_s3: str, slide: Path) -> None:
    assert_equal_to_local(on_s3, slide)


def test_a_slide_on_s3_is_not_fetched_whole(on_s3: str, slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsi_engine.readers.tiffslide.BLOCK_BYTES", 4096)
    reader = open_reader(on_s3)
    fetched = reader._file.cache.total_requested_bytes  # type: ignore[attr-defined]
    reader.read(0, 0, 0, 64, 64)
    assert reader._file.cache.total_requested_bytes < slide.stat().st_size / 2  # type: ignore[attr-defined]
    assert fetched < slide.stat().st_size / 4
    reader.close()


@pytest.mark.parametrize("address", [f"s3://{BUCKET}/folder/other.svs", "s3://no-such-bucket-anywhere/slide.svs"])
def test_a_missing_key_or_bucket(s3_server: object, address: str) -> None:
    with pytest.raises(SlideError) as caught:
        open_reader(address)
    assert address in str(caught.value)
    assert "no such file" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_object_that_is_no_slide(s3_server: object) -> None:
    boto3.client("s3").put_object(Bucket=BUCKET, Key="notes.svs", Body=b"these are not the pixels you look for")
    with pytest.raises(SlideError, match="not a TIFF"):
        open_reader(f"s3://{BUCKET}/notes.svs")


def test_a_slide_on_s3_that_was_cut_off(s3_server: object, slide: Path) -> None:
    data = slide.read_bytes()
    boto3.client("s3").put_object(Bucket=BUCKET, Key="cut.svs", Body=data[: len(data) * 2 // 3])
    with pytest.raises(SlideError, match=r"cut\.svs"):
        open_reader(f"s3://{BUCKET}/cut.svs")


def test_a_server_that_goes_away(s3_server: object, on_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsi_engine.readers.tiffslide.BLOCK_BYTES", 4096)
    monkeypatch.setattr("wsi_engine.readers.tiffslide.MAX_BLOCKS", 2)
    reader = open_reader(on_s3)
    s3_server.stop()  # type: ignore[attr-defined]
    with pytest.raises(SlideError, match=r"slide\.svs") as caught:
        reader.read(0, 0, 0, WIDTH, HEIGHT)
    assert "\n" not in str(caught.value)
    reader.close()
    with pytest.raises(SlideError, match=r"another\.svs"):
        open_reader(f"s3://{BUCKET}/folder/another.svs")


def test_memory_urls(slide: Path) -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/readers/slide.svs", slide.read_bytes())
    try:
        assert_equal_to_local("memory://readers/slide.svs", slide)
        with pytest.raises(SlideError, match="no such file"):
            open_reader("memory://readers/other.svs")
    finally:
        system.rm("/readers", recursive=True)


@pytest.fixture
def web_server(slide: Path) -> Iterator[str]:
    """Serves the slide at /slide.svs with byte ranges; the secret part of its address must not show in errors."""
    data = slide.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.reply(with_body=False)

        def do_GET(self) -> None:
            self.reply(with_body=True)

        def reply(self, *, with_body: bool) -> None:
            if not self.path.startswith("/slide.svs"):
                self.send_error(404)
                return
            first, last = 0, len(data) - 1
            asked = self.headers.get("Range")
            if asked:
                start, _, end = asked.removeprefix("bytes=").partition("-")
                first, last = int(start), min(int(end or last), last)
            body = data[first : last + 1]
            self.send_response(206 if asked else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(body)))
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_web_addresses(web_server: str, slide: Path) -> None:
    pytest.importorskip("aiohttp")
    assert_equal_to_local(f"{web_server}/slide.svs", slide)
    with pytest.raises(SlideError, match="no such file") as caught:
        open_reader(f"{web_server}/other.svs?signature=secret")
    assert "secret" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", fail)
    with pytest.raises(SlideError, match=r'pip install "wsi-engine\[s3\]"'):
        open_reader("s3://bucket/slide.svs")
    with pytest.raises(SlideError, match=r'pip install "wsi-engine\[http\]"'):
        open_reader("https://host.invalid/slide.svs")


def test_an_unknown_scheme() -> None:
    with pytest.raises(SlideError, match="nonsense"):
        open_reader("nonsense://host/slide.svs")
