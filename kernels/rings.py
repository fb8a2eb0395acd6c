"""Simplification of closed rings of integer points, such that they stay valid polygons."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled

LEAST_TOLERANCE = 0.25  # on pixel corners, nothing can be dropped below about this


@compiled
def _cross(ax: int, ay: int, bx: int, by: int, cx: int, cy: int) -> int:
    """Twice the signed area of the triangle a, b, c: 0 where they are in line."""
    return (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)


@compiled
def _squared_distance(px: float, py: float, ax: float, ay: float, bx: float, by: float) -> float:
    """Squared distance of p from the segment a – b."""
    dx, dy = bx - ax, by - ay
    length = dx * dx + dy * dy
    along = 0.0
    if length > 0:
        along = min(1.0, max(0.0, ((px - ax) * dx + (py - ay) * dy) / length))
    gap_x, gap_y = px - ax - along * dx, py - ay - along * dy
    return gap_x * gap_x + gap_y * gap_y


@compiled
def _furthest(ring: NDArray[np.int64], first: int, last: int) -> tuple[int, float]:
    """Index between first and last (count stands for 0) of the point furthest from their segment, and its square."""
    a, b = ring[first], ring[last % ring.shape[0]]
    best, where = -1.0, first
    for k in range(first + 1, last):
        gap = _squared_distance(ring[k, 0], ring[k, 1], a[0], a[1], b[0], b[1])
        if gap > best:
            best, where = gap, k
    return where, best


@compiled
def _choose_points(ring: NDArray[np.int64], tolerance: float, stack: NDArray[np.int64], keep: NDArray[np.bool_]) -> int:
    """Set ``keep`` for the points that Douglas-Peucker keeps of a closed ring; returns how many.

    The ring is split at its first point and at the point furthest from that.
    """
    count = ring.shape[0]
    opposite, _ = _furthest(ring, 0, count)
    keep[:] = False
    keep[0] = keep[opposite] = True
    kept, depth = 2, 2
    stack[0, 0], stack[0, 1] = 0, opposite
    stack[1, 0], stack[1, 1] = opposite, count
    while depth > 0:
        depth -= 1
        first, last = stack[depth, 0], stack[depth, 1]
        middle, gap = _furthest(ring, first, last)
        if gap <= tolerance * tolerance:
            continue
        keep[middle] = True
        kept += 1
        stack[depth, 0], stack[depth, 1] = first, middle
        stack[depth + 1, 0], stack[depth + 1, 1] = middle, last
        depth += 2
    return kept


@compiled
def _touch(a: NDArray[np.int64], b: NDArray[np.int64]) -> bool:
    """Whether two segments (x0, y0, x1, y1) share a point."""
    if max(a[0], a[2]) < min(b[0], b[2]) or max(b[0], b[2]) < min(a[0], a[2]):
        return False
    if max(a[1], a[3]) < min(b[1], b[3]) or max(b[1], b[3]) < min(a[1], a[3]):
        return False
    # The boxes meet: then the segments do, unless one lies strictly on one side of the other's line.
    s = np.sign(_cross(a[0], a[1], a[2], a[3], b[0], b[1])) * np.sign(_cross(a[0], a[1], a[2], a[3], b[2], b[3]))
    t = np.sign(_cross(b[0], b[1], b[2], b[3], a[0], a[1])) * np.sign(_cross(b[0], b[1], b[2], b[3], a[2], a[3]))
    return bool(s <= 0 and t <= 0)


@compiled
def _sort_by_top(ring: NDArray[np.int64], order: NDArray[np.int64]) -> None:
    """Fill ``order`` with the edges of the ring by ascending least y: a counting sort."""
    count = ring.shape[0]
    low, high = ring[0, 1], ring[0, 1]
    for k in range(count):
        low, high = min(low, ring[k, 1]), max(high, ring[k, 1])
    places = np.zeros(high - low + 2, np.int64)
    for k in range(count):
        places[min(ring[k, 1], ring[(k + 1) % count, 1]) - low + 1] += 1
    for k in range(1, places.size):
        places[k] += places[k - 1]
    for k in range(count):
        top = min(ring[k, 1], ring[(k + 1) % count, 1]) - low
        order[places[top]] = k
        places[top] += 1


@compiled
def _turns_back(ring: NDArray[np.int64], a: int, b: int, c: int) -> bool:
    """Whether the way from point a over b to c turns by more than a right angle."""
    across = (ring[b, 0] - ring[a, 0]) * (ring[c, 0] - ring[b, 0])
    down = (ring[b, 1] - ring[a, 1]) * (ring[c, 1] - ring[b, 1])
    return bool(across + down < 0)


@compiled
def _drop_straight(ring: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ring (n, 2) without the points that lie in line with their neighbours."""
    count, left = ring.shape[0], 0
    out = np.empty_like(ring)
    for k in range(count):
        a, b, c = ring[(k + count - 1) % count], ring[k], ring[(k + 1) % count]
        if _cross(a[0], a[1], b[0], b[1], c[0], c[1]) != 0:
            out[left, 0], out[left, 1] = b[0], b[1]
            left += 1
    return out[:left]


