"""What is wrong with many things at once, told in one report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

MOST_EXAMPLES = 20
"""Examples that a report lists of one kind of problem."""


@dataclass(frozen=True)
class Problem:
    """One kind of problem, however many things have it.

    Attributes:
        what: what is wrong, with how many.
        examples: which they are, all of them.
        cure: what to do; empty where ``what`` says it.
    """

    what: str
    examples: tuple[str, ...] = ()
    cure: str = ""

    def __str__(self) -> str:
        named = f" ({list_some(self.examples, 3, '; ')})" if self.examples else ""
        return f"{self.what}{named}{': ' if self.cure else ''}{self.cure}"

    def lines(self) -> list[str]:
        """The problem on a line of its own, its examples on lines below."""
        shown = self.examples[:MOST_EXAMPLES]
        more = len(self.examples) - len(shown)
        head = f"- {self.what}{': ' if self.cure else ''}{self.cure}"
        return [head, *(f"    {example}" for example in shown), *([f"    and {more} more"] if more else [])]


def write_report(sentence: str, problems: Sequence[Problem]) -> str:
    """A sentence, and below it every problem with its examples."""
    return "\n".join([sentence, *(line for problem in problems for line in problem.lines())])


def find_torn(pairs: Iterable[tuple[str, str | None]]) -> tuple[str, ...]:
    """The patients that have several values, with these, in the order in which they come; nothing is no value."""
    values: defaultdict[str, set[str]] = defaultdict(set)
    for patient, value in pairs:
        values[patient] |= {value} if value else set()
    return tuple(f"{patient}: {', '.join(sorted(some))}" for patient, some in values.items() if len(some) > 1)


def list_some(names: Collection[str], most: int = 5, between: str = ", ") -> str:
    """The first of some names, and how many more there are."""
    shown = list(names)[:most]
    more = len(names) - len(shown)
    return between.join(shown) + (f" and {more} more" if more else "")


def count(number: int, one: str) -> str:
    """A number and what it counts: ``1 slide``, ``2 slides``, ``2 classes``."""
    many = f"{one}es" if one.endswith("s") else f"{one}s"
    return f"{number:,} {one if number == 1 else many}"
