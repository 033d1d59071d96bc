"""Signals that end a training: what is to be saved is saved, then the process ends with the signal's exit code."""

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
    Save at the first SIGTERM or SIGINT, and end the process with the exit code 128 + its number: 143 and 130.

    A second one ends the process as it would have without this.

    :param model: Whose training is watched.
    :param save: Called with the signal's name.
    """

    def __init__(self, model: Any, save: Callable[[str], None]) -> None:
        self._model = model
        self._save = save
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def start(self) -> bool:
        """
        Install the handlers. A signal that the process ignores stays ignored.

        :return: False where there is nothing to watch: outside of the main thread Python allows no handlers.
        """
        if threading.current_thread() is not threading.main_thread():
            return False
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._handle)
        return bool(self._before)

    def stop(self) -> None:
        """Put the earlier handlers back, where nobody has replaced these."""
        for number, handler in list(self._before.items()):
            # Another watch may have put its handler on top, and will come back to this one.
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
                del self._before[number]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.stop()
        # An environment's process that was forked has these handlers, too; and an error may have ended the training.
        if os.getpid() != self._process or not is_learning(self._model, frame):
            signal.raise_signal(number)
            return
        self._save(signal.Signals(number).name)
        raise SystemExit(128 + number)


def is_learning(model: Any, frame: FrameType | None) -> bool:
    """
    Tell whether a call of ``learn`` is on its way.

    :param model: Whose.
    :param frame: Where the interpreter is.
    :return: False before, after, and where an error has ended the call.
    """
    while frame is not None:
        if frame.f_code is OnPolicyAlgorithm.learn.__code__ and frame.f_locals.get("self") is model:
            return True
        frame = frame.f_back
    return False
