"""Functions that fail at a given call, as on a kill or a full disk."""

from collections.abc import Callable
from typing import Any


class Killed(BaseException):
    """Stands for a kill: nothing in the package handles it."""


def fail_at(call: int, function: Callable[..., Any], error: BaseException, after: bool) -> Callable[..., Any]:
    """``function``, but its call number ``call`` (from 0) raises ``error``, before or after it did its work."""
    count = -1

    def wrapper(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == call and not after:
            raise error
        result = function(*args)
        if count == call:
            raise error
        return result

    return wrapper
