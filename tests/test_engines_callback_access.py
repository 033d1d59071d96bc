"""Callbacks: which ones read no actions, and which ones do nothing."""

import inspect
import re
from importlib import import_module

import pytest
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback

from sb3_clipvf.engines.callback_access import _CALLBACKS, is_noop, may_read_actions

KNOWN_LOCALS = {"callback", "dones", "infos", "tb_log_name", "total_timesteps"}


class Own(BaseCallback):
    """A callback of the user's."""

    def _on_step(self) -> bool:
        return True


def test_any_but_known_callbacks_may_read_actions() -> None:
    assert may_read_actions(Own()) and may_read_actions(CallbackList([Own()]))
    assert not may_read_actions(ConvertCallback(None)) and may_read_actions(ConvertCallback(lambda *_: True))


@pytest.mark.parametrize("module", _CALLBACKS)
def test_known_callbacks_read_no_actions(module: str) -> None:
    """If a class reads other local variables in a later version, it must leave the table."""
    for name in _CALLBACKS[module].split():
        cls = getattr(import_module(module), name)
        source = "".join(inspect.getsource(base) for base in cls.__mro__ if base.__module__ != "builtins")
        read = set(re.findall(r"self\.locals(?:\[|\.get\()[\"'](\w+)", source))
        assert read <= KNOWN_LOCALS, name


def test_only_sb3s_wrapper_around_none_is_a_no_op() -> None:
    nothing = ConvertCallback(None)
    assert is_noop(nothing) and is_noop(CallbackList([])) and is_noop(CallbackList([nothing]))
    assert not is_noop(ConvertCallback(lambda *_: True))
    assert not is_noop(CallbackList([nothing, Own()]))
    assert not is_noop(Own())
