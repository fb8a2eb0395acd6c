"""What the first page of a TIFF says about its slide: vendor, scale, objective."""

from __future__ import annotations

import re

import tifffile

from wsi_engine.readers.base import Metadata

_MICROMETRES = {"m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "in": 25_400.0}
_PER_UNIT = {2: 25_400.0, 3: 10_000.0}  # micrometres in the units of ResolutionUnit: inch, centimetre


def read_metadata(page: tifffile.TiffPage) -> Metadata:
    """Metadata from the ImageDescription (Aperio, OME-XML), else from the resolution fields of ``page``."""
    description = page.description if isinstance(page.description, str) else ""
    properties = {"tiff.compression": "JPEG", "tiff.tile_size": f"{page.tilewidth}×{page.tilelength}"}
    if isinstance(page.software, str) and page.software:
        properties["tiff.Software"] = page.software
    if page.is_svs:
        return _aperio(description, properties)
    if page.is_ome:
        mpp = _ome_scale(description, page.imagewidth, page.imagelength)
        if mpp is not None:
            return Metadata("ome-tiff", mpp, "OME PhysicalSizeX", None, properties)
    if description:
        properties["tiff.ImageDescription"] = description[:1000]
    mpp = _resolution_scale(page)
    vendor = "ome-tiff" if page.is_ome else "generic-tiff"
    return Metadata(vendor, mpp, "TIFF resolution" if mpp else None, None, properties)


def _aperio(description: str, properties: dict[str, str]) -> Metadata:
    fields = {}
    for part in description.split("|")[1:]:
        key, equals, value = part.partition("=")
        if equals:
            fields[key.strip()] = value.strip()
    properties.update({f"aperio.{key}": value for key, value in fields.items()})
    mpp = _number(fields.get("MPP"))
    return Metadata(
        vendor="aperio",
        mpp=None if mpp is None else (mpp, mpp),
        mpp_source=None if mpp is None else "aperio MPP",
        objective=_number(fields.get("AppMag")),
        properties=properties,
    )


def _ome_scale(xml: str, width: int, height: int) -> tuple[float, float] | None:
    """PhysicalSizeX and Y, in micrometres, of the image of the OME-XML that has the size of level 0."""
    for element in re.findall(r"<(?:\w+:)?Pixels\b([^>]*)>", xml):
        fields = dict(re.findall(r"\b(\w+)\s*=\s*\"([^\"]*)\"", element))
        if (fields.get("SizeX"), fields.get("SizeY")) != (str(width), str(height)):
            continue
        sides = []
        for axis in "XY":
            length = _number(fields.get(f"PhysicalSize{axis}"))
            unit = _MICROMETRES.get(fields.get(f"PhysicalSize{axis}Unit", "µm"))
            if length is None or unit is None:
                return None
            sides.append(length * unit)
        return sides[0], sides[1]
    return None


def _resolution_scale(page: tifffile.TiffPage) -> tuple[float, float] | None:
    """Micrometres per pixel by XResolution and YResolution, raw: files of photo software give values like 72 dpi."""
    unit = _PER_UNIT.get(int(page.tags.valueof(296, default=2)))  # the TIFF standard's default is the inch
    if unit is None:
        return None
    sides = []
    for code in (282, 283):
        value = page.tags.valueof(code)
        if not isinstance(value, tuple) or len(value) != 2 or value[0] <= 0 or value[1] <= 0:
            return None
        sides.append(unit * value[1] / value[0])
    return sides[0], sides[1]


def _number(text: str | None) -> float | None:
    """A positive finite number, or None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None
