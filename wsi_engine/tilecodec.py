"""One tile in, its compressed bytes out: JPEG, JPEG 2000, LZW and plain, as they stand in a TIFF."""

from __future__ import annotations

from dataclasses import dataclass

import imagecodecs
import numpy as np
from PIL import Image

from wsi_engine.readers.base import RGBImage

COMPRESSION_NONE = 1
COMPRESSION_LZW = 5
COMPRESSION_JPEG = 7
COMPRESSION_APERIO_JPEG2000_YCBCR = 33003
COMPRESSION_APERIO_JPEG2000_RGB = 33005
PHOTOMETRIC_RGB = 2
PHOTOMETRIC_YCBCR = 6

_SOI, _EOI, _SOS, _SOF0, _DQT, _DHT = 0xD8, 0xD9, 0xDA, 0xC0, 0xDB, 0xC4


@dataclass(frozen=True)
class TileCodec:
    """How the tiles of one TIFF are compressed, and the tags that say so.

    ``tables`` holds the quantisation and Huffman tables that all tiles share (tag 347), or None where
    each tile carries its own.
    """

    compression: int
    photometric: int
    quality: int
    tables: bytes | None = None

    def encode(self, tile: RGBImage) -> bytes:
        """Compressed bytes of one whole tile, uint8 (tile_px, tile_px, 3)."""
        if self.compression == COMPRESSION_JPEG:
            return split_tables(self._encode_jpeg(tile))[1] if self.tables else strip_markers(self._encode_jpeg(tile))
        if self.compression == COMPRESSION_LZW:
            return bytes(imagecodecs.lzw_encode(_differences(tile).tobytes()))
        if self.compression == COMPRESSION_NONE:
            return tile.tobytes()
        return self._encode_jpeg2000(tile)

    def _encode_jpeg(self, tile: RGBImage) -> bytes:
        ycbcr = self.photometric == PHOTOMETRIC_YCBCR
        encoded = imagecodecs.jpeg8_encode(
            np.ascontiguousarray(tile),
            level=self.quality,
            colorspace="RGB",
            outcolorspace="YCBCR" if ycbcr else "RGB",
            subsampling="420" if ycbcr else "444",
        )
        return bytes(encoded) if ycbcr else number_components(bytes(encoded))

    def _encode_jpeg2000(self, tile: RGBImage) -> bytes:
        lossless = self.quality == 100
        if self.compression == COMPRESSION_APERIO_JPEG2000_YCBCR:
            tile = np.asarray(Image.fromarray(tile).convert("YCbCr"))
        encoded = imagecodecs.jpeg2k_encode(
            np.ascontiguousarray(tile),
            level=0 if lossless else round(20 + self.quality / 4),
            codecformat="j2k",
            reversible=lossless,
            mct=self.compression == COMPRESSION_APERIO_JPEG2000_RGB,
        )
        return bytes(encoded)


def _differences(tile: RGBImage) -> RGBImage:
    """Each pixel less its left neighbour, modulo 256: the horizontal predictor of TIFF 6.0, section 14."""
    out = tile.copy()
    out[:, 1:] -= tile[:, :-1]
    return out


def jpeg_codec(tile_px: int, quality: int, ycbcr: bool, share_tables: bool) -> TileCodec:
    """A JPEG codec; its shared tables are those of an empty tile, since they depend on the quality alone."""
    plain = TileCodec(COMPRESSION_JPEG, PHOTOMETRIC_YCBCR if ycbcr else PHOTOMETRIC_RGB, quality)
    if not share_tables:
        return plain
    blank = np.full((tile_px, tile_px, 3), 255, np.uint8)
    tables = split_tables(plain._encode_jpeg(blank))[0]
    return TileCodec(plain.compression, plain.photometric, quality, tables)


def _segments(jpeg: bytes) -> list[tuple[int, bytes]]:
    """Marker and whole bytes of each header segment; the last is SOS with the scan and the end marker."""
    found = []
    position = 2
    while True:
        marker = jpeg[position + 1]
        if marker == _SOS:
            found.append((marker, jpeg[position:]))
            return found
        length = 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
        found.append((marker, jpeg[position : position + length]))
        position += length


def _join(segments: list[bytes]) -> bytes:
    return b"".join([bytes((0xFF, _SOI)), *segments])


def strip_markers(jpeg: bytes) -> bytes:
    """The same JPEG without application segments (JFIF, Adobe) and comments: the TIFF tags tell the colours."""
    return _join([data for marker, data in _segments(jpeg) if marker < 0xE0])


def split_tables(jpeg: bytes) -> tuple[bytes, bytes]:
    """Split a JPEG into its tables and an abbreviated stream, as TIFF Technical Note 2 lays them out."""
    segments = [(marker, data) for marker, data in _segments(jpeg) if marker < 0xE0]
    tables = [data for marker, data in segments if marker in {_DQT, _DHT}]
    rest = [data for marker, data in segments if marker not in {_DQT, _DHT}]
    return _join([*tables, bytes((0xFF, _EOI))]), _join(rest)


def number_components(jpeg: bytes) -> bytes:
    """Rename the components R, G, B of a JPEG to 0, 1, 2, as in the RGB tiles of Aperio scanners."""
    segments = []
    for marker, data in _segments(jpeg):
        renamed = bytearray(data)
        if marker == _SOF0:
            renamed[10:19:3] = bytes((0, 1, 2))
        elif marker == _SOS:
            renamed[5:11:2] = bytes((0, 1, 2))
        segments.append(bytes(renamed))
    return _join(segments)
