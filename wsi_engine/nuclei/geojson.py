"""Nuclei for QuPath: a FeatureCollection that is written as a stream, whole or not at all."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels.texts import format_rings
from wsi_engine.nuclei.drafts import replacing
from wsi_engine.nuclei.instances import InstanceSet

COLOUR = (40, 160, 90)
"""Red, green and blue that QuPath draws nuclei in."""

_AT_A_TIME = 2_000
_NAMESPACE = uuid.UUID("6c2f5a0e-3c57-5f0b-9d0c-0f6f1f1d7a11")


def write_nuclei_geojson(nuclei: InstanceSet, path: str | os.PathLike[str]) -> None:
    """Write nuclei for QuPath (0.4 or newer): a detection each, with its measurements, in level-0 pixels.

    Written a few thousand nuclei at a time, so that memory does not grow with their number, into a file that appears
    whole or not at all. Ids follow from slide, method and number, so that the same nuclei keep them.

    Args:
        nuclei: any.
        path: a ``.geojson`` file, replaced.

    Raises:
        StoreError: the file cannot be written.

    Source: RFC 7946; QuPath's documentation, "Exporting annotations", for the properties.
    """
    with replacing(path, "the nuclei") as draft, open(draft, "w", encoding="utf-8") as stream:
        stream.write('{"type":"FeatureCollection","features":[')
        for start, text in _format_features(nuclei):
            stream.write(("," if start else "") + "\n" + text)
        stream.write("\n]}\n")


def _format_features(nuclei: InstanceSet) -> Iterator[tuple[int, str]]:
    """Some nuclei at a time as text, a Feature on each line, and the number of the first."""
    space = uuid.uuid5(_NAMESPACE, f"{nuclei.record.slide}/{nuclei.record.method}")
    table = nuclei.table()
    names = [name for name in table if name not in ("id", "x", "y")]
    classification = json.dumps({"name": "nucleus", "color": list(COLOUR)}, separators=(",", ":"))
    measured = ",".join([f'"{name}":%.5g' for name in names])
    feature = (
        '{"type":"Feature","id":"%s","geometry":{"type":"Polygon","coordinates":[%s]},"properties":'
        f'{{"objectType":"detection","classification":{classification},"measurements":{{{measured}}}}}}}'
    )
    for start in range(0, len(nuclei), _AT_A_TIME):
        stop = min(start + _AT_A_TIME, len(nuclei))
        bounds = nuclei.offsets[start : stop + 1]
        rings = _format_rings(bounds - bounds[0], nuclei.points[bounds[0] : bounds[-1]])
        columns = [table[name][start:stop].tolist() for name in names]
        ids = [uuid.uuid5(space, str(number)) for number in range(start + 1, stop + 1)]
        lines = [feature % parts for parts in zip(ids, rings, *columns, strict=True)]
        yield start, ",\n".join(lines)


def _format_rings(offsets: NDArray[np.int64], points: NDArray[np.float32]) -> list[str]:
    """Rings to 0.01 px; in whole numbers where all of them are, which is shorter."""
    places = points.astype(np.float64)
    hundredths = np.rint(places * 100)
    return format_rings(offsets, places, whole=not (hundredths % 100).any())
