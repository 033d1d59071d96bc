"""
pytest plugin: puts ClipPPO where ``stable_baselines3.PPO`` was, before any test module imports it.

It also holds the tests of ``exceptions.toml`` to their word: each must fail with the error that is written there. One
that passes, fails otherwise, or does not exist makes the run fail, so that the list cannot outlive its reasons.
"""

import functools
import sys
import tomllib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import stable_baselines3
import stable_baselines3.ppo.ppo

from sb3_clipvf import ClipPPO
from sb3_clipvf.files.trust import TRUST_VARIABLE

EXCEPTIONS = Path(__file__).with_name("exceptions.toml")
HOST_PPO = stable_baselines3.PPO


def replace_ppo() -> None:
    """Rebind PPO in every loaded module of the host; a module loaded later finds ClipPPO in these."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "stable_baselines3":
            continue
        for attribute, value in list(vars(module).items()):
            if value is HOST_PPO:
                setattr(module, attribute, ClipPPO)


replace_ppo()


@functools.cache
def load_exceptions() -> dict[str, dict[str, str]]:
    """
    Read the list of tests that ClipPPO is meant to fail.

    :return: By the test's name, such as ``test_run.py::test_ppo_warnings``: reason, error and message.
    """
    entries = tomllib.loads(EXCEPTIONS.read_text()).get("exception", [])
    return {entry["test"]: entry for entry in entries}


@functools.cache
def load_trusted() -> frozenset[str]:
    """
    Read the list of tests whose files are trusted.

    :return: Their names.
    """
    return frozenset(tomllib.loads(EXCEPTIONS.read_text())["trusted"]["tests"])


def host_name(item: pytest.Item) -> str:
    """
    Name a test as ``exceptions.toml`` does.

    :param item: The collected test.
    :return: Its file's name, and its own with the parameters.
    """
    return f"{item.path.name}::{item.name}"


@pytest.hookimpl(tryfirst=True)  # Before -k takes tests away.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a run that would not test ClipPPO, or whose list names tests that are not there."""
    for module in {item.getparent(pytest.Module).obj for item in items}:  # type: ignore[union-attr]
        if any(value is HOST_PPO for value in vars(module).values()):
            raise pytest.UsageError(f"{module.__name__} still holds SB3's own PPO: ppo_is_clipppo was loaded too late.")
    files = {item.path.name for item in items}
    names = {host_name(item) for item in items}
    listed = {*load_exceptions(), *load_trusted()}
    unknown = sorted(name for name in listed if name.partition("::")[0] in files and name not in names)
    if unknown:
        raise pytest.UsageError(f"{EXCEPTIONS.name} names tests that this SB3 does not have: {', '.join(unknown)}.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Trust the files of the tests that are listed for it."""
    with pytest.MonkeyPatch.context() as patch:
        if host_name(item) in load_trusted():
            patch.setenv(TRUST_VARIABLE, "1")
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn the failure that an exception foretells into an expected one, and its absence into a failure."""
    report = yield
    exception = load_exceptions().get(host_name(item))
    if exception is None or call.when != "call":
        return report
    if call.excinfo is None:
        report.outcome = "failed"
        report.longrepr = f"{host_name(item)} passes: take it out of {EXCEPTIONS.name}."
    elif call.excinfo.typename == exception["error"] and exception["message"] in str(call.excinfo.value):
        report.outcome = "skipped"  # With `wasxfail`, pytest counts it as an expected failure.
        report.wasxfail = exception["reason"]
    elif report.failed:
        expected = f"{exception['error']} with {exception['message']!r}"
        report.sections.append(("not the error that exceptions.toml names", f"It should be {expected}."))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what passed, what was skipped, and each exception with its reason."""
    stats = terminalreporter.stats
    write = terminalreporter.write_line
    terminalreporter.section(f"ClipPPO in PPO's place, SB3 {stable_baselines3.__version__}")
    for report in stats.get("xfailed", []):
        write(f"exception  {Path(report.nodeid).name}: {report.wasxfail}")
    counts = {"passed": "passed", "skipped": "skipped", "xfailed": "exceptions", "failed": "failed", "error": "errors"}
    write(", ".join(f"{len(stats.get(key, []))} {word}" for key, word in counts.items()))
