"""Contours: filling them gives the labels back, they are valid polygons, and simplifying keeps them so."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from scipy import ndimage
from skimage.measure import grid_points_in_poly

from wsi_engine.kernels._threads import set_thread_count
from wsi_engine.kernels.contours import Contours, trace_contours
from wsi_engine.kernels.rings import is_simple
from wsi_engine.synthetic import SlideSpec, SyntheticSlide


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    set_thread_count(None)


def drawing(*rows: str) -> np.ndarray:
    """Labels drawn with digits, dots for 0."""
    return np.array([[0 if c == "." else int(c) for c in row] for row in rows], np.int32)


def nuclei() -> np.ndarray:
    slide = SyntheticSlide(SlideSpec(width=2048, height=2048, mpp=0.5, coverage=1))
    return slide.truth.labels(700, 700, 300, 260).astype(np.int32)


def images() -> dict[str, np.ndarray]:
    """Label images of many kinds."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:24, :24]
    return {
        "nuclei": nuclei(),
        "one pixel": np.ones((1, 1), np.int32),
        "full": np.full((7, 11), 5, np.int32),
        "one row": drawing(".22.2777."),
        "one column": drawing(".22.2777.").T,
        "diagonals": np.eye(9, dtype=np.int32) + 2 * np.eye(9, dtype=np.int32, k=1),
        "rings": (np.maximum(abs(y - 12), abs(x - 12)) % 2).astype(np.int32),
        "rings of three": (np.maximum(abs(y - 12), abs(x - 12)) % 3).astype(np.int32),
        "checkerboard": ((y + x) % 2).astype(np.int32) + 1,
        "loose noise": (rng.random((60, 70)) < 0.4).astype(np.int32),
        "noise": rng.random((90, 80)) < 0.6,
        "dense noise": (rng.random((60, 70)) < 0.75).astype(np.uint8),
        "three labels": rng.integers(0, 4, (30, 35)).astype(np.int32),
        "large ids": rng.integers(0, 3, (20, 21)) * 1_000_000_007,
    }


IMAGES = images()


