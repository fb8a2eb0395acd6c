"""Feed the readers with harmful inputs: ``python tests/fuzz.py [--count N] [--seed S] [TARGET ...]``.

Prints, for each target, how inputs ended, and every finding with the number that makes it again:
``python tests/fuzz.py --only NUMBER TARGET``. Exit code 1 where there was a finding.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from support_fuzz import fuzz, run_child
from support_targets import COUNTS, TARGETS


def main() -> int:
    """Run what the command line asks for."""
    if sys.argv[1:2] == ["--child"]:
        name, start, stop, folder, seed = sys.argv[2:]
        run_child(TARGETS[name], name, int(start), int(stop), Path(folder), int(seed))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"any of {', '.join(TARGETS)}")
    parser.add_argument("--count", type=int, help="inputs of each target, in place of its own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one input")
    asked = parser.parse_args()
    unknown = set(asked.targets) - set(TARGETS)
    if unknown:
        parser.error(f"there is no target {', '.join(sorted(unknown))}")
    found = 0
    for name in asked.targets or TARGETS:
        start = asked.only if asked.only is not None else 0
        stop = start + 1 if asked.only is not None else (asked.count or COUNTS[name])
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="fuzz-") as outer:
            folder = Path(outer) / "in"
            folder.mkdir()
            outcome = fuzz(name, start, stop, folder, asked.seed)
        counts = ", ".join(f"{kind} {count}" for kind, count in sorted(outcome.counts.items()))
        slow, at = outcome.slowest
        took = time.monotonic() - began
        print(f"{name}: {outcome.inputs} inputs in {took:.0f} s: {counts}; slowest {slow:g} s ({at})", flush=True)
        for finding in outcome.findings:
            print(f"--- {finding.target} {finding.number}: {finding.kind}\n{finding.detail}", flush=True)
        found += len(outcome.findings)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
