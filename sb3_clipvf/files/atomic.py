"""Atomic writes: neither a crash nor a full disk leaves half a file."""

import contextlib
import errno
import hashlib
import io
import os
import platform
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

# What systems answer if a folder cannot be synced at all, or not be opened for it without the right to list it
_NO_SYNC = {errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

_LARGEST_AGE = 6 * 3600  # seconds that a write may last at most, with clocks that differ
_NAME_LENGTH = 50  # characters of the file's name in a temporary one, which must not be too long for the file system


class UnsyncedFolderError(OSError):
    """A file is complete, but the folder that names it could not be synced."""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[io.BufferedWriter]:
    """
    Open a file for writing that replaces ``path`` only when it is complete and on the disk.

    The bytes go to a temporary file in the same folder, which callers may also open by its ``name``. When the ``with``
    block ends, it is synced and renamed, and the folder is synced. After an exception, a kill or a power cut, ``path``
    holds either all of its old content or all of the new content. If syncing the folder fails, this raises an
    ``UnsyncedFolderError`` although ``path`` holds the new content; file systems that cannot sync folders are no error.
    A kill may leave the temporary file.

    A symbolic link is kept, and its target replaced. The new file has the permissions of the old one and, where the
    system allows it, its owner and group. A file that may not be written to is refused.

    Pipes and devices cannot be replaced: they are written to directly.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        with open(path, "wb") as stream:
            yield stream
        return
    target = Path(os.path.realpath(path))
    unique = f"{os.getpid()}-{_process_space()}{secrets.token_hex(4)}"
    temporary = target.with_name(f".{target.name[:_NAME_LENGTH]}.{unique}.tmp")
    try:
        old = target.stat() if target.exists() else None
        if old is not None and not os.access(target, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))  # the folder alone would allow it
        with open(temporary, "xb", opener=None if old is None else _open_private) as file:
            yield file
            file.flush()
            if old is not None:
                _set_access(temporary, old)
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise write_error(Path(path), error) from error
    finally:
        with contextlib.suppress(OSError):  # it is gone after a rename; a second error must not hide the first
            temporary.unlink()
    _sync_folder(target.parent)


def remove_unfinished(folder: Path, names: str) -> None:
    """
    Remove temporary files that killed writes left in a folder, for files whose names match a regular expression.

    Other processes may be writing into the folder, also from other machines. So this removes only files of processes
    of this machine that have ended, and files that have not changed for six hours. One that cannot be removed does no
    harm, and stays.
    """
    pattern = re.compile(rf"\.({names})\.(?P<process>\d{{1,9}})-(?P<space>[0-9a-f]{{8}})([0-9a-f]{{8}})?\.tmp")
    space, oldest = _process_space(), time.time() - _LARGEST_AGE
    for path in list(folder.iterdir()):
        found = pattern.fullmatch(path.name)
        with contextlib.suppress(OSError):
            if found is not None and (
                (found["space"] == space and _has_ended(int(found["process"]))) or path.stat().st_mtime < oldest
            ):
                path.unlink()


def _process_space() -> str:
    """Return eight hexadecimal digits for where numbers of processes are unique: a machine until its next start."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            text = file.read() + os.readlink("/proc/self/ns/pid")  # a container has its own numbers
    except OSError:  # not Linux
        text = platform.node()
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _has_ended(process: int) -> bool:
    """Return whether a process of this machine has ended; False if that is unknown."""
    if os.name != "nt":  # there, this would be a signal
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        except OSError:  # of another user
            pass
    return False


def write_error(path: Path, error: OSError) -> OSError:
    """Return an error of the same ``errno``, hence class, that names the file, the consequence and a hint."""
    reason = error.strerror or str(error)
    hint = "Free space there, or choose a folder that can be written to."
    if error.errno == errno.ENAMETOOLONG:
        hint = "Choose a shorter name."
    return OSError(error.errno, f"{path} could not be written: {reason}. What it held before is unchanged. {hint}")


def _open_private(path: str, flags: int) -> int:
    """Open a file that others cannot read yet: the file that it replaces may be private."""
    return os.open(path, flags, 0o600)


def _set_access(path: Path, old: os.stat_result) -> None:
    """Set owner, group and permissions as far as the system allows it: only root may give files to others."""
    if os.name != "nt":
        for owner, group in ((old.st_uid, -1), (-1, old.st_gid)):
            with contextlib.suppress(OSError):
                os.chown(path, owner, group)
    with contextlib.suppress(OSError):  # some file systems have no permissions
        os.chmod(path, stat.S_IMODE(old.st_mode) & 0o777)


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable; without this a power cut can bring the old name back."""
    if os.name == "nt":  # folders cannot be opened there, and the rename is journalled
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _NO_SYNC:
            return
        text = f"the last file written to {folder} is complete but may not survive a power cut: {error.strerror}"
        raise UnsyncedFolderError(error.errno, f"{text}. Check that disk.") from error
