"""
Messages between two processes that take turns: in shared memory while the receiver polls for them, else in a pipe.

A process that has sent a message polls a semaphore for the reply for a while. Then it sleeps until the pipe has a
message. Waking it takes up to 100 us on a virtual machine, and a message in shared memory takes 1 us.
"""

import os
import struct
import time
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any

CAPACITY = 1 << 16
"""Bytes of the longest message in shared memory."""

_LENGTH = struct.Struct("q")
_IN_PIPE = -1  # instead of a length
_ONE_WRITE = 1 << 14  # bytes that Connection writes together with their length
_RESET = b"reset "  # pickled messages begin otherwise


class Channel:
    """
    One end of a pipe, with shared memory for short messages.

    An offer is a semaphore that is 1 while the receiver polls shared memory. If the sender takes it, the message goes
    there. If the receiver takes it, the receiver sleeps, and the message goes to the pipe. A process that dies ends the
    pipe.
    """

    def __init__(self, remote: Connection, incoming: "_Direction", outgoing: "_Direction", spin: float) -> None:
        self.remote = remote
        self._incoming, self._outgoing, self._spin = incoming, outgoing, spin
        self._n_resets = 0
        self._is_cut = False

    def send(self, message: bytes) -> None:
        """Send a message, and offer to receive the reply in shared memory."""
        self._incoming.renew_offer()
        outgoing, length = self._outgoing, len(message)
        if not outgoing.offer.acquire(False):
            self._send_in_pipe(message)
        elif length > CAPACITY:
            _LENGTH.pack_into(outgoing.view, 0, _IN_PIPE)
            outgoing.written.release()
            self._send_in_pipe(message)
        else:
            _LENGTH.pack_into(outgoing.view, 0, length)
            outgoing.view[_LENGTH.size : _LENGTH.size + length] = message
            outgoing.written.release()

    def receive(self) -> bytes:
        """
        Return the next message.

        :raises EOFError: If the other process has ended.
        :raises OSError: Likewise.
        """
        while (message := self._next()).startswith(_RESET):
            self._incoming.renew_offer()
            self.remote.send_bytes(message)
        return message

    def reset(self) -> None:
        """
        Drop messages after an exception has interrupted a turn; the other end answers them first.

        :raises OSError: If the other process has ended, or waits for the rest of a long message.
        """
        if self._is_cut:
            raise OSError("An exception has interrupted a long message to a worker. Close the environments.")
        self._n_resets += 1
        message = _RESET + str(self._n_resets).encode()
        self.remote.send_bytes(message)
        received = b""
        # As bytes, since the exception may have interrupted the reading of a message.
        while not received.endswith(message):
            part = os.read(self.remote.fileno(), CAPACITY)
            if not part:
                raise EOFError
            received = received[-len(message) :] + part
        while self._incoming.written.acquire(False):
            pass

    def _send_in_pipe(self, message: bytes) -> None:
        self._is_cut = len(message) > _ONE_WRITE
        self.remote.send_bytes(message)
        self._is_cut = False

    def _next(self) -> bytes:
        incoming = self._incoming
        deadline = time.perf_counter() + self._spin
        while not incoming.written.acquire(False):
            if time.perf_counter() < deadline:
                continue
            if incoming.offer.acquire(False):
                return self.remote.recv_bytes()
            # The sender has the offer. It writes within a moment, unless it dies or an exception interrupts it.
            if self.remote.poll(0):
                if incoming.written.acquire(False):
                    break
                return self.remote.recv_bytes()
        (length,) = _LENGTH.unpack_from(incoming.view)
        return self.remote.recv_bytes() if length == _IN_PIPE else bytes(incoming.view[_LENGTH.size :][:length])


class _Direction:
    """Semaphores and memory of one direction."""

    def __init__(self, context: Any, offers: int) -> None:
        self.offer, self.written = context.Semaphore(offers), context.Semaphore(0)
        self._memory = context.RawArray("b", _LENGTH.size + CAPACITY)

    def renew_offer(self) -> None:
        """Offer to receive the next message in shared memory."""
        while self.offer.acquire(False):  # an exception has interrupted the last turn
            pass
        self.offer.release()

    @cached_property
    def view(self) -> memoryview:
        """Memory of the length and the bytes of a message."""
        return memoryview(self._memory).cast("B")


def channel_ends(context: Any, spin: float) -> tuple[Channel, Channel]:
    """
    Return both ends of a channel; the first one receives first.

    :param context: Context of ``multiprocessing`` for semaphores and memory.
    :param spin: Seconds for which a receiver polls before it sleeps.
    """
    first, second = context.Pipe()
    directions = _Direction(context, 1), _Direction(context, 0)
    return Channel(first, *directions, spin), Channel(second, *directions[::-1], spin)
