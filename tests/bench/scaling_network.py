"""Two network namespaces of Linux, connected by a relay that delays each packet: they stand for two machines."""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Self

_NAMES = ("clipvf-a", "clipvf-b")
_ADDRESSES = ("10.77.0.1", "10.77.0.2")
_PORT = 29577
_DEVICE = "/dev/net/tun"
# From linux/if_tun.h: the request that names an interface; packets of IP without a header of their own
_TUNSETIFF, _IFF_TUN_NO_PI = 0x400454CA, 0x1001
_MAX_PACKET = 65_000


def why_no_namespaces() -> str | None:
    """Return why this machine cannot connect two namespaces, or None."""
    if shutil.which("ip") is None:
        return "needs ip: install iproute2"
    if os.geteuid() != 0 or not os.path.exists(_DEVICE):
        return f"needs {_DEVICE} and the rights of root, for network namespaces"
    return None


class Network:
    """
    Two namespaces that exist within the context.

    :param delay: seconds that each packet takes, in each direction
    """

    interface = "clipvf"

    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._ends: list[int] = []
        self._stop = threading.Event()
        self._relay = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        try:
            for name, address in zip(_NAMES, _ADDRESSES, strict=True):
                _ip("netns", "add", name)
                self._ends.append(self._connect(name, address))
        except BaseException:
            self._remove()
            raise
        self._relay.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._relay.join()
        self._remove()

    def commands(self, launcher: Sequence[str], program: Sequence[str]) -> list[list[str]]:
        """Return a command of ``torchrun`` for each namespace, which start one process each."""
        first = (f"--master-addr={_ADDRESSES[0]}", f"--master-port={_PORT}")
        return [
            ["ip", "netns", "exec", name, *launcher, "--nnodes=2", f"--node-rank={rank}", *first, *program]
            for rank, name in enumerate(_NAMES)
        ]

    def _connect(self, name: str, address: str) -> int:
        """Give a namespace an interface with an address, and return the file of its packets."""
        end = os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", self.interface.encode(), _IFF_TUN_NO_PI))
        _ip("link", "set", self.interface, "netns", name)
        _ip("-n", name, "address", "add", f"{address}/24", "dev", self.interface)
        _ip("-n", name, "link", "set", self.interface, "mtu", str(_MAX_PACKET), "up")
        _ip("-n", name, "link", "set", "lo", "up")
        return end

    def _run(self) -> None:
        """Pass packets on when they are due, in the order in which they were sent."""
        other = dict(zip(self._ends, reversed(self._ends), strict=True))
        waiting: deque[tuple[float, int, bytes]] = deque()
        while not self._stop.is_set():
            seconds = max(waiting[0][0] - time.perf_counter(), 0.0) if waiting else 0.1
            readable, _, _ = select.select(self._ends, [], [], seconds)
            for end in readable:
                waiting.append((time.perf_counter() + self._delay, other[end], os.read(end, _MAX_PACKET)))
            while waiting and waiting[0][0] <= time.perf_counter():
                _, end, packet = waiting.popleft()
                os.write(end, packet)

    def _remove(self) -> None:
        for end in self._ends:
            os.close(end)
        for name in _NAMES:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)


def _ip(*arguments: str) -> None:
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise OSError(f"`ip {' '.join(arguments)}` failed: {error.stderr.strip()}") from error
