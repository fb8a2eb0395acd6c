"""Kernels against SciPy, scikit-image and OpenCV: ``python -m benchmarks.kernels [--repeats N] [--json FILE]``.

On a 2,048² mask of thousands of nuclei; both ways are timed in turns in this one process, medians, one thread of ours
unless said. Cases against OpenCV run where it is installed.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import scipy.ndimage
import skimage
from numpy.typing import NDArray
from skimage.feature import peak_local_max
from skimage.measure import regionprops_table
from skimage.morphology import disk
from skimage.segmentation import watershed

from benchmarks import kernels_labels, kernels_maxima, kernels_morphology, kernels_regions
from benchmarks._common import Case, Timing, describe_machine, parse_options, run_cases
from wsi_engine import kernels
from wsi_engine.memory import keep_freed_memory
from wsi_engine.synthetic import SlideSpec, SyntheticSlide

SIDE = 2048
PROPERTIES = (
    "label", "area", "bbox", "centroid", "axis_major_length", "axis_minor_length", "eccentricity", "orientation",
    "perimeter", "area_convex", "solidity", "equivalent_diameter_area",
)  # fmt: skip


def noisy_nuclei(side: int = SIDE) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int32]]:
    """An attention map of real-looking nuclei with noise, its mask after opening and closing, and true labels."""
    slide = SyntheticSlide(SlideSpec(width=2 * side, height=2 * side, mpp=0.5, coverage=1, seed=7))
    labels = slide.truth.labels(side // 2, side // 2, side, side)
    rng = np.random.default_rng(0)
    blurred = scipy.ndimage.gaussian_filter((labels > 0).astype(np.float32), 1.0)
    attention = np.clip(blurred + rng.normal(0, 0.12, blurred.shape), 0, 1).astype(np.float32)
    mask = attention > 0.5
    for radius in (2, 1):
        mask = kernels.close_disk(kernels.open_disk(mask, radius), radius)
    return attention, mask, labels


def plain_chain(attention: NDArray[np.float32]) -> object:
    """The post-processing of Sahasrabudhe et al. (MICCAI 2020) in SciPy and scikit-image, and their measurements."""
    mask = attention > 0.5
    for radius in (2, 1):
        mask = scipy.ndimage.binary_opening(mask, disk(radius))
        mask = scipy.ndimage.binary_closing(mask, disk(radius))
    smoothed = scipy.ndimage.gaussian_filter(scipy.ndimage.distance_transform_edt(mask), 1.0)
    peaks = peak_local_max(smoothed, footprint=disk(7), labels=mask.astype(int), exclude_border=False)
    markers = np.zeros(mask.shape, bool)
    markers[tuple(peaks.T)] = True
    labels = watershed(-smoothed, scipy.ndimage.label(markers)[0], mask=mask)
    return regionprops_table(labels, properties=PROPERTIES)


def our_chain(attention: NDArray[np.float32], threads: int) -> object:
    """The same by the engine's kernels on so many threads."""
    kernels.set_thread_count(threads)
    try:
        return kernels.measure_regions(kernels.nuclei_from_attention(attention))
    finally:
        kernels.set_thread_count(1)


def all_cases() -> list[Case]:
    """Every case of the table."""
    attention, mask, labels = noisy_nuclei()
    modules = (kernels_morphology, kernels_labels, kernels_maxima, kernels_regions)
    cases = [case for module in modules for case in module.cases(mask, labels)]
    one, two = partial(our_chain, attention, 1), partial(our_chain, attention, 2)
    cases.append(
        Case("whole chain and measurements", "SciPy + scikit-image", 20.0, one, partial(plain_chain, attention))
    )
    cases.append(Case("whole chain, 2 threads", "1 thread", 1.7, two, one))
    return cases


def line(timing: Timing) -> str:
    """One line of the table."""
    case = timing.case
    figures = f"{1e3 * timing.ours:.2f} ms | {1e3 * timing.theirs:.1f} ms | {timing.ratio:.1f}× | {case.target:.2g}×"
    return f"| {case.name} | {case.against} | {figures} |"


def main() -> None:
    """Measure every case and print the table."""
    repeats, keep = parse_options(__doc__, 7)
    print(describe_machine())
    print(f"NumPy {np.__version__}, SciPy {scipy.__version__}, scikit-image {skimage.__version__}", flush=True)
    keep_freed_memory()  # for both sides, as in an engine's process
    kernels.set_thread_count(1)
    run_cases(all_cases(), line, repeats, keep)


if __name__ == "__main__":
    main()
