"""Handlers of SIGTERM and SIGINT: they save a last checkpoint, then end the process with the signal's exit code."""

import contextlib
import inspect
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class SignalWatch:
    """
    Call ``save`` at the first SIGTERM or SIGINT, then end the process with exit code 143 or 130 (128 + number).

    A second signal has the effect that it has without these handlers. If there are several watches, all save.
    """

    def __init__(self, model: Any, save: Callable[[str], None]) -> None:
        self._model = model
        self._save = save
        self._pid = os.getpid()
        self._handlers_before: dict[int, Any] = {}
        self._is_deferring = False
        self._deferred: int | None = None

    def start(self) -> bool:
        """Install the handlers, if this is the main thread and signals are not ignored. Return whether any was."""
        if threading.current_thread() is not threading.main_thread():
            return False
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._handlers_before[number] = signal.signal(number, self._handle)
        return bool(self._handlers_before)

    def stop(self) -> None:
        """Restore the earlier handlers, unless others have replaced these."""
        for number, handler in list(self._handlers_before.items()):
            # Another watch may have replaced this handler, and will restore it.
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
                del self._handlers_before[number]

    @contextlib.contextmanager
    def deferring(self) -> Iterator[None]:
        """Handle a signal that arrives in this context at its end, unless a second one ends the context."""
        self._is_deferring, is_ended = True, False
        try:
            yield
        except BaseException as error:
            is_ended = not isinstance(error, Exception)
            raise
        finally:
            self._is_deferring = False
            number, self._deferred = self._deferred, None
            if number is not None and not is_ended:
                self._handle(number, inspect.currentframe())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.stop()
        if self._is_deferring and os.getpid() == self._pid:
            self._deferred = number
            return
        # Forked processes of environments inherit the handlers, and an error may have ended the run.
        if os.getpid() != self._pid or not is_learning(self._model, frame):
            signal.raise_signal(number)
            return
        self._save(signal.Signals(number).name)
        below = getattr(signal.getsignal(number), "__self__", None)
        if isinstance(below, SignalWatch) and is_learning(below._model, frame):
            # The handler that this one replaced is that of another callback, with a copy of its own. It ends the
            # process, now or after its write.
            below._handle(number, frame)
            return
        raise SystemExit(128 + number)


def is_learning(model: Any, frame: FrameType | None) -> bool:
    """Return whether a call of the model's ``learn`` is running in a stack frame or above it."""
    while frame is not None:
        if frame.f_code is OnPolicyAlgorithm.learn.__code__ and frame.f_locals.get("self") is model:
            return True
        frame = frame.f_back
    return False
