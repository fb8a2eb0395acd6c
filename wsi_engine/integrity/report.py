"""What a check found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["damaged", "unfinished", "running", "leftover"]


@dataclass(frozen=True)
class Finding:
    """Something that is not as a finished and undisturbed run leaves it.

    Attributes:
        kind: ``damaged``: what was finished cannot be used any more; ``unfinished``: the same command goes on with it;
            ``running``: it is being written; ``leftover``: of a killed run, in nobody's way.
        path: where.
        what: is wrong.
        cure: what to do.
    """

    kind: Kind
    path: str
    what: str
    cure: str


@dataclass(frozen=True)
class PartReport:
    """What was found in one store, run or folder, and how much was read for it."""

    findings: tuple[Finding, ...] = ()
    files: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class CheckReport:
    """What a check found, folder by folder.

    Attributes:
        stores: stores that were checked.
        runs: training runs that were.
        files: files whose bytes were verified.
        bytes: their size.
        findings: in the order of their paths.
        seconds: it took.
    """

    stores: int
    runs: int
    files: int
    bytes: int
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def damaged(self) -> tuple[Finding, ...]:
        """What cannot be used any more."""
        return self.of("damaged")

    def of(self, kind: Kind) -> tuple[Finding, ...]:
        """The findings of a kind."""
        return tuple(finding for finding in self.findings if finding.kind == kind)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)
