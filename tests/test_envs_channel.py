"""A channel brings each message once, whether the receiver looks at shared memory or sleeps in the pipe."""

import multiprocessing
import os
import threading
import time
from typing import Any

import pytest

from sb3_clipvf.envs.channel import CAPACITY, Channel, channel_ends

CONTEXT: Any = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
MESSAGES = [b"a", b"", bytes(range(256)), b"x" * CAPACITY, b"y" * (CAPACITY + 1), b"z" * (20 * CAPACITY)]


def echo(channel: Channel) -> None:
    """Send each message back."""
    channel.send(b"ready")
    while (message := channel.receive()) != b"end":
        channel.send(message)


@pytest.mark.parametrize("spin", [0.0, 5e-4, 30.0])
@pytest.mark.parametrize("pause", [0.0, 2e-3])
def test_messages_arrive_in_turn(spin: float, pause: float) -> None:
    here, there = channel_ends(CONTEXT, spin)
    process = CONTEXT.Process(target=echo, args=(there,), daemon=True)
    process.start()
    assert here.receive() == b"ready"
    for message in MESSAGES * 3:
        time.sleep(pause)
        here.send(message)
        time.sleep(pause)
        assert here.receive() == message
    here.send(b"end")
    process.join(10)
    assert process.exitcode == 0


def test_a_receiver_that_looks_needs_no_pipe() -> None:
    here, there = channel_ends(CONTEXT, 1.0)
    there.send(b"ready")
    assert here.receive() == b"ready"
    for turn in range(3):
        here.send(b"%d" % turn)
        assert there.receive() == b"%d" % turn
        there.send(b"-%d" % turn)
        assert not here.remote.poll(0)
        assert here.receive() == b"-%d" % turn


def test_a_receiver_that_sleeps_is_woken() -> None:
    here, there = channel_ends(CONTEXT, 0.0)
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(here.receive()))
    thread.start()
    time.sleep(0.01)
    there.send(b"late")
    thread.join(10)
    assert found == [b"late"]


def forget_offer(here: Channel) -> None:
    here._incoming.offer.acquire(False)


def take_offer(here: Channel) -> None:
    """Do what a sender does until an exception interrupts it."""
    here._incoming.renew_offer()
    here._outgoing.offer.acquire(False)


def read_a_length(here: Channel) -> None:
    """Do what a receiver does until an exception interrupts it between the length of a message and its text."""
    here.send(b"\xff" * (CAPACITY + 1))
    here.remote._recv(4)  # type: ignore[attr-defined]


@pytest.mark.parametrize("spin", [0.0, 5e-3])
@pytest.mark.parametrize(
    "interrupted",
    [lambda here: None, forget_offer, take_offer, lambda here: here.send(b"lost"), read_a_length],
)
@pytest.mark.parametrize("pause", [0.0, 5e-3])
def test_a_reset_ends_an_interrupted_turn(spin: float, interrupted: Any, pause: float) -> None:
    here, there = channel_ends(CONTEXT, spin)
    process = CONTEXT.Process(target=echo, args=(there,), daemon=True)
    process.start()
    here.receive()
    for message in MESSAGES * 2:
        interrupted(here)
        time.sleep(pause)
        here.reset()
        for text in (message, b"next"):
            here.send(text)
            assert here.receive() == text
    here.send(b"end")
    process.join(10)
    assert process.exitcode == 0


@pytest.mark.parametrize("spin", [0.0, 5.0])
def test_a_reset_after_half_a_message_is_refused(spin: float, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = channel_ends(CONTEXT, spin)
    process = CONTEXT.Process(target=echo, args=(there,), daemon=True)
    process.start()
    here.receive()
    send = here.remote._send  # type: ignore[attr-defined]

    def interrupted(part: bytes) -> None:
        send(part)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(here.remote, "_send", interrupted)
        here.send(b"x" * (CAPACITY + 1))
    with pytest.raises(OSError, match="has interrupted a long message to a worker"):
        here.reset()
    process.kill()
    process.join()


@pytest.mark.parametrize("takes_offer", [False, True])
def test_the_end_of_the_other_process_is_seen(takes_offer: bool) -> None:
    here, there = channel_ends(CONTEXT, 1e-3)
    if takes_offer:  # it ends between the offer and its message
        assert there._outgoing.offer.acquire(False)
    there.remote.close()
    with pytest.raises(EOFError):
        here.receive()
