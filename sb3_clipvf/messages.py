"""What the package tells its user: the logger ``sb3_clipvf``, shown on standard output by ``verbose=1``."""

import logging
import sys
from typing import TextIO

log = logging.getLogger("sb3_clipvf")


class _StdoutHandler(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stdout`` is at that moment, which notebooks and test runners replace."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    @stream.setter
    def stream(self, value: TextIO) -> None:
        raise AttributeError("the stream follows sys.stdout")


def show_messages(verbose: int) -> None:
    """
    Let messages through to standard output, unless the user configured the logger.

    :param verbose: SB3's verbosity: 0 leaves the logger alone, 1 shows INFO, 2 shows DEBUG.
    """
    if verbose <= 0 or any(not isinstance(handler, _StdoutHandler) for handler in log.handlers):
        return
    if not log.handlers:
        log.addHandler(_StdoutHandler())
        log.propagate = False
    log.setLevel(logging.DEBUG if verbose > 1 else logging.INFO)
