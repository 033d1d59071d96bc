"""Memory and cores that this process may use, in its container and in the control groups around it."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from sb3_clipvf.common.resources import free_memory, usable_cores


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the control groups of a machine with 1,000,000 bytes free and 8 cores."""
    folder = tmp_path / "cgroup"
    folder.mkdir()
    monkeypatch.setattr("sb3_clipvf.common.resources._GROUPS", folder)
    monkeypatch.setattr("sb3_clipvf.common.resources._OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**6))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return folder


def write(folder: Path, **texts: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        if text is not None:
            (folder / name.replace("__", ".")).write_text(text + "\n")


STAT = "anon 50\nshmem 30\ninactive_anon 80\nactive_anon 0\ninactive_file 100\nactive_file 20"
# The group's own numbers, and those with the groups in it.
OLD_STAT = "cache 60\ninactive_file 5\nactive_file 1\ntotal_shmem 30\ntotal_inactive_file 100\ntotal_active_file 20"

LIMITS = [
    ("1000", "400", None, 600),
    ("1000", "1400", None, 0),
    ("max", "400", None, 10**6),
    (str(2**63 - 4096), "0", None, 10**6),  # no limit, in version 1
    ("1000", None, None, 10**6),
]


@pytest.mark.parametrize(("limit", "used", "stat", "free"), [*LIMITS, ("1000", "900", STAT, 220), ("9", "9", STAT, 9)])
def test_a_containers_limit_counts(limit: str, used: str | None, stat: str | None, free: int, groups: Path) -> None:
    """Without its page cache, which the kernel drops when memory is needed."""
    write(groups, memory__max=limit, memory__current=used, memory__stat=stat)
    assert free_memory() == free


@pytest.mark.parametrize(("limit", "used", "stat", "free"), [*LIMITS, ("1000", "900", OLD_STAT, 220)])
def test_a_limit_of_version_1_counts(limit: str, used: str | None, stat: str | None, free: int, groups: Path) -> None:
    write(groups / "memory", memory__limit_in_bytes=limit, memory__usage_in_bytes=used, memory__stat=stat)
    assert free_memory() == free


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1), ("1600000 100000", 8), ("max 100000", 8)],
)
def test_a_containers_quota_of_cores_counts(quota: str, cores: int, groups: Path) -> None:
    assert usable_cores() == 8
    write(groups, cpu__max=quota)
    assert usable_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("200000", 2), ("250000", 3), ("-1", 8)])
def test_a_quota_of_version_1_counts(quota: str, cores: int, groups: Path) -> None:
    write(groups / "cpu", cpu__cfs_quota_us=quota, cpu__cfs_period_us="100000")
    assert usable_cores() == cores


def test_limits_of_groups_around_the_own_one_count(groups: Path, tmp_path: Path) -> None:
    """As of a systemd slice (version 2) or a job of SLURM (version 1)."""
    write(tmp_path, own="5:cpuset:/other\n4:memory:/slurm/job\n3:cpu,cpuacct:/slurm/job\n0::/user.slice/my.scope")
    write(groups / "user.slice", memory__max="1000", memory__current="100", cpu__max="600000 100000")
    write(groups / "user.slice/my.scope", memory__max="max", memory__current="100", cpu__max="max 100000")
    assert (free_memory(), usable_cores()) == (900, 6)
    write(groups / "memory/slurm", memory__limit_in_bytes="500", memory__usage_in_bytes="100")
    write(groups / "cpu/slurm/job", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    assert (free_memory(), usable_cores()) == (400, 3)
    write(groups / "memory/other", memory__limit_in_bytes="1", memory__usage_in_bytes="1")
    write(groups / "memory/slurm/job", memory__limit_in_bytes="200", memory__usage_in_bytes="100")
    assert (free_memory(), usable_cores()) == (100, 3)


@pytest.mark.usefixtures("groups")
def test_cores_are_counted_where_the_system_keeps_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS and Windows."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert usable_cores() == 8
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1
