"""Advice after a run names the stage that was waited for."""

from __future__ import annotations

import sys

import pytest

from wsi_engine.bottleneck import find_bottleneck
from wsi_engine.memory import keep_freed_memory


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"read": 1, "decode": 1, "resample": 1, "encode": 95, "write": 1}, "encode"),
        ({"read": 20, "decode": 150, "resample": 15, "encode": 40, "write": 1}, "decode"),
        ({"read": 150, "decode": 20, "resample": 15, "encode": 40, "write": 1}, "read"),
        ({"read": 10, "decode": 20, "resample": 150, "encode": 40, "write": 1}, "resample"),
        ({"read": 10, "decode": 20, "resample": 10, "encode": 40, "write": 90}, "write"),
        ({"read": 10, "decode": 20, "resample": 10, "encode": 20, "write": 5}, ""),
        ({}, ""),
    ],
)
def test_the_busiest_stage_is_named(seconds: dict[str, float], expected: str) -> None:
    stage, advice = find_bottleneck(seconds, 100.0, 2)
    assert stage == expected
    assert len(advice) > 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_can_be_kept() -> None:
    assert keep_freed_memory() in (True, False)
    assert keep_freed_memory() == keep_freed_memory()
