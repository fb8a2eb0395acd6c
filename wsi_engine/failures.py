"""Why a slide failed, kept beside its store until it is done: who comes back in the morning need not search logs.

One small file for each slide and job, ``.<slide_id>.<digits>.failed.json``; a job is named by the place of its result
in the store, as ``features/resnet50``.
"""

from __future__ import annotations

import hashlib
import json
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from wsi_engine.places import Place, list_names, write_file

ENDING = ".failed.json"


@dataclass(frozen=True)
class Failure:
    """Why a job of a slide ended without a result.

    Attributes:
        slide_id: which slide.
        job: what was being made, by its place in the store.
        why: one sentence.
        when: date and time in UTC, ISO 8601.
        host: where it happened.
    """

    slide_id: str
    job: str
    why: str
    when: str
    host: str


def record_outcome(folder: Place, slide_id: str, job: str, status: str, message: str) -> None:
    """Write down that a job failed, or take away what was written when it did; a busy slide changes nothing.

    Never raises: what made the slide fail may keep this from being written, and the run's report says it as well.

    Args:
        folder: of the slide's store.
        slide_id: which slide.
        job: by its place in the store.
        status: how it ended; ``failed`` and ``busy`` alone are no success.
        message: why it failed.
    """
    path = _place(folder, slide_id, job)
    with suppress(OSError):
        if status == "failed":
            now = datetime.now(UTC).isoformat(timespec="seconds")
            failure = Failure(slide_id, job, message, now, socket.gethostname())
            write_file(path, json.dumps(asdict(failure), indent=2).encode() + b"\n")
        elif status != "busy":
            path.unlink(missing_ok=True)


def read_failures(folder: Place) -> list[Failure]:
    """What is written down in a folder of stores, by slide and job; what cannot be read is passed over."""
    found = []
    try:
        names = [name for name in list_names(folder) if name.endswith(ENDING)]
    except OSError:
        return []
    for name in names:
        with suppress(OSError, ValueError, TypeError):
            failure = Failure(**json.loads((folder / name).read_bytes()))
            if all(isinstance(value, str) for value in asdict(failure).values()):
                found.append(failure)
    return sorted(found, key=lambda failure: (failure.slide_id, failure.job))


def _place(folder: Place, slide_id: str, job: str) -> Place:
    """A name that stays within 255 bytes whatever the encoder is called."""
    return folder / f".{slide_id}.{hashlib.sha256(job.encode()).hexdigest()[:8]}{ENDING}"
