"""Shared by all test files: the state of the process, and fixtures that several files use."""

import logging
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch as th

# Several threads would compete for the cores of a test run, and float sums would depend on their number.
th.set_num_threads(1)

# A shell starts background processes with SIGINT ignored, and Python keeps that. Tests that interrupt a benchmark would
# then wait forever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Settings of the user's shell must not change what is tested.
for variable in [name for name in os.environ if name.startswith("SB3_CLIPVF_")]:
    del os.environ[variable]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the slow tests: a worker that began one last would run it while the others have nothing left to do."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def untouched_logger() -> Iterator[None]:
    """Restore the package's logger after each test: `verbose=1` configures it for the whole process."""
    log = logging.getLogger("sb3_clipvf")
    handlers, level, propagate = list(log.handlers), log.level, log.propagate
    yield
    log.handlers[:] = handlers
    log.setLevel(level)
    log.propagate = propagate


@pytest.fixture
def validation_as_before() -> Iterator[None]:
    """Restore the checks of torch's distributions, which torch.compile() turns off for the whole process."""
    before = th.distributions.Distribution._validate_args
    yield
    th.distributions.Distribution.set_default_validate_args(before)


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def in_trained(trained: Path, in_empty_folder: Path) -> Path:
    """A working folder with a copy of what the test file's fixture ``trained`` wrote."""
    shutil.copytree(trained, in_empty_folder, dirs_exist_ok=True)
    return in_empty_folder


@pytest.fixture
def model_path(saved: Path, tmp_path: Path) -> Path:
    """A copy of the model that the test file's fixture ``saved`` wrote."""
    return Path(shutil.copy(saved, tmp_path / "model.zip"))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Path of a file that a hostile file would write."""
    return tmp_path / "mark"