@compiled
def is_simple(ring: NDArray[np.int64]) -> bool:
    """Whether a closed ring (n, 2) neither crosses nor touches itself, and has a positive area.

    Edges are compared with those that begin above their lower end, so the work grows with the edges that share rows.
    """
    count = ring.shape[0]
    if count < 3:
        return False
    edges = np.empty((count, 4), np.int64)
    area = np.int64(0)
    for k in range(count):
        x, y, ahead = ring[k, 0], ring[k, 1], (k + 1) % count
        edges[k, 0], edges[k, 1], edges[k, 2], edges[k, 3] = x, y, ring[ahead, 0], ring[ahead, 1]
        area += x * ring[ahead, 1] - y * ring[ahead, 0]
        beyond = (k + 2) % count
        straight = _cross(x, y, ring[ahead, 0], ring[ahead, 1], ring[beyond, 0], ring[beyond, 1]) == 0
        if straight and _turns_back(ring, k, ahead, beyond):
            return False
    if area <= 0:
        return False
    order = np.empty(count, np.int64)
    _sort_by_top(ring, order)
    for i in range(count):
        a = order[i]
        bottom = max(edges[a, 1], edges[a, 3])
        for j in range(i + 1, count):
            b = order[j]
            if min(edges[b, 1], edges[b, 3]) > bottom:
                break
            gap = abs(a - b)
            if gap > 1 and gap < count - 1 and _touch(edges[a], edges[b]):
                return False
    return True


@compiled
def simplify_ring(points: NDArray[np.int32], count: int, tolerance: float) -> int:
    """Simplify the ring ``points[:count]`` in place; returns the number of points left.

    The tolerance is halved until the ring is a valid polygon of positive area; if it never is, nothing is dropped.

    Source: D. Douglas and T. Peucker, "Algorithms for the reduction of the number of points required to represent a
    digitized line", Cartographica 10 (1973).
    """
    ring = np.empty((count, 2), np.int64)
    for k in range(count):
        ring[k, 0], ring[k, 1] = points[k, 0], points[k, 1]
    stack, keep = np.empty((count, 2), np.int64), np.empty(count, np.bool_)
    while tolerance >= LEAST_TOLERANCE:
        kept = _choose_points(ring, tolerance, stack, keep)
        if kept == count:
            return count
        shorter = np.empty((kept, 2), np.int64)
        at = 0
        for k in range(count):
            if keep[k]:
                shorter[at, 0], shorter[at, 1] = ring[k, 0], ring[k, 1]
                at += 1
        if is_simple(shorter):
            corners = _drop_straight(shorter)
            for k in range(len(corners)):
                points[k, 0], points[k, 1] = corners[k, 0], corners[k, 1]
            return len(corners)
        tolerance /= 2
    return count
