"""Checks at the door: each says which argument broke which rule, with which value, and what to do."""

import math
import numbers
from typing import Any

from gymnasium import spaces

ACTION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def check_int(name: str, value: Any, minimum: int, way_out: str) -> int:
    """
    Check a whole number.

    :param name: The argument's name.
    :param value: What the user passed; floats with a whole value, such as 1e6, count as whole numbers.
    :param minimum: Smallest legal value.
    :param way_out: What to do instead, a sentence.
    :return: The value as an int.
    :raises TypeError: If it is no number.
    :raises ValueError: If it is not whole or below ``minimum``.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a whole number, got {value!r} of type {type(value).__name__}. {way_out}")
    number = float(value)
    if not number.is_integer() or number < minimum:
        raise ValueError(f"`{name}` must be a whole number of at least {minimum}, got {value!r}. {way_out}")
    return int(number)


def check_float(
    name: str, value: Any, way_out: str, low: float = 0.0, high: float = math.inf, *, above_low: bool = False
) -> float:
    """
    Check a finite number.

    :param name: The argument's name.
    :param value: What the user passed.
    :param way_out: What to do instead, a sentence.
    :param low: Smallest legal value.
    :param high: Largest legal value.
    :param above_low: Whether ``low`` itself is refused.
    :return: The value as a float.
    :raises TypeError: If it is no number.
    :raises ValueError: If it is not finite or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, got {value!r} of type {type(value).__name__}. {way_out}")
    number = float(value)
    too_low = number <= low if above_low else number < low
    if not math.isfinite(number) or too_low or number > high:
        if high == math.inf:
            rule = f"finite and {'above' if above_low else 'at least'} {low:g}"
        else:
            rule = f"in {'(' if above_low else '['}{low:g}, {high:g}]"
        raise ValueError(f"`{name}` must be {rule}, got {value!r}. {way_out}")
    return number


def check_choice(name: str, value: Any, choices: tuple[str, ...], way_out: str) -> None:
    """
    Check one of several words.

    :param name: The argument's name.
    :param value: What the user passed.
    :param choices: The legal ones.
    :param way_out: What to do instead, a sentence.
    :raises ValueError: If it is none of them.
    """
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}. {way_out}")


def check_bool(name: str, value: Any) -> None:
    """
    Check a truth value.

    :param name: The argument's name.
    :param value: What the user passed.
    :raises TypeError: If it is neither True nor False.
    """
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r} of type {type(value).__name__}. Pass a bool.")


def check_spaces(
    policy: Any, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], use_sde: bool
) -> None:
    """
    Check that the algorithm can act in an environment.

    :param policy: Policy class or alias.
    :param observation_space: Of the environment.
    :param action_space: Of the environment.
    :param use_sde: Whether gSDE is asked for.
    :raises ValueError: If it cannot.
    """
    if not isinstance(action_space, ACTION_SPACES):
        legal = ", ".join(space.__name__ for space in ACTION_SPACES)
        raise ValueError(
            f"`env` must have an action space of type {legal}, got {action_space}. Wrap the environment to convert it."
        )
    if isinstance(action_space, spaces.Box) and not action_space.is_bounded("both"):
        raise ValueError(
            f"`env` must have an action space with finite bounds, got {action_space}. "
            "Wrap it, for example in gymnasium.wrappers.RescaleAction."
        )
    if isinstance(action_space, spaces.MultiBinary) and not isinstance(action_space.n, int):
        raise ValueError(
            f"`env` must have a MultiBinary action space of one dimension, got {action_space}. Flatten it by a wrapper."
        )
    if use_sde and not isinstance(action_space, spaces.Box):
        raise ValueError(
            f"`use_sde` must be False unless actions are continuous, got True and {action_space}. Drop it."
        )
    names = {"MlpPolicy", "CnnPolicy", "SquashedMlpPolicy", "SquashedCnnPolicy"}
    if isinstance(policy, str) and policy in names and isinstance(observation_space, spaces.Dict):
        multi_input = "SquashedMultiInputPolicy" if policy.startswith("Squashed") else "MultiInputPolicy"
        raise ValueError(
            f"`policy` must take dict observations, got {policy!r}. You must use `{multi_input}` when working with "
            "dict observation space."
        )
