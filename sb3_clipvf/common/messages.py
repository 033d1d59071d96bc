"""What the package tells its user: the logger ``sb3_clipvf``, shown on standard output by ``verbose=1``."""

import logging
import sys
from typing import TextIO

log = logging.getLogger("sb3_clipvf")


class _StdoutHandler(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stdout`` is at that moment, which notebooks and test runners replace."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.propagated_before = log.propagate
        self.level_set = logging.NOTSET

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    @stream.setter
    def stream(self, value: TextIO) -> None:
        raise AttributeError("the stream follows sys.stdout")


def show_messages(verbose: int) -> None:
    """
    Show messages on standard output as one model wants it, until another model calls this.

    Where the user has added a handler to the logger or set its level, it is left alone.

    :param verbose: SB3's verbosity: 0 shows none, 1 shows INFO, 2 shows DEBUG.
    """
    if any(not isinstance(handler, _StdoutHandler) for handler in log.handlers):
        return
    handler = next((handler for handler in log.handlers if isinstance(handler, _StdoutHandler)), None)
    if verbose <= 0:
        if handler is not None:
            log.removeHandler(handler)
            log.propagate = handler.propagated_before
            _set_level(handler, logging.NOTSET)
        return
    if handler is None:
        handler = _StdoutHandler()
        log.addHandler(handler)
        log.propagate = False
    _set_level(handler, logging.DEBUG if verbose > 1 else logging.INFO)


def _set_level(handler: _StdoutHandler, level: int) -> None:
    if log.level == handler.level_set:  # else the user has set it
        log.setLevel(level)
        handler.level_set = level
