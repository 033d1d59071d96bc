"""atomic_write leaves old or new content, whatever fails, and its error names the file and a way out."""

import errno
import os
import resource
import stat
from pathlib import Path

import pytest
from failing import Killed, fail_at

from sb3_clipvf.files.atomic import atomic_write


def test_atomic_write_replaces_the_content_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new content")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new content"
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_write_takes_what_is_written_to_the_files_name(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "file") as file:
        Path(file.name).write_bytes(b"by name")
    assert (tmp_path / "file").read_bytes() == b"by name"


def test_atomic_write_gives_the_permissions_of_a_plain_open(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    with atomic_write(str(tmp_path / "atomic")):
        pass
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("error", [Killed(), RuntimeError("from the body")])
def test_atomic_write_keeps_the_old_content_when_the_body_raises(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_atomic_write_on_a_full_disk_names_the_file_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, function, fail_at(0, getattr(os, function), full, after=False))
    with (
        pytest.raises(OSError, match=r"file could not be written: No space left.*unchanged\. Free space") as info,
        atomic_write(path) as file,
    ):
        file.write(b"new")
    assert info.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_write_past_the_systems_own_limit_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="file could not be written: File too large"), atomic_write(path) as file:
            file.write(bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_write_keeps_the_kind_of_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    monkeypatch.setattr(os, "replace", fail_at(0, os.replace, denied, after=False))
    with pytest.raises(PermissionError, match="choose a folder that can be written to"), atomic_write(tmp_path / "f"):
        pass
    with pytest.raises(FileNotFoundError, match="none/f could not be written"), atomic_write(tmp_path / "none" / "f"):
        pass


def test_atomic_write_names_the_case_that_only_the_folder_was_not_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(os, "fsync", fail_at(1, os.fsync, broken, after=False))
    with pytest.raises(OSError, match="complete but may not survive a power cut"), atomic_write(tmp_path / "f") as file:
        file.write(b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
