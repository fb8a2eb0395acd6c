"""Headers of JPEG tiles inside TIFF files, made complete for a stand-alone decoder.

A tile of a TIFF is a JPEG stream of its own, but often an abbreviated one: its quantisation and
Huffman tables sit once in the TIFF's JPEGTables field (TIFF Technical Note 2, section "JPEGTables").
What its components mean is said by the TIFF's photometric field, not by markers of the stream,
whereas a JPEG library outside TIFF guesses from the JFIF and Adobe markers. So each header is
rewritten: tables added, application segments dropped, one Adobe segment put in that states the
colour transform (ITU-T T.872, section 6.5.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

SOI = b"\xff\xd8"
_SOS, _EOI, _COMMENT = 0xDA, 0xD9, 0xFE
_APPLICATION = range(0xE0, 0xF0)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_TABLES = frozenset({0xDB, 0xC4})  # quantisation and Huffman: what outlives the start of the next image
_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"


class Colour(Enum):
    """What the components of a tile mean, by the TIFF's photometric field."""

    GREY = 1
    RGB = 2
    YCBCR = 6

    @property
    def components(self) -> int:
        """Components of the JPEG frame."""
        return 1 if self is Colour.GREY else 3

    @property
    def marker(self) -> bytes:
        """The Adobe segment that makes a decoder treat the components so."""
        if self is Colour.GREY:
            return b""
        return _ADOBE + (b"\x00" if self is Colour.RGB else b"\x01")


class JpegError(ValueError):
    """A stream is not a JPEG tile of the expected shape; the message completes "it …"."""


def table_segments(tables: bytes | None) -> bytes:
    """The quantisation and Huffman segments of a JPEGTables field, without its start and end marks.

    Raises:
        JpegError: the field is not a tables-only JPEG stream.
    """
    if not tables:
        return b""
    kept: list[bytes] = []
    position = _after_start(tables)
    while True:
        marker, start, end = _segment(tables, position)
        if marker == _EOI:
            return b"".join(kept)
        if marker in _TABLES:
            kept.append(tables[start:end])
        position = end


@dataclass(frozen=True)
class TileHeaders:
    """Completes the headers of one level's tiles.

    ``tables`` are the shared segments of :func:`table_segments`, ``width`` and ``height`` the tile
    size of the TIFF in pixels, which each frame must have.
    """

    tables: bytes
    colour: Colour
    width: int
    height: int

    def rewrite(self, stream: bytes) -> tuple[bytes, bytes]:
        """The header of ``stream`` as it stands (start to first scan header), and as a decoder needs it.

        Tiles of one level mostly share their header, so the pair may be reused for every
        stream that starts with the first of the two.

        Raises:
            JpegError: no JPEG header, or a frame of another size, depth or number of components.
        """
        kept: list[bytes] = []
        framed = False
        position = _after_start(stream)
        while True:
            marker, start, end = _segment(stream, position)
            if marker == _EOI:
                raise JpegError("ends before its pixels")
            if marker in _FRAMES:
                self._check_frame(stream[start:end])
                framed = True
            if marker not in _APPLICATION and marker != _COMMENT:
                kept.append(stream[start:end])
            position = end
            if marker == _SOS:
                break
        if not framed:
            raise JpegError("has no frame header")
        return stream[:position], b"".join((SOI, self.colour.marker, self.tables, *kept))

    def _check_frame(self, segment: bytes) -> None:
        if len(segment) < 10:
            raise JpegError("has a frame header that is cut short")
        depth, components = segment[4], segment[9]
        height = int.from_bytes(segment[5:7], "big")
        width = int.from_bytes(segment[7:9], "big")
        if depth != 8 or components != self.colour.components:
            raise JpegError(f"has {components} components of {depth} bits, not {self.colour.components} of 8")
        if (width, height) != (self.width, self.height):
            raise JpegError(f"is {width}×{height} pixels, not {self.width}×{self.height}")


def _after_start(stream: bytes) -> int:
    if not stream.startswith(SOI):
        raise JpegError("is not a JPEG stream")
    return len(SOI)


def _segment(stream: bytes, position: int) -> tuple[int, int, int]:
    """Marker code, start (at its 0xFF) and end of the segment at ``position``."""
    if stream[position : position + 1] != b"\xff":
        raise JpegError("has a damaged JPEG header")
    while stream[position + 1 : position + 2] == b"\xff":  # fill bytes
        position += 1
    if position + 2 > len(stream):
        raise JpegError("has a JPEG header that is cut short")
    marker = stream[position + 1]
    if marker == _EOI:
        return marker, position, position + 2
    length = int.from_bytes(stream[position + 2 : position + 4], "big")
    end = position + 2 + length
    if length < 2 or end > len(stream):
        raise JpegError("has a JPEG header that is cut short")
    return marker, position, end
