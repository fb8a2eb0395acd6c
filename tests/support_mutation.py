"""Ways to spoil files: bytes, numbers, tags of a TIFF, values of JSON, cells of a CSV, folders of a store."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

NUMBERS = (
    *(0, 1, 2, 3, 7, 8, 16, 255, 256, 1 << 15, (1 << 16) - 1, 1 << 16, 1 << 24, (1 << 31) - 1, 1 << 31),
    *((1 << 32) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, (1 << 64) - 1),
)
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1 << 31, 1 << 62, 10**30, 0.5, -1e300, 1e-300, float("nan"), float("inf"), "", "x", "../../x",
    "/etc/passwd", "a/b", "\x00", "é" * 300, "1e999", [], [[]], [0], [1, 2], [1 << 40, 1 << 20], [-1, 6], {}, {"a": 1},
    "float64", "complex128", "string", "int8",
)  # fmt: skip
TEXTS = (
    "", "0", "-1", "1e999", "nan", "inf", "0x10", "٣", "1,5", "../x", "/etc/passwd", "a\x00b", '"', "'", "\n", "\r",
    ",", ";", "\t", "\ufeff", "é" * 250, "=1+1", "s3://x/y", "file:///etc/passwd", "x" * 3000, "C:\\x",
    ".", "..", "NaN", "True",
)  # fmt: skip


def pick(rng: np.random.Generator, items: Any) -> Any:
    """One of some items, as it is."""
    return items[int(rng.integers(len(items)))]


def spoil_bytes(data: bytes, rng: np.random.Generator, near: int | None = None) -> bytes:
    """Some changes to bytes; ``near`` favours the first so many of them."""
    out = bytearray(data)
    for _ in range(int(rng.geometric(0.5))):
        if not out:
            return bytes(rng.integers(0, 256, 20, np.uint8))
        span = min(near, len(out)) if near and rng.random() < 0.7 else len(out)
        at = int(rng.integers(span))
        choice = rng.integers(7)
        if choice == 0:
            out[at] ^= 1 << int(rng.integers(8))
        elif choice == 1:
            out[at] = int(rng.integers(256))
        elif choice == 2:
            size = int(pick(rng, (2, 4, 8)))
            number = int(pick(rng, NUMBERS)) % (1 << 8 * size)
            out[at : at + size] = number.to_bytes(size, pick(rng, ("little", "big")))
        elif choice == 3:
            del out[at : at + int(rng.integers(1, 64))]
        elif choice == 4:
            out[at:at] = bytes(rng.integers(0, 256, int(rng.integers(1, 64)), np.uint8))
        elif choice == 5:
            source = int(rng.integers(len(out)))
            piece = out[source : source + int(rng.integers(1, 256))]
            out[at : at + len(piece)] = piece
        elif rng.random() < 0.3:
            del out[at:]
    return bytes(out)


def list_tags(data: bytes) -> list[tuple[int, int, str]]:
    """Where the entries of a TIFF's directories are: position, bytes of an entry, byte order."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    count_format, entry, offset_format = (f"{order}Q", 20, f"{order}Q") if big else (f"{order}H", 12, f"{order}I")
    found, seen = [], set()
    (at,) = struct.unpack_from(offset_format, data, 8 if big else 4)
    while at and at not in seen and at + 8 < len(data):
        seen.add(at)
        (tags,) = struct.unpack_from(count_format, data, at)
        at += struct.calcsize(count_format)
        found += [(at + entry * k, entry, order) for k in range(min(tags, 200))]
        at += entry * tags
        at = struct.unpack_from(offset_format, data, at)[0] if at + 8 <= len(data) else 0
    return found


