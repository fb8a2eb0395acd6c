"""Which stage a run waited for, and what would make it faster."""

from __future__ import annotations

from collections.abc import Mapping

_BUSY = 0.6
"""A stage that is busy for less of the time than this did not hold the run up by itself."""

_ADVICE = {
    "read": "the disk or network gives bytes too slowly: copy the slides to a local disk, or use more --workers",
    "decode": "decompressing tiles takes the time: give the run more cores (--workers)",
    "resample": "resampling takes the time: give the run more cores (--workers), or leave out --exact-resample",
    "encode": "the encoder sets the pace: a GPU, a larger --batch-size or a smaller encoder would help",
    "write": "the disk takes features too slowly: write to a local disk",
    "": "no stage was busy all the time: the slides are small, and opening them and finding tissue takes its share",
}


def find_bottleneck(seconds: Mapping[str, float], wall_seconds: float, workers: int) -> tuple[str, str]:
    """The stage that was busiest and advice in one sentence; the stage is empty where none was busy.

    Args:
        seconds: thread-seconds per stage (:data:`~wsi_engine.clock.STAGES`).
        wall_seconds: how long the run took.
        workers: threads that read; encoding and writing have one each.
    """
    wall = max(wall_seconds, 1e-9)
    reading = {stage: seconds.get(stage, 0.0) for stage in ("read", "decode", "resample")}
    busy = {"encode": seconds.get("encode", 0.0) / wall, "write": seconds.get("write", 0.0) / wall}
    slowest = max(reading, key=lambda stage: reading[stage])
    busy[slowest] = sum(reading.values()) / (wall * workers)
    stage = max(busy, key=lambda name: busy[name])
    if busy[stage] < _BUSY:
        stage = ""
    return stage, _ADVICE[stage]