def fill_ring(ring: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Pixels inside a ring of pixel corners, by counting the vertical edges to their left."""
    flips = np.zeros((shape[0], shape[1] + 1), bool)
    corners = ring.astype(int)
    for (x, y), (x_next, y_next) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if x == x_next:
            flips[min(y, y_next) : max(y, y_next), x] ^= True
    return np.logical_xor.accumulate(flips, axis=1)[:, :-1]


def filled_pieces(mask: np.ndarray) -> np.ndarray:
    """The mask with the holes of each 4-connected piece filled."""
    pieces, count = ndimage.label(mask)
    filled = np.zeros(mask.shape, bool)
    for k, box in zip(range(1, count + 1), ndimage.find_objects(pieces), strict=True):
        filled[box] |= ndimage.binary_fill_holes(pieces[box] == k)
    return filled


def crosses_itself(ring: np.ndarray) -> bool:
    """Whether two edges of a ring share a point other than the corner between neighbours, by trying all pairs."""
    start, end = ring, np.roll(ring, -1, axis=0)
    n = len(ring)

    def side(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
        return float(np.sign((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])))

    def on(a: np.ndarray, b: np.ndarray, p: np.ndarray) -> bool:
        return side(a, b, p) == 0 and bool((np.minimum(a, b) <= p).all() and (p <= np.maximum(a, b)).all())

    for i in range(n):
        for j in range(i + 1, n):
            a, b, c, d = start[i], end[i], start[j], end[j]
            if j == i + 1 or (i == 0 and j == n - 1):
                tip, tail = (d, a) if j == i + 1 else (c, b)
                if on(a, b, tip) or on(c, d, tail):
                    return True
            else:
                apart = side(a, b, c) == side(a, b, d) or side(c, d, a) == side(c, d, b)
                if not apart or on(a, b, c) or on(a, b, d) or on(c, d, a) or on(c, d, b):
                    return True
    return False


def area(ring: np.ndarray) -> float:
    x, y = ring.T
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)


def assert_outlines(labels: np.ndarray, contours: Contours) -> None:
    """Each ring is simple, turns at every point and runs the right way; together they cover each label once."""
    covered = {label: np.zeros(labels.shape, int) for label in np.unique(labels[labels > 0])}
    assert np.all(np.diff(contours.label) >= 0)
    for k, label in enumerate(contours.label):
        ring = contours.ring(k)
        steps = np.roll(ring, -1, axis=0) - ring
        assert ((steps == 0).sum(axis=1) == 1).all()
        assert (
            (steps[:, 0] == 0) != (np.roll(steps[:, 0], 1) == 0)
        ).all()  # upright and level in turn: no point in line
        corners = [ring[i] + steps[i] * t / n for i, n in enumerate(np.abs(steps).sum(axis=1)) for t in range(int(n))]
        assert len({(x, y) for x, y in corners}) == len(corners)  # no pixel corner twice: does not touch itself
        inside = fill_ring(ring, labels.shape)
        assert area(ring) == inside.sum() > 0
        covered[label] += inside
    for label, times in covered.items():
        np.testing.assert_array_equal(times, filled_pieces(labels == label).astype(int))


@pytest.mark.parametrize("kind", IMAGES)
def test_filling_the_contours_gives_the_labels_back(kind: str) -> None:
    labels = IMAGES[kind]
    before = labels.copy()
    assert_outlines(labels, trace_contours(labels))
    np.testing.assert_array_equal(labels, before)


@settings(max_examples=60, deadline=None)
@given(st_numpy.arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 2)))
def test_contours_of_any_labels(labels: np.ndarray) -> None:
    assert_outlines(labels, trace_contours(labels))


def test_filling_by_scikit_image_agrees() -> None:
    labels = IMAGES["nuclei"]
    contours = trace_contours(labels, offset=(-0.5, -0.5))  # with pixel centres on whole numbers
    for k in range(0, len(contours), 7):
        inside = grid_points_in_poly(labels.shape, contours.ring(k)[:, ::-1])
        np.testing.assert_array_equal(inside, filled_pieces(labels == contours.label[k]))


def test_a_pixel_is_the_square_that_it_covers_with_positive_area() -> None:
    contours = trace_contours(drawing("....", "..3."))
    assert contours.label.tolist() == [3]
    assert contours.offsets.tolist() == [0, 4]
    assert contours.ring(0).tolist() == [[2, 1], [3, 1], [3, 2], [2, 2]]
    assert area(contours.ring(0)) == 1


def test_pixels_that_touch_at_a_corner_are_two_rings() -> None:
    contours = trace_contours(drawing("4.", ".4"))
    assert contours.label.tolist() == [4, 4]
    assert contours.ring(0).tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]
    assert contours.ring(1).tolist() == [[1, 1], [2, 1], [2, 2], [1, 2]]


def test_a_hole_that_opens_at_a_corner_is_filled() -> None:
    labels = drawing("1111.", "1..1.", "1.1..", "11111")
    contours = trace_contours(labels)
    assert len(contours) == 1
    assert area(contours.ring(0)) == (labels == 1).sum() + 3
    assert_outlines(labels, contours)


def test_pieces_inside_a_hole_of_their_own_label_have_no_ring() -> None:
    labels = drawing("11111..", "1...1.1", "1.1.1..", "1...1.2", "11111..")
    contours = trace_contours(labels)
    assert contours.label.tolist() == [1, 1, 2]
    assert [area(contours.ring(k)) for k in range(3)] == [25, 1, 1]


def test_another_label_inside_a_hole_has_its_ring() -> None:
    contours = trace_contours(drawing("111", "121", "111"))
    assert [(label, area(contours.ring(k))) for k, label in enumerate(contours.label)] == [(1, 9), (2, 1)]


def test_offset_and_scale_place_the_points() -> None:
    labels = IMAGES["three labels"]
    plain, placed = trace_contours(labels), trace_contours(labels, offset=(1000.5, -20), scale=4.0)
    np.testing.assert_array_equal(placed.points, plain.points * 4 + [1000.5, -20])
    np.testing.assert_array_equal(placed.offsets, plain.offsets)
    np.testing.assert_array_equal(placed.label, plain.label)


@pytest.mark.parametrize("tolerance", [0.3, 0.75, 1.0, 2.0, 50.0])
@pytest.mark.parametrize("kind", ["nuclei", "one pixel", "one row", "loose noise", "dense noise", "three labels"])
def test_simplified_rings_are_valid_and_near(kind: str, tolerance: float) -> None:
    labels = IMAGES[kind]
    exact, contours = trace_contours(labels), trace_contours(labels, simplify=tolerance)
    np.testing.assert_array_equal(contours.label, exact.label)
    assert len(contours.points) <= len(exact.points)
    for k in range(len(contours)):
        ring, full = contours.ring(k), exact.ring(k)
        assert len(ring) >= 3
        assert area(ring) > 0
        assert is_simple(ring.astype(np.int64))
        if len(ring) < 60:
            assert not crosses_itself(ring)
        assert {(x, y) for x, y in ring} <= {(x, y) for x, y in full}
        assert distance_to_ring(full, ring).max() <= tolerance + 1e-9


def distance_to_ring(points: np.ndarray, ring: np.ndarray) -> np.ndarray:
    start, step = ring[None], (np.roll(ring, -1, axis=0) - ring)[None]
    gap = points[:, None] - start
    along = np.clip((gap * step).sum(-1) / (step**2).sum(-1), 0, 1)
    return np.linalg.norm(gap - along[..., None] * step, axis=-1).min(axis=1)


def test_simplifying_drops_most_points_of_nuclei() -> None:
    labels = IMAGES["nuclei"]
    assert len(trace_contours(labels, simplify=1.0).points) < 0.4 * len(trace_contours(labels).points)


def test_a_staircase_becomes_straight() -> None:
    labels = np.tril(np.ones((8, 8), np.int32))
    assert len(trace_contours(labels).points) == 18
    assert len(trace_contours(labels, simplify=1.0).points) <= 5


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=7, unique=True))
def test_is_simple_finds_every_crossing(points: list[tuple[int, int]]) -> None:
    ring = np.array(points, np.int64)
    assert is_simple(ring) == (area(ring) > 0 and not crosses_itself(ring))


def test_shapely_finds_the_rings_valid() -> None:
    shapely = pytest.importorskip("shapely")
    for labels in IMAGES.values():
        for tolerance in (0, 1.0, 3.0):
            contours = trace_contours(labels, simplify=tolerance)
            for k in range(len(contours)):
                polygon = shapely.Polygon(contours.ring(k))
                assert polygon.is_valid
                assert polygon.exterior.is_ccw


def test_views_are_traced_as_their_copies() -> None:
    view = nuclei()[::-2, 5::3]
    view.flags.writeable = False
    assert_same(trace_contours(view), trace_contours(view.copy()))


def assert_same(one: Contours, other: Contours) -> None:
    np.testing.assert_array_equal(one.label, other.label)
    np.testing.assert_array_equal(one.offsets, other.offsets)
    np.testing.assert_array_equal(one.points, other.points)


@pytest.mark.parametrize("tolerance", [0, 1.0])
def test_the_number_of_threads_does_not_matter(tolerance: float, threads: None) -> None:
    # All 2 × 2 chequers of two labels: threads then write marks side by side.
    numbered = 1 + np.random.default_rng(0).integers(0, 400, (260, 240)).astype(np.int32)
    for labels in (numbered, np.tile(IMAGES["nuclei"], (2, 1))):
        found = []
        for count in (1, 3):
            set_thread_count(count)
            found.append(trace_contours(labels, simplify=tolerance))
        assert_same(*found)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (6, 7)])
def test_no_labels_make_no_contours(shape: tuple[int, int]) -> None:
    contours = trace_contours(np.zeros(shape, np.int32))
    assert len(contours) == 0
    assert contours.offsets.tolist() == [0]
    assert contours.points.shape == (0, 2)


@pytest.mark.parametrize(
    ("labels", "options", "error", "words"),
    [
        (np.zeros((2, 2), np.float32), {}, TypeError, "not float32"),
        (np.zeros((2, 2, 1), np.int32), {}, ValueError, r"not \(2, 2, 1\)"),
        (np.array([[-1]]), {}, ValueError, "-1"),
        (np.ones((2, 2), np.int32), {"scale": 0}, ValueError, "scale"),
        (np.ones((2, 2), np.int32), {"scale": np.nan}, ValueError, "scale"),
        (np.ones((2, 2), np.int32), {"offset": (1, np.inf)}, ValueError, "offset"),
        (np.ones((2, 2), np.int32), {"offset": (1, 2, 3)}, ValueError, "offset"),
        (np.ones((2, 2), np.int32), {"simplify": -1}, ValueError, "tolerance"),
        (np.ones((2, 2), np.int32), {"simplify": np.nan}, ValueError, "tolerance"),
    ],
)
def test_bad_input_is_refused(
    labels: np.ndarray, options: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        trace_contours(labels, **options)  # type: ignore[arg-type]
