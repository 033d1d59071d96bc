"""Signals that end a training: a last checkpoint is saved, then the process ends with the signal's exit code."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class SignalWatch:
    """
    Call ``save`` at the first SIGTERM or SIGINT, then end the process with exit code 143 or 130 (128 + number).

    A second signal ends the process as it would have without the watch.
    """

    def __init__(self, model: Any, save: Callable[[str], None]) -> None:
        self._model = model
        self._save = save
        self._process = os.getpid()
        self._handlers_before: dict[int, Any] = {}

    def start(self) -> bool:
        """Install the handlers, if this is the main thread and signals are not ignored. Return whether any is."""
        if threading.current_thread() is not threading.main_thread():
            return False
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._handlers_before[number] = signal.signal(number, self._handle)
        return bool(self._handlers_before)

    def stop(self) -> None:
        """Put the earlier handlers back, unless these have been replaced."""
        for number, handler in list(self._handlers_before.items()):
            # Another watch may have installed its handler over this one, and will put this one back.
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
                del self._handlers_before[number]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.stop()
        # Forked processes of environments inherit the handlers, and an error may have ended the training.
        if os.getpid() != self._process or not is_learning(self._model, frame):
            signal.raise_signal(number)
            return
        self._save(signal.Signals(number).name)
        raise SystemExit(128 + number)


def is_learning(model: Any, frame: FrameType | None) -> bool:
    """Return whether a call of the model's ``learn`` is running in a stack frame or above it."""
    while frame is not None:
        if frame.f_code is OnPolicyAlgorithm.learn.__code__ and frame.f_locals.get("self") is model:
            return True
        frame = frame.f_back
    return False
