"""Components that cross windows: joined along the seams, and handed on once no window to come can add to them.

A component whose bounding box outgrows a limit (a fold, ink, a field where everything touches) is not kept until it is
complete: it is cut along a lattice of the slide, the same whatever the tiles, and its parts go on as each cell of the
lattice is complete. Whether a component is cut depends on its whole extent alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels.pieces import paint_along
from wsi_engine.nuclei.pieces import Edges, Pieces, WindowPieces, join_pieces
from wsi_engine.nuclei.windows import WindowMaps

LARGEST_PX = 1 << 24
"""Pixels of the bounding box up to which a component is kept whole: 1 mm² at 0.25 µm."""

CELL_PX = 1024
"""Side of the cells that larger components are cut into."""

_NEIGHBOURS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0))

_HALF = 32
"""Bits of the number of a component."""

Key = tuple[int, int]


@dataclass
class _Open:
    """A component that windows to come may add to."""

    box: list[int]
    waiting: int = 0
    parts: list[Pieces] = field(default_factory=list)
    cells: dict[Key, _Cell] | None = None
    """Its pixels by cell, once it is known to be cut."""


class _Cell:
    """The pixels of a component in one cell of the lattice."""

    def __init__(self, row: int, column: int, side: int, channels: int) -> None:
        self.top, self.left = row * side, column * side
        self.mask = np.zeros((side, side), np.bool_)
        self.pixels = np.zeros((side, side, 3), np.uint8)
        self.maps = np.zeros((channels, side, side), np.float32)

    def paint(self, part: Pieces) -> None:
        paint_along(part.runs, self.top, self.left, part.pixels, part.maps, self.mask, self.pixels, self.maps)

    def add(self, other: _Cell) -> None:
        self.mask |= other.mask
        self.pixels[other.mask] = other.pixels[other.mask]
        self.maps[:, other.mask] = other.maps[:, other.mask]

    def pieces(self) -> Pieces:
        return WindowPieces(self.mask, self.maps, self.pixels, self.left, self.top).all()


class SeamJoiner:
    """Takes windows in rows from the top, and gives back complete components.

    Args:
        keys: row and column of every window that will come.
        side: of a window, in pixels.
        largest_px: pixels of the bounding box up to which a component is kept whole.
    """

    def __init__(self, keys: set[Key], side: int, largest_px: int = LARGEST_PX) -> None:
        self._left = set(keys)
        self._rows = {row: sum(1 for key in keys if key[0] == row) for row in {key[0] for key in keys}}
        self._side, self._largest = side, largest_px
        self._edges: dict[Key, Edges] = {}
        self._waiting_for: dict[Key, list[int]] = {}
        self._parent: dict[int, int] = {}
        self._open: dict[int, _Open] = {}
        self._next = 1
        self.cut = 0
        """Components that were cut so far."""

    def add(self, window: WindowMaps) -> list[Pieces]:
        """Take a window in; returns the components that are complete with it."""
        pieces = WindowPieces(window.mask, window.maps, window.pixels, window.x, window.y, window.detail)
        edges = pieces.edges
        self._left.remove(window.key)
        touching = np.unique(np.concatenate([edges.top, edges.bottom, edges.left, edges.right]))
        touching = touching[touching > 0] - 1
        inner = np.ones(len(pieces), bool)
        inner[touching] = False
        done = [pieces.take(np.flatnonzero(inner))] if inner.any() else []
        ids = self._enter(pieces, touching)
        self._edges[window.key] = numbered = _renumber(edges, touching, ids, len(pieces))
        self._wait(window.key, numbered)
        self._join(window.key, numbered)
        candidates = {self._find(k) for k in ids}
        for k in self._waiting_for.pop(window.key, []):
            root = self._find(k)
            self._open[root].waiting -= 1
            candidates.add(root)
        for root in sorted(candidates):
            done += self._close(root)
        self._forget(window.key)
        return done + self._emit_cells(window.key[0])

    def _enter(self, pieces: WindowPieces, touching: NDArray[np.int64]) -> list[int]:
        ids = []
        for part in pieces.take_each(touching):
            self._parent[self._next] = self._next
            entry = _Open(part.boxes[0].tolist(), parts=[part])
            self._open[self._next] = entry
            self._check(entry)
            ids.append(self._next)
            self._next += 1
        return ids

    def _wait(self, key: Key, edges: Edges) -> None:
        """Note which components touch windows to come."""
        for step in _NEIGHBOURS:
            other = key[0] + step[0], key[1] + step[1]
            if other in self._left:
                touching = np.unique(_side_towards(edges, step))
                for k in touching[touching > 0].tolist():
                    self._open[k].waiting += 1
                    self._waiting_for.setdefault(other, []).append(k)

    def _join(self, key: Key, edges: Edges) -> None:
        """Join what touches windows that came before, by sides or corners."""
        for step in _NEIGHBOURS:
            other = self._edges.get((key[0] + step[0], key[1] + step[1]))
            if other is None:
                continue
            mine, theirs = _side_towards(edges, step), _side_towards(other, (-step[0], -step[1]))
            for a, b in _contacts(mine, theirs).tolist():
                self._unite(a, b)

    def _unite(self, a: int, b: int) -> None:
        first, second = sorted((self._find(a), self._find(b)))
        if first == second:
            return
        self._parent[second] = first
        kept, gone = self._open[first], self._open.pop(second)
        kept.box = [*map(min, kept.box[:2], gone.box[:2]), *map(max, kept.box[2:], gone.box[2:])]
        kept.waiting += gone.waiting
        kept.parts += gone.parts
        if gone.cells is not None:
            kept.cells = {} if kept.cells is None else kept.cells
            for place, cell in gone.cells.items():
                if place in kept.cells:
                    kept.cells[place].add(cell)
                else:
                    kept.cells[place] = cell
        self._check(kept)

    def _check(self, entry: _Open) -> None:
        """Cut a component that has grown too large, and what was added to one that is cut."""
        top, left, bottom, right = entry.box
        if entry.cells is None and (bottom - top) * (right - left) <= self._largest:
            return
        entry.cells = {} if entry.cells is None else entry.cells
        side = CELL_PX
        for part in entry.parts:
            top, left, bottom, right = part.boxes[0].tolist()
            for row in range(top // side, (bottom - 1) // side + 1):
                for column in range(left // side, (right - 1) // side + 1):
                    if (row, column) not in entry.cells:
                        entry.cells[row, column] = _Cell(row, column, side, len(part.maps))
                    entry.cells[row, column].paint(part)
        entry.parts = []

    def _close(self, root: int) -> list[Pieces]:
        """The component if it is complete."""
        entry = self._open[root]
        if entry.waiting:
            return []
        del self._open[root]
        if entry.cells is None:
            return [join_pieces(entry.parts)]
        self.cut += 1
        return [cell.pieces() for _, cell in sorted(entry.cells.items()) if cell.mask.any()]

    def _emit_cells(self, row: int) -> list[Pieces]:
        """Parts of components that are cut, from cells to which nothing can come any more, at the end of a row."""
        self._rows[row] -= 1
        if self._rows[row]:
            return []
        frontier = min((key[0] for key in self._left), default=None)
        if frontier is None:
            return []
        done = []
        for entry in self._open.values():
            for place in sorted(entry.cells or {}):
                assert entry.cells is not None
                if (place[0] + 1) * CELL_PX <= frontier * self._side:
                    cell = entry.cells.pop(place)
                    if cell.mask.any():
                        done.append(cell.pieces())
        return done

    def _forget(self, key: Key) -> None:
        """Drop the sides of windows whose neighbours have all come, this one among them."""
        for dy, dx in (*_NEIGHBOURS, (0, 0)):
            near = key[0] + dy, key[1] + dx
            if near in self._edges and not any((near[0] + a, near[1] + b) in self._left for a, b in _NEIGHBOURS):
                del self._edges[near]

    def _find(self, k: int) -> int:
        while self._parent[k] != k:
            self._parent[k] = self._parent[self._parent[k]]
            k = self._parent[k]
        return k


def _renumber(edges: Edges, touching: NDArray[np.int64], ids: list[int], count: int) -> Edges:
    """Edges with the numbers that pieces have beyond their window."""
    table = np.zeros(count + 1, np.int64)
    table[touching + 1] = ids
    return Edges(table[edges.top], table[edges.bottom], table[edges.left], table[edges.right])


def _side_towards(edges: Edges, step: Key) -> NDArray[np.int64]:
    """The pixels of a window that touch its neighbour in a direction: a side, or one corner."""
    dy, dx = step
    if dy == 0:
        return edges.left if dx < 0 else edges.right
    side = edges.top if dy < 0 else edges.bottom
    if dx == 0:
        return side
    return side[:1] if dx < 0 else side[-1:]


def _contacts(mine: NDArray[np.int64], theirs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pairs of components that touch across a seam, straight or diagonally: int64 (n, 2), ascending."""
    size = len(mine)
    pairs = []
    for shift in (-1, 0, 1) if size > 1 else (0,):
        a = mine[max(0, -shift) : size - max(0, shift)]
        b = theirs[max(0, shift) : size - max(0, -shift)]
        both = (a > 0) & (b > 0)
        pairs.append(a[both] << _HALF | b[both])  # a pair in one number: far quicker to sort than rows
    found = np.unique(np.concatenate(pairs))
    return np.stack([found >> _HALF, found & (1 << _HALF) - 1], axis=1)
