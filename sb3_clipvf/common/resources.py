"""How much memory and how many cores this process may use: the machine's, or its container's."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

# Containers, SLURM and systemd limit processes by Linux's control groups.
_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def free_memory() -> int:
    """
    Return the bytes that this process may still allocate: on the machine, or in its container if that is less.

    The page cache counts as free, since the kernel drops it when memory is needed.
    """
    free = int(psutil.virtual_memory().available)
    for group in _groups("memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _text(group / limit_name), _text(group / used_name)
            if limit.isdigit() and used.isdigit():  # "max": no limit
                in_use = max(0, int(used) - _page_cache(group))
                free = min(free, max(0, int(limit) - in_use))
    return free


def usable_cores() -> int:
    """Return the number of cores that this process may use: the machine's, or its container's quota, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups("cpu"):
        old = f"{_text(group / 'cpu.cfs_quota_us')} {_text(group / 'cpu.cfs_period_us')}"
        quota, _, period = (_text(group / "cpu.max") or old).partition(" ")
        if quota.isdigit() and period.isdigit():  # "max" or -1: no quota
            cores = min(cores, -(-int(quota) // int(period)))
    return max(1, cores)


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control group and of those around it, in versions 2 and 1 of Linux's."""
    # In a container, the folder of its own group may be the root, whatever the second file names.
    for line in ("0::/", f"1:{controller}:/", *_text(_OWN_GROUPS).splitlines()):
        _, names, path = line.split(":", 2)
        if not names or controller in names.split(","):
            inner = PurePosixPath(path.lstrip("/"))
            root = _GROUPS / controller if names else _GROUPS
            yield from (root / group for group in (inner, *inner.parents))


def _page_cache(group: Path) -> int:
    """Return the bytes of files that a control group keeps in memory, without those of tmpfs and shared memory."""
    numbers = dict(line.split(" ", 1) for line in _text(group / "memory.stat").splitlines())
    # Version 1 has the group's own number, too, without those of the groups in it.
    kinds = ("inactive_file", "active_file")
    return sum(int(numbers.get(f"total_{kind}", numbers.get(kind, 0))) for kind in kinds)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
