"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wsi_engine.errors import StoreError


@contextmanager
def replacing(target: str | os.PathLike[str], what: str) -> Iterator[Path]:
    """A draft beside a file of this machine, which takes its place at the end; gone if anything goes wrong.

    Args:
        target: the file to write or replace.
        what: it is, for messages: ``the table``.

    Raises:
        StoreError: it cannot be written.
    """
    place = Path(target)
    draft = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        yield draft
        os.replace(draft, place)
    except OSError as error:
        raise StoreError(f"cannot write {what} {place}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # what went wrong before says more
            draft.unlink(missing_ok=True)
