"""Servers that refuse, drop, delay and cut off what they send: one sentence or another try, never a hang."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from support_faults import MeanEncoder

from wsi_engine import FeatureStore, extract
from wsi_engine.errors import SlideError
from wsi_engine.readers import open_reader
from wsi_engine.readers import tiffslide as module
from wsi_engine.tiffwriter import TiffLayout, write_pyramid

pytest.importorskip("aiohttp")

WIDTH, HEIGHT = 700, 500


def paint(x: int, y: int, width: int, height: int) -> np.ndarray:
    rows, columns = np.mgrid[y : y + height, x : x + width]
    noise = (rows * 7919 + columns * 104_729) % 61
    return np.stack([columns * 255 // WIDTH, rows * 255 // HEIGHT, 100 + noise], axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "slide.svs"
    write_pyramid(path, WIDTH, HEIGHT, paint, mpp=0.5, layout=TiffLayout(tile_px=128, levels=1, quality=95))
    return path


@dataclass
class FaultyServer:
    """Answers ranges of one file; ``faults`` says what goes wrong with each of the next, ``rest`` with all others."""

    address: str = ""
    faults: list[str] = field(default_factory=list)
    rest: str = ""
    met: Counter[str] = field(default_factory=Counter)
    over: threading.Event = field(default_factory=threading.Event)

    def next_fault(self) -> str:
        fault = self.faults.pop(0) if self.faults else self.rest
        self.met[fault] += 1
        return fault


@pytest.fixture
def server(slide: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    data, state = slide.read_bytes(), FaultyServer()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.begin(200, len(data))

        def do_GET(self) -> None:
            fault, asked = state.next_fault(), self.headers.get("Range")
            if fault == "hang":
                state.over.wait(20)
                self.close_connection = True
                return
            if fault == "drop":
                self.connection.close()
                self.close_connection = True
                return
            if fault.isdigit():
                self.send_error(int(fault))
                return
            first, last = 0, len(data) - 1
            if asked:
                start, _, end = asked.removeprefix("bytes=").partition("-")
                first, last = int(start), min(int(end or last), last)
            body = data[first : last + 1]
            self.begin(206 if asked else 200, len(body), f"bytes {first}-{last}/{len(data)}" if asked else None)
            if fault == "cut":
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return
            if fault == "slow":
                for place in range(0, len(body), 2048):
                    self.wfile.write(body[place : place + 2048])
                    time.sleep(0.002)
                return
            self.wfile.write(body)

        def begin(self, status: int, size: int, content_range: str | None = None) -> None:
            self.send_response(status)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(size))
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass  # its client gave up

    monkeypatch.setattr(module, "BLOCK_BYTES", 16_384)
    monkeypatch.setattr(module, "MAX_BLOCKS", 2)
    monkeypatch.setattr(module, "RETRY_SECONDS", (0.01, 0.02))
    monkeypatch.setattr("wsi_engine.places.READ_SECONDS", 0.3)
    http = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    state.address = f"http://127.0.0.1:{http.server_address[1]}/slide.svs"
    yield state
    state.over.set()
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.mark.parametrize("fault", ["500", "503", "drop", "cut", "hang"])
def test_a_server_that_stumbles_is_asked_again(server: FaultyServer, slide: Path, fault: str) -> None:
    reader, local = open_reader(server.address), open_reader(slide)
    server.faults = ["", fault, fault, "", "", fault]
    pixels = reader.read(0, 0, 0, WIDTH, HEIGHT)
    assert server.met[fault] == 3
    assert np.abs(pixels.astype(int) - local.read(0, 0, 0, WIDTH, HEIGHT)).max() <= 2
    reader.close()
    local.close()


@pytest.mark.parametrize("fault", ["500", "503", "drop", "cut", "hang"])
def test_a_server_that_stays_so_is_one_sentence(server: FaultyServer, fault: str) -> None:
    reader = open_reader(server.address)
    server.rest = fault
    with pytest.raises(SlideError, match=r"cannot read http://127\.0\.0\.1.*slide\.svs at level 0") as caught:
        reader.read(0, 0, 0, WIDTH, HEIGHT)
    assert "\n" not in str(caught.value)
    assert server.met[fault] in (3, 6)  # aiohttp asks once more by itself where a connection ends
    reader.close()
    with pytest.raises(SlideError, match=r"slide\.svs"):
        open_reader(server.address.replace("slide.svs", "slide.svs?second"))


def test_a_slow_server_is_waited_for(server: FaultyServer, slide: Path) -> None:
    server.rest = "slow"  # far longer altogether than the server may be silent
    reader, local = open_reader(server.address), open_reader(slide)
    assert np.abs(reader.read(0, 0, 0, WIDTH, HEIGHT).astype(int) - local.read(0, 0, 0, WIDTH, HEIGHT)).max() <= 2
    reader.close()
    local.close()


def run(address: str | Path, out: Path) -> tuple[str, str]:
    options = {"tile_px": 64, "batch_size": 8, "tissue": None, "workers": 2, "reader": "tiffslide"}
    (result,) = extract(address, out, MeanEncoder(), **options).results  # type: ignore[arg-type]
    return result.status, result.message


@pytest.mark.parametrize("fault", ["503", "cut", "hang"])
def test_an_extraction_goes_on_when_the_server_is_back(
    server: FaultyServer, slide: Path, tmp_path: Path, fault: str
) -> None:
    assert run(slide, tmp_path / "whole")[0] == "done"
    server.faults, server.rest = [""] * 7, fault
    status, message = run(server.address, tmp_path / "out")
    assert (status, "slide.svs" in message, "\n" in message) == ("failed", True, False)
    assert server.met[fault] >= 3
    server.rest = ""
    assert run(server.address, tmp_path / "out")[0] == "done"
    stores = [FeatureStore.open(tmp_path / name / "slide.zarr") for name in ("whole", "out")]
    assert np.array_equal(*(store.features("mean") for store in stores))


@pytest.fixture
def on_s3(slide: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Callable[[str], None]]]:
    """A slide on an S3 server behind a proxy that can be told to fail: its address, and how to tell."""
    boto3, s3fs = pytest.importorskip("boto3"), pytest.importorskip("s3fs")
    moto_server = pytest.importorskip("moto.moto_server.threaded_moto_server")
    from werkzeug.wrappers import Response

    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    mode, over = {"fault": ""}, threading.Event()

    class Proxy:
        def __init__(self, application: Callable[..., object]) -> None:
            self._application = application

        def __call__(self, environment: dict[str, object], start: Callable[..., object]) -> object:
            if mode["fault"] == "hang":
                over.wait(20)
            if mode["fault"] in ("500", "503"):
                return Response("<Error><Code>SlowDown</Code></Error>", int(mode["fault"]))(environment, start)
            return self._application(environment, start)

    create = moto_server.DomainDispatcherApplication
    monkeypatch.setattr(moto_server, "DomainDispatcherApplication", lambda *given: Proxy(create(*given)))
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="faulty")
    client.upload_file(str(slide), "faulty", "slide.svs")
    s3fs.S3FileSystem.clear_instance_cache()
    yield "s3://faulty/slide.svs", lambda fault: mode.update(fault=fault)
    over.set()
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("fault", ["500", "503", "hang"])
def test_s3_that_fails_is_one_sentence(
    on_s3: tuple[str, Callable[[str], None]], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    address, tell = on_s3
    monkeypatch.setattr(module, "BLOCK_BYTES", 16_384)
    monkeypatch.setattr("wsi_engine.places.READ_SECONDS", 0.3)
    monkeypatch.setattr(module, "GIVEN_UP_SECONDS", 1.0)
    monkeypatch.setattr(module, "RETRY_SECONDS", (0.01, 0.02))
    reader = open_reader(address)
    tell(fault)
    with pytest.raises(SlideError, match=r"cannot read s3://faulty/slide\.svs") as caught:
        reader.read(0, 0, 0, WIDTH, HEIGHT)
    assert "\n" not in str(caught.value)
    tell("")
    time.sleep(1.0)
    assert reader.read(0, 0, 0, WIDTH, HEIGHT).shape == (HEIGHT, WIDTH, 3)
    reader.close()
