"""Atomic writes: neither a crash nor a full disk leaves half a file."""

import contextlib
import io
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[io.BufferedWriter]:
    """
    Open a file for writing that replaces ``path`` only when it is complete and on the disk.

    The bytes go to a temporary file in the same folder, which callers may also open by its ``name``. When the ``with``
    block ends, it is synced and renamed, and the folder is synced. After an exception, a kill or a power cut, ``path``
    holds either all of its old content or all of the new content. If syncing the folder fails, this raises although
    ``path`` holds the new content. A kill may leave the temporary file.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise write_error(target, error) from error
    finally:
        with contextlib.suppress(OSError):  # it is gone after a rename; a second error must not hide the first
            temporary.unlink()
    _sync_folder(target.parent)


def remove_unfinished(folder: Path, names: str) -> None:
    """Remove temporary files that killed writes left in a folder, for files whose names match a regular expression."""
    pattern = re.compile(rf"\.({names})\.\d+-[0-9a-f]{{8}}\.tmp")
    for path in list(folder.iterdir()):
        if pattern.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_error(path: Path, error: OSError) -> OSError:
    """Return an error of the same ``errno``, hence class, that names the file, the consequence and a way out."""
    reason = error.strerror or str(error)
    text = f"{path} could not be written: {reason}. What it held before is unchanged. Free space there, or choose"
    return OSError(error.errno, f"{text} a folder that can be written to.")


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable; without this a power cut can bring the old name back."""
    if os.name == "nt":  # folders cannot be opened there, and the rename is journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        text = f"the last file written to {folder} is complete but may not survive a power cut: {error.strerror}"
        raise OSError(error.errno, f"{text}. Check that disk.") from error
    finally:
        os.close(descriptor)
