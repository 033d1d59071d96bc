"""Threads of an update: the second one, also after a fork."""

import subprocess
import sys

from sb3_clipvf.engines.threads import second_thread

_FORKS = """
import os, threading
from sb3_clipvf.engines.threads import second_thread
second_thread().submit(threading.get_ident).result()
child = os.fork()
if child == 0:
    found = second_thread().submit(threading.get_ident).result(timeout=20)
    os._exit(0 if found != threading.get_ident() else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_it_is_the_same_thread_each_time() -> None:
    assert second_thread() is second_thread()


def test_a_forked_process_has_its_own() -> None:
    """Its parent's thread does not exist there: waiting for it would not end."""
    assert subprocess.run([sys.executable, "-c", _FORKS], timeout=120, check=False).returncode == 0
