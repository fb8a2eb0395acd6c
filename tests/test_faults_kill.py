"""SIGKILL at fifty-five points of an extraction: one more run ends in the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_faults import Case, FaultyJobs, draw_tissue, faulty_jobs


@pytest.fixture(scope="module")
def jobs() -> FaultyJobs:
    return faulty_jobs()


def test_extract(jobs: FaultyJobs, tmp_path: Path) -> None:
    slide = draw_tissue(tmp_path / "slide.png")
    case = Case.undisturbed(jobs, "extract", slide, tmp_path / "whole")
    assert sum("/values/c/" in name for name in case.made) == 1
    case.kill_everywhere(jobs, tmp_path, 55)


def test_killed_again_and_again(jobs: FaultyJobs, tmp_path: Path) -> None:
    """Each run gets a little further than the one before."""
    slide = draw_tissue(tmp_path / "slide.png")
    case = Case.undisturbed(jobs, "extract", slide, tmp_path / "whole")
    place = tmp_path / "killed"
    place.mkdir()
    kills = 0
    while (outcome := jobs.run("extract", place, slide, fault="kill", at=70)).killed:
        kills += 1
        assert kills < 20
    assert kills > 1
    assert outcome.said["status"] == "done"
    case.assert_resumed(jobs, place)
