"""A Slurm for tests: commands that start a job's script as a process of this machine, or the real ones of one node."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_SBATCH = """#!/usr/bin/env bash
cd "{folder}" || exit 1
if [ -e refuse ]; then
    echo "sbatch: error: Batch job submission failed: Invalid account" >&2
    exit 1
fi
n=1
until mkdir $n 2>/dev/null; do n=$((n + 1)); done
cp "$1" $n/script
cd $n
if [ ! -e ../hold ]; then
    setsid sh -c 'echo $$ >pid; bash script >out 2>&1 </dev/null; echo $? >rc' >/dev/null 2>&1 &
    while [ ! -s pid ]; do :; done
fi
echo "Submitted batch job $n"
"""

_SCANCEL = """#!/usr/bin/env bash
cd "{folder}/$1" || exit 1
touch cancelled
[ ! -e pid ] || kill -TERM -- "-$(cat pid)"
"""

_SQUEUE = """#!/usr/bin/env bash
cd "{folder}" || exit 1
if [ -e silent ]; then
    echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
    exit 1
fi
for word; do case $word in --jobs=*) jobs=${{word#--jobs=}} ;; esac; done
found=
for n in $(echo $jobs | tr , ' '); do
    [ -d $n ] || continue
    found=1
    if [ -e $n/cancelled ]; then echo "$n|CANCELLED|None"
    elif [ -e $n/rc ]; then echo "$n|FAILED|NonZeroExitCode"
    elif [ -e $n/pid ]; then echo "$n|RUNNING|None"
    else echo "$n|PENDING|PartitionDown"
    fi
done
[ -n "$found" ] || {{ echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }}
"""


@dataclass(frozen=True)
class FakeSlurm:
    """``sbatch``, ``scancel`` and ``squeue`` in a folder, which has a folder for each job."""

    folder: Path

    def install(self) -> Path:
        """Write the commands; the folder to put before ``PATH``."""
        commands = self.folder / "bin"
        commands.mkdir(parents=True)
        for name, text in (("sbatch", _SBATCH), ("scancel", _SCANCEL), ("squeue", _SQUEUE)):
            path = commands / name
            path.write_text(text.format(folder=self.folder))
            path.chmod(0o755)
        return commands

    def numbers(self) -> list[str]:
        """Jobs that have not ended, oldest first."""
        folders = sorted(
            (path for path in self.folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name)
        )
        return [path.name for path in folders if not (path / "cancelled").exists() and not (path / "rc").exists()]

    def stop(self) -> None:
        """Kill what is left."""
        for path in self.folder.glob("*/pid"):
            with suppress(OSError, ValueError):
                os.killpg(int(path.read_text()), signal.SIGKILL)


@dataclass(frozen=True)
class RealSlurm:
    """A Slurm of one node, this machine; jobs of a name are the test's."""

    name: str

    def numbers(self) -> list[str]:
        """Jobs that have not ended, oldest first."""
        words = ["squeue", "--noheader", "--format=%i", "--states=PENDING,RUNNING", f"--name={self.name}", "--sort=i"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()

    def stop(self) -> None:
        """End what is left."""
        subprocess.run(["scancel", f"--name={self.name}"], check=False)


def is_slurm_here() -> bool:
    """Whether ``sbatch`` is there and a Slurm answers whose only node is this machine, and is up."""
    if not (shutil.which("sbatch") and shutil.which("sinfo")):
        return False
    words = ["sinfo", "--noheader", "--format=%n %t"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    nodes = {tuple(line.split()[:2]) for line in said.splitlines() if line.strip()}
    here = {"localhost", socket.gethostname(), socket.gethostname().partition(".")[0]}
    return bool(nodes) and all(name in here and state in ("idle", "mix") for name, state in nodes)