def spoil_tags(data: bytes, tags: list[tuple[int, int, str]], rng: np.random.Generator) -> bytes:
    """Some entries of a TIFF's directories with another code, type, count or value."""
    out = bytearray(data)
    for _ in range(int(rng.geometric(0.6))):
        at, size, order = pick(rng, tags)
        end = "little" if order == "<" else "big"
        what = rng.integers(5)
        if what == 0:
            codes = (254, 256, 257, 258, 259, 262, 270, 273, 277, 278, 279, 284, 322, 323, 324, 325, 330, 347, 338, 530,
                     317, 33003, 34675, 34118, 65420, 700, 305, 32997)  # fmt: skip
            out[at : at + 2] = int(pick(rng, codes)).to_bytes(2, end)
        elif what == 1:
            out[at + 2 : at + 4] = int(rng.integers(0, 20)).to_bytes(2, end)
        else:
            half = (size - 4) // 2
            place = at + 4 + (half if what > 2 else 0)
            number = int(pick(rng, NUMBERS)) if rng.random() < 0.7 else int(rng.integers(1 << 20))
            out[place : place + half] = (number % (1 << 8 * half)).to_bytes(half, end)
    return bytes(out)


def spoil_json(value: Any, rng: np.random.Generator) -> Any:
    """A JSON value with something changed at a random depth."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = pick(rng, list(value))
        choice = rng.random()
        if choice < 0.1:
            return {name: part for name, part in value.items() if name != key}
        if choice < 0.15:
            return value | {pick(rng, TEXTS): value[key]}
        return value | {key: spoil_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = int(rng.integers(len(value)))
        if rng.random() < 0.2:
            return [*value[:at], *value[at + 1 :]]
        return [*value[:at], spoil_json(value[at], rng), *value[at + 1 :]]
    if isinstance(value, int | float) and rng.random() < 0.4:
        return value * pick(rng, (-1, 0, 2, 1000, 10**9, 0.5)) + pick(rng, (0, 1, -1))
    return pick(rng, VALUES)


def spoil_json_text(text: bytes, rng: np.random.Generator) -> bytes:
    """JSON text with changed values, or with changed bytes."""
    if rng.random() < 0.15:
        return pick(rng, (b"", b"[" * 50_000, b"null", b"[]", b"{", b"\xff\xfe", b"1" * 5000, b'{"attributes":[]}'))
    if rng.random() < 0.15:
        return spoil_bytes(text, rng)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # spoiled already
        return spoil_bytes(text, rng)
    for _ in range(int(rng.integers(1, 3))):
        value = spoil_json(value, rng)
    return json.dumps(value).encode()


def spoil_table(text: str, rng: np.random.Generator) -> bytes:
    """A CSV with changed cells, lines or bytes."""
    rows = [line.split(",") for line in text.splitlines()]
    for _ in range(int(rng.integers(1, 4))):
        row = int(rng.integers(len(rows)))
        choice = rng.random()
        if choice < 0.6 and rows[row]:
            rows[row][int(rng.integers(len(rows[row])))] = pick(rng, TEXTS)
        elif choice < 0.7:
            rows[row] = rows[row][: int(rng.integers(len(rows[row]) + 1))]
        elif choice < 0.8:
            rows.insert(row, list(pick(rng, rows)))
        elif choice < 0.9 and len(rows) > 1:
            del rows[row]
        else:
            rows[row] = [*rows[row], pick(rng, TEXTS)]
    data = "\n".join(",".join(row) for row in rows).encode("utf-8", "surrogatepass")
    return spoil_bytes(data, rng) if rng.random() < 0.3 else data


def spoil_folder(source: Path, target: Path, rng: np.random.Generator) -> None:
    """A copy of a folder of Zarr with one to three of its files changed, gone, or something else than a file."""
    shutil.copytree(source, target)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    for _ in range(int(rng.integers(1, 4))):
        texts = [path for path in files if path.suffix == ".json"]
        path = pick(rng, texts if rng.random() < 0.7 else files)
        if not path.is_file() or path.is_symlink():
            continue
        choice = rng.random()
        if choice < 0.75:
            data = path.read_bytes()
            path.write_bytes(spoil_json_text(data, rng) if path.suffix == ".json" and data else spoil_bytes(data, rng))
            continue
        path.unlink()
        if choice < 0.82:
            os.mkfifo(path)
        elif choice < 0.88:
            path.symlink_to(pick(rng, ("/dev/zero", "/etc/passwd", "..", "nowhere", path.name, "/dev/stdin")))
        elif choice < 0.92:
            path.mkdir()
