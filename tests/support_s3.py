"""A real S3 server on this machine, which counts what it is asked for and fails when it is told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

boto3 = pytest.importorskip("boto3")
moto_app = pytest.importorskip("moto.moto_server.werkzeug_app")
s3fs = pytest.importorskip("s3fs")

BUCKET = "a-bucket"

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class Request:
    """What was asked for, and how many bytes were sent."""

    method: str
    path: str
    range: tuple[int, int] | None
    sent: int


@dataclass
class S3Server:
    """A server with one bucket.

    Attributes:
        address: of the server.
        requests: all that were answered, in order.
        fault: given method, path and number of the request; a status to answer with instead, or None.
        conditional: whether it heeds If-None-Match; some servers do not.
    """

    address: str = ""
    requests: list[Request] = field(default_factory=list)
    fault: Callable[[str, str, int], int | None] = lambda method, path, number: None
    conditional: bool = True
    url: str = f"s3://{BUCKET}"

    def reads_of(self, key: str) -> list[Request]:
        """GET requests of an object."""
        return [one for one in self.requests if one.method == "GET" and one.path.endswith(key)]

    def keys(self, prefix: str = "") -> list[str]:
        """Names of the objects."""
        client = boto3.client("s3", endpoint_url=self.address)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def get(self, key: str) -> bytes:
        """An object."""
        data: bytes = boto3.client("s3", endpoint_url=self.address).get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return data

    def put(self, key: str, data: bytes) -> str:
        """Put an object; its URL."""
        boto3.client("s3", endpoint_url=self.address).put_object(Bucket=BUCKET, Key=key, Body=data)
        return f"{self.url}/{key}"


@contextmanager
def serve_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server with an empty bucket, to which the environment leads."""
    from werkzeug.serving import make_server

    state, answer = S3Server(), moto_app.DomainDispatcherApplication(moto_app.create_backend_app)

    def application(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        status = state.fault(method, path, len(state.requests))
        if status is not None:
            state.requests.append(Request(method, path, None, 0))
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(f"{status} Fault", [("Content-Length", "0")])
            return [b""]
        if not state.conditional:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        body = b"".join(answer(environ, start))
        first, _, last = environ.get("HTTP_RANGE", "").removeprefix("bytes=").partition("-")
        span = (int(first), int(last)) if first and last else None
        state.requests.append(Request(method, path, span, len(body) if method == "GET" else 0))
        return [body]

    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": state.address}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_MAX_ATTEMPTS", raising=False)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    s3fs.S3FileSystem.clear_instance_cache()  # a file system of another test would keep that test's address
    state.requests.clear()
    try:
        yield state
    finally:
        state.fault = lambda method, path, number: None
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
            for entry in page.get("Contents", []):
                client.delete_object(Bucket=BUCKET, Key=entry["Key"])
        client.delete_bucket(Bucket=BUCKET)  # what moto keeps outlives its server
        server.shutdown()
        thread.join()
        s3fs.S3FileSystem.clear_instance_cache()
