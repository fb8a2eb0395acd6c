"""SIGKILL at twenty-two points of a search for nuclei: one more run ends in the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_faults import Case, FaultyJobs, draw_tissue, faulty_jobs


@pytest.fixture(scope="module")
def jobs() -> FaultyJobs:
    return faulty_jobs()


def test_nuclei(jobs: FaultyJobs, tmp_path: Path) -> None:
    picture = draw_tissue(tmp_path / "picture.png", 112, 96)
    case = Case.undisturbed(jobs, "nuclei", picture, tmp_path / "whole")
    assert "picture.stain.geojson" in case.made
    case.kill_everywhere(jobs, tmp_path, 22)
