"""Atomic writes: neither a crash nor a full disk leaves half a file."""

import contextlib
import errno
import io
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

# What systems answer if a folder cannot be synced at all, or not be opened for it without the right to list it
_NO_SYNC = {errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


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
    system allows it, its owner and group.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        old = target.stat() if target.exists() else None
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

    One that cannot be removed does no harm, and stays.
    """
    pattern = re.compile(rf"\.({names})\.\d+-[0-9a-f]{{8}}\.tmp")
    for path in list(folder.iterdir()):
        if pattern.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


def write_error(path: Path, error: OSError) -> OSError:
    """Return an error of the same ``errno``, hence class, that names the file, the consequence and a way out."""
    reason = error.strerror or str(error)
    text = f"{path} could not be written: {reason}. What it held before is unchanged. Free space there, or choose"
    return OSError(error.errno, f"{text} a folder that can be written to.")


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
