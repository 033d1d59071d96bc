"""The logger ``sb3_clipvf``, whose messages ``verbose=1`` shows on standard output."""

import logging
import sys
from typing import TextIO

log = logging.getLogger("sb3_clipvf")


class _StdoutHandler(logging.StreamHandler[TextIO]):
    """Handler that writes to the current ``sys.stdout``, which notebooks and test runners replace."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.level_set = logging.NOTSET

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout

    def filter(self, record: logging.LogRecord) -> bool:
        """Skip what a handler of a parent logger, such as that of ``logging.basicConfig``, shows on the console."""
        return not _is_shown_by_parents(record) and bool(super().filter(record))


def _is_shown_by_parents(record: logging.LogRecord) -> bool:
    logger = log
    while logger.propagate and logger.parent is not None:
        logger = logger.parent
        for handler in logger.handlers:
            stream = getattr(handler, "stream", None) or record  # None for files that are not open
            is_console = stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
            if is_console and record.levelno >= handler.level:
                return True
    return False


def show_messages(verbose: int) -> None:
    """
    Set which messages are shown, by a model's ``verbose``: 0 for none, 1 for INFO, 2 for DEBUG.

    The logger has one setting, that of the latest call. A handler or a level that the user has set is kept.
    """
    ours = [handler for handler in log.handlers if isinstance(handler, _StdoutHandler)]
    if len(ours) < len(log.handlers):
        return
    handler = ours[0] if ours else None
    if verbose <= 0:
        if handler is not None:
            log.removeHandler(handler)
            _set_level(handler, logging.NOTSET)
        return
    if handler is None:
        handler = _StdoutHandler()
        log.addHandler(handler)
    _set_level(handler, logging.DEBUG if verbose > 1 else logging.INFO)


def _set_level(handler: _StdoutHandler, level: int) -> None:
    if log.level == handler.level_set:  # else the user has set it
        log.setLevel(level)
        handler.level_set = level
