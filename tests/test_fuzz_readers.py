"""A bounded part of what ``python tests/fuzz.py`` does at length, with inputs that are the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_fuzz import Outcome, Target, fuzz, fuzz_here, make_rng
from support_targets import TARGETS


def assert_harmless(outcome: Outcome, count: int) -> None:
    """All inputs were run, and each was read or refused; some of them each."""
    told = "\n".join(f"{one.target} {one.number}: {one.kind}\n{one.detail}" for one in outcome.findings)
    assert not outcome.findings, told
    assert outcome.inputs == count
    assert outcome.counts["refused"] > count // 10
    assert outcome.counts["read"] > 0


@pytest.mark.parametrize(("name", "count"), [("slides", 250), ("tiles", 400), ("stores", 12), ("formats", 16)])
def test_readers_that_may_crash_or_hang(name: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert_harmless(fuzz(name, 0, count, tmp_path / "in"), count)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "count"), [("tables", 400), ("models", 80), ("checkpoints", 60), ("runs", 60)])
def test_readers_in_python(name: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert_harmless(fuzz_here(TARGETS[name], name, count, tmp_path / "in"), count)


def test_inputs_follow_from_their_number() -> None:
    draws = [make_rng("slides", 0, number).integers(1 << 60) for number in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


BAD = {
    "wrong error": lambda place: {}["x"],
    "path escape": lambda place: (place.parent / "escaped").write_text("x"),
    "more than a sentence": lambda place: (_ for _ in ()).throw(__import__("wsi_engine").errors.SlideError("a\nb")),
    "read": lambda place: None,
}


@pytest.mark.parametrize("kind", BAD)
def test_the_harness_sees_what_is_wrong(kind: str, tmp_path: Path) -> None:
    target = Target(lambda folder: None, lambda sound, place, rng: place, lambda given, place: BAD[kind](place))
    outcome = fuzz_here(target, "bad", 1, tmp_path)
    assert outcome.counts == {kind: 1}
    assert [finding.kind for finding in outcome.findings] == ([] if kind == "read" else [kind])


CHILD = """
import os, sys, time, signal
sys.path.insert(0, {tests!r})
import numpy as np, support_targets
from support_fuzz import Target
def run(given, place):
    if given == 1: os.kill(os.getpid(), signal.SIGSEGV)
    if given == 3: time.sleep(1000)
    if given == 5: np.zeros(1 << 40, np.uint8)[:] = 1
counter = iter(range(-3, 100))
begin = int(sys.argv[3])
def mutate(sound, place, rng):
    number = next(counter)
    return number + begin if number >= 0 else -1
support_targets.TARGETS["bad"] = Target(lambda folder: None, mutate, run)
import fuzz; fuzz.main()
"""


def test_the_harness_sees_crashes_hangs_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    script = CHILD.format(tests=str(Path(__file__).parent))
    (tmp_path / "tests/fuzz.py").write_text(script.replace("import fuzz; fuzz.main()", _RUN))
    monkeypatch.setattr("support_fuzz.ROOT", tmp_path)
    monkeypatch.setattr("support_fuzz.SECONDS", 3.0)
    (tmp_path / "in").mkdir()
    outcome = fuzz("bad", 0, 7, tmp_path / "in")
    assert [(one.number, one.kind) for one in outcome.findings] == [
        (1, "crash SIGSEGV"), (3, "hang"), (5, "wrong error"),
    ]  # fmt: skip
    assert "MemoryError" in outcome.findings[-1].detail
    assert outcome.inputs == 7


_RUN = """
from pathlib import Path
from support_fuzz import run_child
name, start, stop, folder, seed = sys.argv[2:]
run_child(support_targets.TARGETS[name], name, int(start), int(stop), Path(folder), int(seed))
"""
