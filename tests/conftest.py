"""What all test files share: one torch thread, and the package's logger as every test found it."""

import logging
from collections.abc import Iterator

import pytest
import torch as th

# Several threads would fight for the cores of a test run, and float sums would depend on how many there are.
th.set_num_threads(1)


@pytest.fixture(autouse=True)
def untouched_logger() -> Iterator[None]:
    """`verbose=1` configures the package's logger for the whole process; undo that after each test."""
    log = logging.getLogger("sb3_clipvf")
    handlers, level, propagate = list(log.handlers), log.level, log.propagate
    yield
    log.handlers[:] = handlers
    log.setLevel(level)
    log.propagate = propagate
