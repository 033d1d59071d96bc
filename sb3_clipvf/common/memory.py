"""How much memory is free."""

from pathlib import Path

import psutil

# Limit and use of a container's memory, in versions 2 and 1 of Linux's control groups.
_CONTAINER_FILES = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def free_memory() -> int:
    """Return the bytes that this process may still allocate: on the machine, or in its container if that is less."""
    free = int(psutil.virtual_memory().available)
    for limit_file, used_file in _CONTAINER_FILES:
        try:
            limit, used = limit_file.read_text().strip(), used_file.read_text().strip()
        except OSError:
            continue
        if limit.isdigit() and used.isdigit():  # "max": no limit
            free = min(free, max(0, int(limit) - int(used)))
    return free
