"""The state of ``Monitor``'s files: a resume removes rows after the checkpoint, and restores lost rows."""

import csv
import os
from typing import Any

from stable_baselines3.common.monitor import ResultsWriter

from sb3_clipvf.common.messages import log

LARGEST_FILE = 2**24
"""Bytes (16 MiB) up to which a checkpoint holds a file's content; of longer files, only the length."""

_PATH, _LENGTH, _CONTENT = "monitor_path", "monitor_length", "monitor_content"


def file_state(writer: ResultsWriter | None) -> dict[str, Any] | None:
    """Return the path and the length of the file of ``Monitor``, ``VecMonitor`` or an adapter; None without a file."""
    if writer is None or writer.file_handler.closed:
        return None
    writer.file_handler.flush()
    return {_PATH: writer.file_handler.name, _LENGTH: os.fstat(writer.file_handler.fileno()).st_size}


def with_contents(tree: Any) -> Any:
    """
    Replace the paths of files in a state with their content.

    Files only grow, so this can be done as late as a checkpoint is written.
    """
    if isinstance(tree, dict):
        if _PATH not in tree:
            return {key: with_contents(item) for key, item in tree.items()}
        content = None
        if tree[_LENGTH] <= LARGEST_FILE:
            try:
                with open(tree[_PATH], "rb") as file:
                    content = file.read(tree[_LENGTH])
            except OSError as error:
                log.warning("The checkpoint lacks the rows of %s: %s. Keep that file for a resume.", tree[_PATH], error)
        return {_LENGTH: tree[_LENGTH], _CONTENT: content}
    if type(tree) is list and tree and isinstance(tree[0], dict):
        return [with_contents(item) for item in tree]
    return tree


def restore_file(writer: ResultsWriter | None, state: dict[str, Any] | None) -> None:
    """Restore the rows of a file, whether or not it was opened with them; warn if they are lost."""
    if writer is None or state is None:
        return
    handler = writer.file_handler
    handler.flush()
    length, content = state[_LENGTH], state[_CONTENT]
    with open(handler.name, "rb") as file:
        if content is None and os.fstat(file.fileno()).st_size < length:
            log.warning(
                "%s was overwritten, and the checkpoint does not hold its earlier rows. Create Monitor with "
                "override_existing=False before you resume.",
                handler.name,
            )
            return
        has_rows = content is None or file.read(length) == content
    if has_rows:
        handler.truncate(length)  # nothing else, so that a kill loses no rows
        handler.seek(0, os.SEEK_END)
    else:
        handler.seek(0)
        handler.truncate()
        handler.write(content.decode())
        handler.flush()
    with open(handler.name, "rb") as file:
        header, columns = file.readline(), file.readline()
    if header.startswith(b"#") and columns.endswith(b"\n"):
        # The present version may write more columns than the file has.
        names = next(csv.reader([columns.decode().rstrip("\n")]))
        writer.logger = csv.DictWriter(handler, names, extrasaction="ignore")
