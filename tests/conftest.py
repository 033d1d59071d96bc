"""What all test files share: one torch thread, Ctrl-C as Python has it, and the package's logger as it was found."""

import logging
import signal
from collections.abc import Iterator

import pytest
import torch as th

# Several threads would fight for the cores of a test run, and float sums would depend on how many there are.
th.set_num_threads(1)

# A shell starts what it runs in the background with SIGINT ignored, and Python then leaves it so: tests that interrupt
# a benchmark would wait for it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def untouched_logger() -> Iterator[None]:
    """`verbose=1` configures the package's logger for the whole process; undo that after each test."""
    log = logging.getLogger("sb3_clipvf")
    handlers, level, propagate = list(log.handlers), log.level, log.propagate
    yield
    log.handlers[:] = handlers
    log.setLevel(level)
    log.propagate = propagate
