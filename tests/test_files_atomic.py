"""atomic_write leaves old or new content, whatever fails, and its error names the file and a hint."""

import errno
import os
import resource
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from failing import Killed, fail_at

from sb3_clipvf.files.atomic import _process_space, atomic_write, remove_unfinished


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


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o4755])
def test_atomic_write_keeps_the_permissions_of_the_old_file(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    with atomic_write(path) as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600  # private until it is complete
        Path(file.name).write_bytes(b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == mode & 0o777


def test_atomic_write_refuses_a_file_that_may_not_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o444)
    if os.geteuid() == 0:  # who may write to it
        monkeypatch.setattr(os, "access", lambda path, mode, **_: mode != os.W_OK)
    with pytest.raises(PermissionError, match="file could not be written: Permission denied"), atomic_write(path):
        pytest.fail("it was opened")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_atomic_write_writes_to_pipes_and_devices_directly(tmp_path: Path) -> None:
    pipe, link, device = tmp_path / "pipe", tmp_path / "link", tmp_path / "null"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    device.symlink_to("/dev/null")
    for path in (pipe, link):
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        with atomic_write(path) as file:
            file.write(b"content")
        assert os.read(reader, 100) == b"content"
        os.close(reader)
    with atomic_write(device) as file:
        file.write(b"content")
    assert stat.S_ISFIFO(pipe.stat().st_mode) and stat.S_ISCHR(device.stat().st_mode)
    assert sorted(tmp_path.iterdir()) == [link, device, pipe]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to others")
def test_atomic_write_keeps_the_owner_of_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.chown(path, 1234, 5678)
    with atomic_write(path):
        pass
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 5678)


def test_atomic_write_replaces_a_file_whose_owner_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without root, and on file systems without permissions."""
    path, groups = tmp_path / "file", []
    path.write_bytes(b"old")
    denied = PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def chown(path: Path, owner: int, group: int) -> None:
        if owner != -1:
            raise denied
        groups.append(group)

    monkeypatch.setattr(os, "chown", chown)
    monkeypatch.setattr(os, "chmod", fail_at(0, os.chmod, denied, after=False))
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert groups == [tmp_path.stat().st_gid]


@pytest.mark.parametrize("is_dangling", [False, True])
def test_atomic_write_replaces_the_target_of_a_link(tmp_path: Path, is_dangling: bool) -> None:
    """Beside the target, since the link may be on another file system."""
    target, first, link = tmp_path / "data" / "target", tmp_path / "first", tmp_path / "links" / "link"
    for folder in (target.parent, link.parent):
        folder.mkdir()
    first.symlink_to(target)
    link.symlink_to(Path("..", "first"))
    if not is_dangling:
        target.write_bytes(b"old")
    with atomic_write(link) as file:
        assert Path(file.name).parent == target.parent
        file.write(b"new")
    assert link.is_symlink() and first.is_symlink()
    assert target.read_bytes() == b"new"
    assert [os.listdir(folder) for folder in (target.parent, link.parent)] == [["target"], ["link"]]


def test_atomic_write_names_a_link_into_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "none" / "file")
    with (
        pytest.raises(FileNotFoundError, match="link could not be written: No such file"),
        atomic_write(tmp_path / "link"),
    ):
        pass
    assert (tmp_path / "link").is_symlink()


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
def test_atomic_write_on_a_full_disk_names_the_file_and_the_hint(
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


@pytest.mark.parametrize(
    ("function", "number"),
    [("fsync", errno.EINVAL), ("fsync", errno.ENOTSUP), ("fsync", errno.ENOSYS), ("open", errno.EACCES)],
)
def test_atomic_write_into_folders_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    """As on some network and FUSE file systems, and in a folder that this user may not list."""
    real, error = getattr(os, function), OSError(number, os.strerror(number))
    call = 1 if function == "fsync" else 0  # the file itself is opened by `open`
    monkeypatch.setattr(os, function, fail_at(call, real, error, after=False))
    with atomic_write(tmp_path / "f") as file:
        file.write(b"new")
    monkeypatch.undo()
    assert (tmp_path / "f").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["f"]


def test_atomic_write_on_a_file_system_that_cannot_sync_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    monkeypatch.setattr(os, "fsync", fail_at(0, os.fsync, error, after=False))
    with pytest.raises(OSError, match="could not be written: Invalid argument"), atomic_write(tmp_path / "f"):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("length", "character"), [(240, "m"), (255, "m"), (120, "\u00e4")])
def test_atomic_write_takes_names_as_long_as_the_file_system_does(tmp_path: Path, length: int, character: str) -> None:
    path = tmp_path / (character * length)
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_atomic_write_advises_a_shorter_name_where_one_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"unchanged\. Choose a shorter name\."), atomic_write(tmp_path / ("m" * 256)):
        pass
    assert os.listdir(tmp_path) == []


def ended_process() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


@pytest.mark.parametrize(
    ("process", "space", "hours", "stays"),
    [
        (ended_process, _process_space, 0, False),
        (os.getppid, _process_space, 0, True),
        (os.getppid, _process_space, 7, False),
        (ended_process, lambda: "0123abcd", 5, True),  # another machine
        (ended_process, lambda: "0123abcd", 7, False),
    ],
    ids=["ended", "running", "its number was used again", "of another machine", "of another machine, and old"],
)
def test_only_temporary_files_that_no_process_writes_are_removed(
    tmp_path: Path, process: Callable[[], int], space: Callable[[], str], hours: int, stays: bool
) -> None:
    files = [tmp_path / f".{name}.{process()}-{space()}01234567.tmp" for name in ("a.zip", "other")]
    for path in files:
        path.write_bytes(b"half")
        os.utime(path, (time.time() - 3600 * hours,) * 2)
    remove_unfinished(tmp_path, r"[a-z]\.zip")
    assert [path.exists() for path in files] == [stays, True]


def test_a_training_that_starts_in_the_folder_leaves_a_running_write(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "best_model.zip") as file:
        file.write(b"new")
        remove_unfinished(tmp_path, r"best_model\.zip")
    assert (tmp_path / "best_model.zip").read_bytes() == b"new"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with atomic_write(tmp_path / "best_model.zip"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(os.listdir(tmp_path)) == 1
    remove_unfinished(tmp_path, r"best_model\.zip")
    assert os.listdir(tmp_path) == []
