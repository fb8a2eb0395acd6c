"""The Linux control groups that a process is in: limits set on any of them hold for it.

A batch system or container makes a group for a job, and may set limits on it or on a group around it. Within a group
that has a namespace of its own, all of this looks as if it were the whole machine.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
"""Where version 2 is mounted; of version 1 there is a folder for each controller in it."""

MEMBERSHIP = Path("/proc/self/cgroup")
"""Which groups this process is in: a line ``number:controllers:path`` each, of version 2 without controllers."""


def control_groups(controller: str, root: Path | None = None, membership: Path | None = None) -> list[Path]:
    """Folders of the groups whose limits hold for this process, its own first, then those around it up to the root.

    Those of version 2 come before those of version 1; some may not be there.

    Args:
        controller: of version 1, such as ``memory`` or ``cpu``.
        root: where they are mounted; None for :data:`ROOT`.
        membership: the file that names them; None for :data:`MEMBERSHIP`.
    """
    root = root or ROOT
    own = _read_membership(membership or MEMBERSHIP)
    found = [*_walk_up(root, own.get("", "/")), *_walk_up(root / "unified", own.get("", "/"))]
    return found + _walk_up(root / controller, own.get(controller, "/"))


def _read_membership(file: Path) -> dict[str, str]:
    """Paths of groups by controller, of version 2 by the empty name; none where the system does not tell."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    paths = {}
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        paths.update(dict.fromkeys(controllers.split(","), path))
    return paths


def _walk_up(mount: Path, path: str) -> list[Path]:
    """The folder of a group and of those around it; one outside of the namespace (``/../…``) cannot be seen."""
    parts = [part for part in PurePosixPath(path).parts if part != "/"]
    if ".." in parts:
        parts = []
    return [mount.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]
