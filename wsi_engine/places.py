"""Where results lie: a folder of this machine's file systems, or one by URL (``s3://bucket/features``).

A :class:`RemotePath` has those of pathlib's methods that the engine uses, so that most code need not know which of the
two it was given. Whatever goes wrong far away is an ``OSError``, as it is on a disk.
"""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

from wsi_engine.errors import InputError

CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0
"""For which a server may take to answer, and to send the next bytes."""

_WEB = ("http", "https")

ATTEMPTS = 5
"""How often an object store is asked that stumbles, with longer and longer pauses."""


def is_url(source: str) -> bool:
    """Whether a source is to be fetched (``s3://…``, ``https://…``) rather than read from a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.:-]*://", source) is not None and not source.lower().startswith("file://")


def local_path(source: str) -> str:
    """The path that a ``file://`` URL stands for; any other source as it is."""
    return url2pathname(urlsplit(source).path) if source.lower().startswith("file://") else source


class RemotePath(os.PathLike[str]):
    """A folder or an object by URL. Nothing is remembered of what is there: other processes write too.

    An object appears whole or not at all, and there are no folders but in the names of objects.

    Args:
        url: with its scheme, as fsspec knows it; credentials and addresses come from the environment.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    def __fspath__(self) -> str:
        return self.url

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and other.url == self.url

    def __lt__(self, other: RemotePath) -> bool:
        return self.url < other.url

    def __hash__(self) -> int:
        return hash(self.url)

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        """What the last part ends in, with its dot."""
        return Path(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """Where it lies."""
        return RemotePath(self.url.rpartition("/")[0])

    def with_name(self, name: str) -> RemotePath:
        """Another name in the same place."""
        return self.parent / name

    def exists(self) -> bool:
        """Whether there is an object of this name, or one below it."""
        with self._reached() as (system, path):
            return bool(system.exists(path))

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        with self._reached() as (system, path):
            return bool(system.isfile(path))

    def is_dir(self) -> bool:
        """Whether there is an object below this name; web servers do not tell."""
        if scheme_of(self.url) in _WEB:
            return False
        with self._reached() as (system, path):
            return bool(system.isdir(path))

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies directly below, sorted by name.

        Raises:
            FileNotFoundError: nothing does.
        """
        return iter(self._list(None))

    def folders(self) -> list[RemotePath]:
        """What lies directly below and has something below itself, sorted by name; empty where there is nothing."""
        try:
            return self._list("directory")
        except FileNotFoundError:
            return []

    def files(self) -> list[str]:
        """All objects below, at any depth, by their paths from here, sorted."""
        with self._reached() as (system, path):
            found = sorted(str(one) for one in system.find(path))
        root = path.strip("/")
        return [one.strip("/").removeprefix(root).lstrip("/") for one in found]

    def read_bytes(self, most: int | None = None) -> bytes:
        """The object, or its first ``most`` bytes."""
        with self._reached() as (system, path):
            try:
                return bytes(system.cat_file(path, start=0, end=most))  # s3fs asks for the size of a whole file first
            except (FileNotFoundError, PermissionError):
                raise
            except OSError:  # an object without a byte has no range either
                return bytes(system.cat_file(path))

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Some bytes of the object alone, given as (start, count)."""
        with self._reached() as (system, path):
            ends = [start + count for start, count in ranges]
            parts = system.cat_ranges([path] * len(ranges), [start for start, _ in ranges], ends, on_error="raise")
            if [len(part) for part in parts] != [count for _, count in ranges]:
                raise OSError(errno.EIO, "its server does not give the byte ranges that are asked for")
            return [bytes(part) for part in parts]

    def size(self) -> int:
        """Bytes of the object."""
        with self._reached() as (system, path):
            return int(system.info(path)["size"])

    def write_bytes(self, data: bytes) -> None:
        """Put an object in the place of the one there is, in one step."""
        with self._reached() as (system, path):
            system.pipe_file(path, data)

    def create_bytes(self, data: bytes) -> bool:
        """Put an object where there is none, in one step; False where there is one (a conditional put)."""
        try:
            with self._reached() as (system, path):
                system.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True

    def unlink(self, missing_ok: bool = False) -> None:
        """Take an object away; servers do not say whether there was one."""
        try:
            with self._reached() as (system, path):
                system.rm_file(path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def upload(self, file: Path) -> None:
        """Put a file of this machine in the place of the object, in one step."""
        with self._reached() as (system, path):
            system.put_file(os.fspath(file), path)

    def zarr_store(self, read_only: bool = False) -> Any:
        """A Zarr store of what lies below."""
        from zarr.storage import FsspecStore  # noqa: PLC0415 - not for who reads small files alone

        store = FsspecStore.from_url(self.url, storage_options=connection_options(self.url), read_only=read_only)
        _ask_once(store.fs)
        return store

    def _list(self, kind: str | None) -> list[RemotePath]:
        if scheme_of(self.url) in _WEB:  # fsspec would fetch the file and look for links in it
            raise FileNotFoundError(errno.ENOENT, "a web server does not list what it has", self.url)
        with self._reached() as (system, path):
            entries = system.ls(path, detail=True)
        own = path.rstrip("/")
        names = {
            str(entry["name"]).rstrip("/").rpartition("/")[2]
            for entry in entries
            if str(entry["name"]).rstrip("/") != own and kind in (None, entry["type"])
        }
        return [self / name for name in sorted(names)]

    @contextmanager
    def _reached(self) -> Iterator[tuple[Any, str]]:
        """The file system and the path in it; whatever it raises comes out as OSError."""
        try:
            yield open_file_system(self.url)
        except FileNotFoundError as error:
            said = _one_line(error)  # a sentence, or the name alone
            why = said if " " in said and error.errno is None else "there is nothing of this name"
            raise FileNotFoundError(errno.ENOENT, why, self.url) from error
        except OSError:
            raise
        except ImportError as error:
            raise OSError(errno.ENOSYS, explain_missing(self.url, error)) from error
        except Exception as error:  # every file system has errors of its own
            raise OSError(errno.EIO, f"{type(error).__name__}: {_one_line(error)}") from error


Place: TypeAlias = Path | RemotePath
"""A folder or file of this machine, or by URL."""


def as_place(given: str | os.PathLike[str]) -> Place:
    """What a path or URL stands for; ``file://`` URLs are paths."""
    text = os.fspath(given)
    return RemotePath(text) if is_url(text) else Path(local_path(text))


