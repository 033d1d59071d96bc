"""Monitor's files go on where the checkpoint was taken: later rows are taken back, lost ones are put back."""

import os
from typing import Any

from stable_baselines3.common.monitor import ResultsWriter

from sb3_clipvf.common.messages import log

LARGEST_FILE = 2**24
"""Bytes, 16 MiB: of a longer file a checkpoint keeps the length alone."""

_PATH, _LENGTH, _CONTENT = "monitor_path", "monitor_length", "monitor_content"


def file_state(writer: ResultsWriter | None) -> dict[str, Any] | None:
    """
    Remember how far a file was written.

    :param writer: Of ``Monitor``, ``VecMonitor`` or an adapter; None where there is no file.
    :return: Where it is, and its length in bytes.
    """
    if writer is None or writer.file_handler.closed:
        return None
    writer.file_handler.flush()
    return {_PATH: writer.file_handler.name, _LENGTH: os.fstat(writer.file_handler.fileno()).st_size}


def with_contents(tree: Any) -> Any:
    """
    Put the rows into a state: they are only read once a checkpoint is written, since files only grow.

    :param tree: With what :func:`file_state` gave somewhere in it.
    :return: A tree with the files' content in the place of their paths.
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
                log.warning("The checkpoint goes without the rows of %s: %s", tree[_PATH], error)
        return {_LENGTH: tree[_LENGTH], _CONTENT: content}
    if type(tree) is list and tree and isinstance(tree[0], dict):
        return [with_contents(item) for item in tree]
    return tree


def continue_file(writer: ResultsWriter | None, state: dict[str, Any] | None) -> None:
    """
    Let a file go on where it was; a warning says where rows are missing.

    :param writer: As it was opened anew, with the old content or without.
    :param state: From :func:`with_contents`.
    """
    if writer is None or state is None:
        return
    handler = writer.file_handler
    handler.flush()
    content = state[_CONTENT]
    if content is None:
        with open(handler.name, "rb") as file:
            content = file.read(state[_LENGTH])
        if len(content) < state[_LENGTH]:
            log.warning(
                "%s was begun anew, and the checkpoint does not hold its earlier rows. Make Monitor with "
                "override_existing=False before you resume.",
                handler.name,
            )
            return
    handler.seek(0)
    handler.truncate()
    handler.write(content.decode())
    handler.flush()
