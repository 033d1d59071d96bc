"""The layers of vectorised environments, down to an innermost object that need not be a ``VecEnv``."""

import contextlib
from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvWrapper


def vec_env_layers(venv: VecEnv) -> list[VecEnv]:
    """
    Return a ``VecEnv`` and those that it wraps, from the outermost to the innermost one.

    SB3's ``unwrapped`` is no substitute: a ``VecEnvWrapper`` may wrap a simulator, and ``unwrapped`` of a ``VecEnv``
    may be the simulator inside it.
    """
    layers = [venv]
    while isinstance(layers[-1], VecEnvWrapper) and isinstance(layers[-1].venv, VecEnv):
        layers.append(layers[-1].venv)
    return layers


def simulator_of(venv: VecEnv) -> Any:
    """Return the object inside the innermost ``VecEnvWrapper`` if it is not a ``VecEnv``, else None."""
    base = vec_env_layers(venv)[-1]
    return base.venv if isinstance(base, VecEnvWrapper) else None


def stepped_objects(venv: VecEnv) -> list[Any]:
    """Return all objects with episodes of their own: ``VecEnv``, simulators, Gymnasium's environments and wrappers."""
    layers = vec_env_layers(venv)
    found: list[Any] = [*layers, simulator_of(venv)]
    with contextlib.suppress(Exception):  # `unwrapped` may be a property that raises
        found.append(layers[-1].unwrapped)
    known = set(map(id, found))
    for holder in found:  # the loop also visits what it appends
        own = getattr(holder, "__dict__", {})
        several = own.get("envs")
        for item in (own.get("env"), *(several if isinstance(several, list | tuple) else ())):
            if isinstance(item, (gym.Env, VectorEnv)) and id(item) not in known:
                known.add(id(item))
                found.append(item)
    return [item for item in found if item is not None]
