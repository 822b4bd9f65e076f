# SPDX-License-Identifier: Apache-2.0
"""How many cores a cgroup leaves this process, as containers do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def quota(process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """CPU time per time that the process may use, of its cgroup and all above it: inf for no limit.

    process lists the process's cgroups; root is where they are mounted, version 1 or 2.
    """
    try:
        lines = process.read_text().splitlines()
    except OSError:  # no Linux
        return float("inf")
    limits = [float("inf")]
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            limits += (_version_2(group) for group in _groups(root, path))
        elif "cpu" in controllers.split(","):
            for mount in (root / controllers, root / "cpu"):
                limits += (_version_1(group) for group in _groups(mount, path))
    return min(limits)


def _groups(mount: Path, path: str) -> Iterator[Path]:
    """The cgroup's folder and those above it. In a container its own may be mounted as the root."""
    parts = PurePosixPath("/", path).relative_to("/").parts
    for count in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:count])


def _version_2(group: Path) -> float:
    """cpu.max holds "max 100000" or "50000 100000": microseconds, and in how many."""
    words = _words(group / "cpu.max")
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else float("inf")


def _version_1(group: Path) -> float:
    """cpu.cfs_quota_us is -1 for no limit."""
    quota, period = _words(group / "cpu.cfs_quota_us"), _words(group / "cpu.cfs_period_us")
    limited = quota and period and int(quota[0]) > 0
    return int(quota[0]) / int(period[0]) if limited else float("inf")


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