def open_file_system(url: str, attempts: int = ATTEMPTS) -> tuple[Any, str]:
    """The fsspec file system of a URL, which remembers no listing, and the path in it.

    Args:
        url: where.
        attempts: how often a server is asked that stumbles; 1 leaves that to the caller.
    """
    from fsspec.core import url_to_fs  # noqa: PLC0415 - only URLs need it

    system, path = url_to_fs(url, **connection_options(url, attempts))
    _ask_once(system)
    return system, path


def _ask_once(system: Any) -> None:
    """Leave asking again to the connection: s3fs would multiply its attempts."""
    if hasattr(system, "retries"):
        system.retries = 1


def connection_options(url: str, attempts: int = ATTEMPTS) -> dict[str, Any]:
    """Options of fsspec for a URL, with which no answer is waited for without end."""
    make = _OPTIONS.get(scheme_of(url))
    return {"use_listings_cache": False} | (make(attempts) if make else {})


def explain_missing(url: str, error: ImportError) -> str:
    """What to install for a URL that fsspec cannot open without."""
    scheme = scheme_of(url)
    extra = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}.get(scheme)
    return f"a package for {scheme}:// is missing; " + (
        f'pip install "wsi-engine[{extra}]"' if extra else _one_line(error)
    )


def scheme_of(url: str) -> str:
    """``s3`` of ``s3://…``."""
    return url.partition("://")[0].lower()


def make_folder(place: Place) -> None:
    """Make an output folder where there is none, and see that it can be written.

    Raises:
        InputError: it cannot.
    """
    try:
        probe = place / f".write-test-{os.getpid()}"
        if isinstance(probe, RemotePath):
            probe.write_bytes(b"")
        else:
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to the output folder {place}: {error.strerror or error}") from error


def write_file(place: Place, data: bytes) -> None:
    """Write or replace a small file in one step.

    Raises:
        OSError: it cannot be written.
    """
    if isinstance(place, RemotePath):
        place.write_bytes(data)
        return
    draft = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        draft.write_bytes(data)
        os.replace(draft, place)
    finally:
        with suppress(OSError):  # what went wrong before says more
            draft.unlink(missing_ok=True)


def open_binary(place: Place) -> BinaryIO:
    """A file for reading, unbuffered; an object is fetched whole."""
    if isinstance(place, RemotePath):
        return io.BytesIO(place.read_bytes())
    return cast(BinaryIO, open(place, "rb", buffering=0))


def list_names(place: Place) -> list[str]:
    """Names of what lies in a folder, hidden ones too.

    Raises:
        OSError: it cannot be read; FileNotFoundError where it is not there.
    """
    if isinstance(place, RemotePath):
        return [entry.name for entry in place.iterdir()]
    return os.listdir(place)


def list_folders(place: Place) -> list[str]:
    """Names of the folders in a folder, sorted; none where it is not there."""
    if isinstance(place, RemotePath):
        return [entry.name for entry in place.folders()]
    try:
        return sorted(entry.name for entry in os.scandir(place) if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def list_files(folder: Place) -> list[str]:
    """All files below a folder, at any depth, by their paths from it with ``/``, sorted."""
    if isinstance(folder, RemotePath):
        return folder.files()
    found = []
    for place, _, names in os.walk(folder):
        inside = Path(place).relative_to(folder)
        found += [(inside / name).as_posix() for name in names]
    return sorted(found)


def file_size(place: Place) -> int:
    """Bytes of a file."""
    return place.size() if isinstance(place, RemotePath) else place.stat().st_size


def list_stores(folder: Place) -> list[Place]:
    """The stores of a folder, sorted by name; none where it is not there."""
    return [folder / name for name in list_folders(folder) if name.endswith(".zarr") and not name.startswith(".")]


def _s3_options(attempts: int) -> dict[str, Any]:
    config: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        config["retries"] = {"total_max_attempts": attempts, "mode": "standard"}
    return {"config_kwargs": config}


def _web_options(attempts: int) -> dict[str, Any]:
    """A file may take as long as it needs while bytes come."""
    try:
        from aiohttp import ClientTimeout  # noqa: PLC0415 - an optional dependency
    except ImportError:
        return {}  # fsspec says what is missing
    return {"client_kwargs": {"timeout": ClientTimeout(None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)}}


_OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "http": _web_options, "https": _web_options, "s3": _s3_options, "s3a": _s3_options,
}  # fmt: skip


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
