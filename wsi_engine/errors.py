"""Every error the engine raises on purpose, drawn once.

    WsiError
    ├── SettingsError      a setting is out of range or of the wrong kind (also a ValueError)
    ├── InputError         a list of slides, a CSV or a folder cannot be used
    ├── SlideError         a slide cannot be opened or read
    │   └── ScaleError     its micrometres per pixel are missing or not believable
    ├── EncoderError       an encoder is unknown or cannot be built
    │   └── WeightsError   its weights are missing, unreadable or of the wrong shape
    ├── FeatureError       an encoder returned values that cannot be kept (NaN, overflow)
    ├── StoreError         a feature store cannot be read or written
    │   ├── MismatchError  what is stored was made from another slide, grid or encoder
    │   └── BusyError      another process is writing the same slide
    ├── ModelError         a trained model cannot be used, made or kept, or does not fit the features it is given
    ├── FormatError        a file of another tool is not laid out as that tool lays it out
    │   └── PartialImportError  some slides of its folder were imported and others were not
    └── ClusterError       a Dask cluster cannot be reached, or lost its workers

Each message is one sentence that says what is wrong, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class WsiError(Exception):
    """Base of all errors raised by wsi-engine; catch this to catch them all."""


class SettingsError(WsiError, ValueError):
    """A setting is out of range or of the wrong kind."""


class InputError(WsiError):
    """A list of slides, a CSV or a folder cannot be used."""


class SlideError(WsiError):
    """A slide cannot be opened or read."""


class ScaleError(SlideError):
    """The micrometres per pixel of a slide are missing or not believable."""


class EncoderError(WsiError):
    """An encoder is unknown or cannot be built."""


class WeightsError(EncoderError):
    """The weights of an encoder are missing, unreadable or of the wrong shape."""


class FeatureError(WsiError):
    """An encoder returned values that cannot be kept: NaN, infinite, or too large for the store."""


class StoreError(WsiError):
    """A feature store cannot be read or written."""


class MismatchError(StoreError):
    """What is stored was made from another slide, grid or encoder than what is asked for."""


class BusyError(StoreError):
    """Another process holds the lease on the slide's store."""


class ModelError(WsiError):
    """A trained model cannot be used, made or kept, or does not fit the features it is given."""


class FormatError(WsiError):
    """A file of another tool is not laid out as that tool lays it out."""


class PartialImportError(FormatError):
    """Some slides of another tool's folder could not be imported; ``done`` are the stores of the others."""

    def __init__(self, message: str, done: Sequence[Path] = ()) -> None:
        super().__init__(message)
        self.done = tuple(done)


class ClusterError(WsiError):
    """A Dask cluster cannot be started or reached, or its workers end over and over."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, to stand within a sentence; its type where it says nothing."""
    said = str(error).strip().partition("\n")[0].rstrip(" .\r")
    return said or type(error).__name__
