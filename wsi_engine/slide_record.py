"""What a store remembers of the slide that it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wsi_engine.errors import InputError
from wsi_engine.inputs import check_slide_id
from wsi_engine.slide import Slide


@dataclass(frozen=True)
class SlideRecord:
    """What a store remembers of its slide."""

    name: str
    fingerprint: str
    dimensions: tuple[int, int]
    mpp: tuple[float, float]
    mpp_source: str
    vendor: str
    reader: str

    @classmethod
    def of(cls, slide: Slide, slide_id: str) -> SlideRecord:
        """The record of an open slide.

        Raises:
            ScaleError: its scale is missing or not believable.
        """
        return cls(
            name=slide_id,
            fingerprint=slide.fingerprint,
            dimensions=slide.dimensions,
            mpp=slide.mpp,
            mpp_source=slide.mpp_source or "",
            vendor=slide.metadata.vendor,
            reader=slide.reader,
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SlideRecord:
        """The record that was written as a store's ``slide`` attribute."""
        width, height = value["dimensions"]
        x, y = value["mpp"]
        try:
            check_slide_id(value["name"], "the slide's name")  # files are written under it
        except InputError as error:
            raise ValueError(str(error)) from error
        return cls(**{**value, "dimensions": (int(width), int(height)), "mpp": (float(x), float(y))})
