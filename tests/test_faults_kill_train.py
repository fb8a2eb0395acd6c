"""SIGKILL at twenty-three points of a training: one more run ends in the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_cohort import write_cohort
from support_faults import Case, FaultyJobs, faulty_jobs


@pytest.fixture(scope="module")
def jobs() -> FaultyJobs:
    return faulty_jobs()


def test_train(jobs: FaultyJobs, tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path / "cohort", 16, 6)
    case = Case.undisturbed(jobs, "train", cohort, tmp_path / "whole")
    assert sum(name.endswith(".safetensors") for name in case.made) == 2
    case.kill_everywhere(jobs, tmp_path, 23)
