"""Read files and zips that fit into memory, and raise ``ValueError`` for any damage."""

import contextlib
import io
import json
import os
import pathlib
import zipfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

from stable_baselines3.common.save_util import open_path

from sb3_clipvf.common.resources import free_memory

ModelPath = str | pathlib.Path | io.BufferedIOBase

SMALL = 16 * 2**20
"""Size in bytes that is always accepted, of a file and of what a zip expands to."""

MAX_ENTRIES = 100_000  # of a zip
MAX_EXPANSION = 100  # times a zip's own size, beyond SMALL; SB3 does not compress at all

BYTES_OF_VALUE = 100
"""Upper bound of the memory of a JSON value, besides its text; pickles are counted in the same way."""

_MEMORY_SHARE = 3  # a file may take 1/3 of the free memory: the values read from it, and the model, take as much
_ENTRY_HEADER = b"PK\x01\x02"
_LOCAL_HEADER = b"PK\x03\x04"
_END, _LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x07"
_IS_ENCRYPTED = 0x1


def read_bytes(path: ModelPath, suffix: str | None) -> tuple[str, bytes]:
    """Return a file's name for messages, and its bytes if they fit into memory. An open file keeps its position."""
    path = pathlib.Path(path) if isinstance(path, os.PathLike) else path
    file = open_path(path, "r", verbose=0, suffix=suffix)
    name = str(getattr(file, "name", "the file"))
    start = file.tell()
    try:
        size = file.seek(0, os.SEEK_END)
        _check_size(name, size)
        file.seek(0)
        return name, file.read(size)
    finally:
        if isinstance(path, str | pathlib.Path):
            file.close()
        else:
            file.seek(start)


def entries_of(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    """Check names, sizes and compression of all entries of a zip, then yield the name and bytes of each."""
    if content[:4] != _LOCAL_HEADER and not _is_zip(content):
        what = f"{len(content)} bytes of something else" if content else "an empty file"
        raise ValueError(f"{name} wasn't a zip-file, but {what}. Pass the zip that `save` wrote.")
    with _opened(name, content) as archive:
        entries = archive.infolist()
        # In a zip that was cut, Python may find the list of torch's zip inside it, whose entries have folders.
        for entry in entries:
            if "/" in entry.filename or "\\" in entry.filename:
                raise ValueError(
                    f"{name} must hold no folders, got {entry.filename!r}. It is cut short, or was not written by "
                    "`save`. Save it again, or fetch another copy."
                )
        for entry in entries:
            with _damage_explained(name):
                raw = archive.read(entry)
            yield entry.filename, raw


def check_inner_zip(name: str, content: bytes) -> None:
    """Check the list of entries of a zip inside a zip, such as torch's files of tensors; skip anything else."""
    # torch takes for a zip what begins as one, and finds its end where Python may find none.
    if content[:2] == b"PK" or _is_zip(content):
        with _opened(name, content) as archive:
            _check_list(name, content, archive)
            pickles = sum(entry.file_size for entry in archive.infolist() if entry.filename.endswith(".pkl"))
        _check_size(f"the values of {name}", BYTES_OF_VALUE * pickles)


def check_json(name: str, content: bytes) -> None:
    """Refuse JSON whose values would not fit into memory: they may take many times the bytes of their text."""
    n_values = sum(map(content.count, (b",", b"[", b"{")))
    _check_size(f"the values of {name}", len(content) + BYTES_OF_VALUE * n_values)


def reason_of(error: Exception) -> str:
    """Return type and first line of an error, to be part of another's message."""
    text = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def memory_limit() -> int:
    """Return the bytes that what a file holds may take."""
    return max(SMALL, free_memory() // _MEMORY_SHARE)


def _check_size(name: str, size: int) -> None:
    limit = memory_limit()
    if size > limit:
        raise ValueError(
            f"{name} must be small enough to be loaded, got {size / 2**20:,.0f} MiB. The limit is "
            f"{limit / 2**20:,.0f} MiB: a third of the free memory, or {SMALL / 2**20:,.0f} MiB if that is more. If "
            "you trust the file, use a machine with more memory."
        )


def read_json(archive: zipfile.ZipFile, entry: str) -> Any:
    """Read a small JSON entry of a zip whose sizes have not been checked."""
    if archive.getinfo(entry).file_size > SMALL:
        raise ValueError(f"{entry} is larger than {SMALL:,} bytes")
    raw = archive.read(entry)
    check_json(entry, raw)
    return json.loads(raw)


def _is_zip(content: bytes) -> bool:
    try:
        return zipfile.is_zipfile(io.BytesIO(content))
    except zipfile.BadZipFile:
        return True  # a damaged one


def _opened(name: str, content: bytes) -> zipfile.ZipFile:
    # Count first: reading the list of entries takes many times the memory of its bytes.
    n_entries = content.count(_ENTRY_HEADER)
    if n_entries > MAX_ENTRIES:
        raise ValueError(f"{name} must have at most {MAX_ENTRIES} entries, got {n_entries}. Save it again.")
    with _damage_explained(name):
        archive = zipfile.ZipFile(io.BytesIO(content))
    _check_entries(name, len(content), archive.infolist())
    return archive


def _check_list(name: str, content: bytes, archive: zipfile.ZipFile) -> None:
    """Refuse a zip in which torch would find another list of entries than the one that Python has read."""
    end = content.rfind(_END, 0, len(content) - 18)
    found, is_same = int.from_bytes(content[end + 16 : end + 20], "little"), True
    if content[max(0, end - 20) : max(0, end - 16)] == _LOCATOR_64:
        # Python reads the record before this locator; torch reads that at the place which the locator names.
        record = end - 76
        is_same = int.from_bytes(content[end - 12 : end - 4], "little") == record
        found = int.from_bytes(content[record + 48 : record + 56], "little")
    if not is_same or found != archive.start_dir:
        raise ValueError(f"{name} is damaged or cut short: its list of entries is elsewhere. Save it again.")


def _check_entries(name: str, size: int, entries: list[zipfile.ZipInfo]) -> None:
    twice = [entry for entry, count in Counter(entry.filename for entry in entries).items() if count > 1]
    if twice:
        raise ValueError(
            f"{name} must hold each entry once, got {', '.join(map(repr, twice))} several times. Save it again."
        )
    for entry in entries:
        what = f"{entry.filename!r} in {name}"
        if entry.flag_bits & _IS_ENCRYPTED:
            raise ValueError(f"{what} must not be encrypted. Pack it again without a password.")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{what} must be stored or deflated, got method {entry.compress_type}. Pack it again.")
        # torch seeks in entries, which raises EOFError on Python 3.12 if the two sizes differ.
        if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
            raise ValueError(
                f"{name} is damaged or cut short: {entry.filename!r} has {entry.file_size} bytes, stored in "
                f"{entry.compress_size}. Save it again, or fetch another copy."
            )
    total = sum(entry.file_size for entry in entries)
    if total > max(SMALL, MAX_EXPANSION * size):
        raise ValueError(
            f"{name} must not expand more than {MAX_EXPANSION} times, got {size:,} bytes that expand to {total:,}. "
            "If you trust the file, pack it again without compression."
        )
    _check_size(name, total)


@contextlib.contextmanager
def _damage_explained(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # zipfile and zlib fail in a dozen ways on damaged bytes
        raise ValueError(
            f"{name} is damaged or cut short: {reason_of(error)}. Save it again, or fetch another copy."
        ) from error
