"""Disks that are full, folders that may no longer be written, and chunks that are torn: one sentence, nothing lost."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
from support_cohort import write_cohort
from support_faults import Case, FaultyJobs, draw_tissue, faulty_jobs, snapshot

from wsi_engine import FeatureStore, check_stores
from wsi_engine.errors import StoreError
from wsi_engine.nuclei.keeping import read_nuclei


@pytest.fixture(scope="module")
def jobs() -> FaultyJobs:
    return faulty_jobs()


@pytest.fixture(scope="module")
def cases(jobs: FaultyJobs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("given")
    given = {
        "extract": draw_tissue(folder / "slide.png"),
        "train": write_cohort(folder / "cohort", 16, 6),
        "nuclei": draw_tissue(folder / "picture.png", 160, 120),
    }
    return {job: Case.undisturbed(jobs, job, path, folder / job) for job, path in given.items()}


@pytest.mark.parametrize("job", ["extract", "train", "nuclei"])
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_refuses(jobs: FaultyJobs, cases: dict[str, Case], tmp_path: Path, job: str, fault: int) -> None:
    """From some change on every further one is refused, as on a full disk, or when a folder becomes read-only."""
    case = cases[job]
    for at in case.points(4):
        place = tmp_path / str(at)
        place.mkdir()
        outcome = jobs.run(job, place, case.given, fault=fault, at=at)
        assert not outcome.killed
        if outcome.said["status"] == "failed":
            assert outcome.said.get("ours", True), outcome
            assert "\n" not in outcome.said["message"]
            assert any(text in outcome.said["message"] for text in ("No space", "Permission denied", "cannot"))
        else:
            assert at > case.changes - 10, outcome  # only the lease was still to be removed
        case.assert_resumed(jobs, place)


def test_files_that_may_not_grow(jobs: FaultyJobs, cases: dict[str, Case], tmp_path: Path) -> None:
    """A real limit of the system: a file is written in part, then the write fails."""
    outcome = jobs.run("limited", tmp_path / "out", cases["extract"].given, 600)
    assert outcome.said["status"] == "failed"
    assert "File too large" in outcome.said["message"]
    cases["extract"].assert_resumed(jobs, tmp_path / "out")


def newest_chunk(folder: Path) -> Path:
    return max(
        (path for path in folder.rglob("c/*/*") if path.name.isdigit()), key=lambda path: path.stat().st_mtime_ns
    )


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_torn_batch_is_made_again(jobs: FaultyJobs, cases: dict[str, Case], tmp_path: Path, share: float) -> None:
    case, place = cases["extract"], tmp_path / "out"
    for at in range(case.changes // 3, case.changes, 4):  # until a kill leaves three batches behind
        shutil.rmtree(place, ignore_errors=True)
        assert jobs.run("extract", place, case.given, fault="kill", at=at).killed
        if len(list(place.glob("slide.zarr/features/mean/partial/c/*/0"))) >= 3:
            break
    torn = newest_chunk(place / "slide.zarr" / "features" / "mean" / "partial")
    torn.write_bytes(torn.read_bytes()[: int(torn.stat().st_size * share)])
    (finding,) = [one for one in check_stores(place).findings if one.path.endswith("/mean")]
    assert finding.kind == "unfinished"
    assert "1 torn ones are made again" in finding.what
    case.assert_resumed(jobs, place)


def test_torn_features_are_found_and_cured_by_what_is_said(
    jobs: FaultyJobs, cases: dict[str, Case], tmp_path: Path
) -> None:
    case, place = cases["extract"], tmp_path / "out"
    jobs.run("extract", place, case.given)
    torn = newest_chunk(place / "slide.zarr" / "features")
    torn.write_bytes(torn.read_bytes()[:-9])
    with pytest.raises(StoreError, match=r"delete it and extract again"):
        FeatureStore.open(place / "slide.zarr").features()
    (finding,) = check_stores(place).findings
    assert (finding.kind, finding.path) == ("damaged", str(torn))
    target = place / "slide.zarr" / "features" / "mean"
    assert finding.cure == f"delete {target} and run wsi extract again"
    shutil.rmtree(target)
    case.assert_resumed(jobs, place)


def test_torn_nuclei_are_found_and_cured_by_what_is_said(
    jobs: FaultyJobs, cases: dict[str, Case], tmp_path: Path
) -> None:
    case, place = cases["nuclei"], tmp_path / "out"
    jobs.run("nuclei", place, case.given)
    torn = newest_chunk(place / "picture.zarr" / "nuclei")
    torn.write_bytes(torn.read_bytes()[:-1])
    with pytest.raises(StoreError, match="damaged"):
        read_nuclei(FeatureStore.open(place / "picture.zarr"))
    assert jobs.run("nuclei", place, case.given).said["status"] == "failed"
    (finding,) = check_stores(place).damaged
    assert finding.path == str(torn)
    shutil.rmtree(place / "picture.zarr" / "nuclei" / "stain")
    assert "wsi nuclei again" in finding.cure
    case.assert_resumed(jobs, place)


def test_a_torn_state_of_a_training(jobs: FaultyJobs, cases: dict[str, Case], tmp_path: Path) -> None:
    case, place = cases["train"], tmp_path / "out"
    place.mkdir()
    for at in range(case.changes // 3, case.changes):  # until a kill leaves a state behind
        assert jobs.run("train", place, case.given, fault="kill", at=at).killed
        if states := list(place.glob("fold-*/state.pt")):
            break
    states[0].write_bytes(states[0].read_bytes()[:-100])
    outcome = jobs.run("train", place, case.given)
    assert outcome.said["status"] == "failed"
    assert "delete it to start the fold anew" in outcome.said["message"]
    (finding,) = check_stores(place).damaged
    assert finding.path == str(states[0])
    states[0].unlink()
    case.assert_resumed(jobs, place)


def test_a_finished_slide_is_not_touched_by_a_full_disk(
    jobs: FaultyJobs, cases: dict[str, Case], tmp_path: Path
) -> None:
    case, place = cases["extract"], tmp_path / "out"
    jobs.run("extract", place, case.given)
    for fault in (errno.ENOSPC, errno.EACCES):
        jobs.run("extract", place, case.given, fault=fault, at=1)
        assert snapshot(place) == case.made
