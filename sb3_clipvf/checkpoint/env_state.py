"""The state of one Gymnasium environment with its wrappers: read, described, and put back."""

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.monitor import Monitor

from sb3_clipvf.checkpoint.monitor_files import continue_file, file_state
from sb3_clipvf.checkpoint.mujoco_state import is_mujoco, mujoco_state, set_mujoco_state
from sb3_clipvf.checkpoint.random_state import generator_from, generator_state, set_space_states, space_states
from sb3_clipvf.checkpoint.state_attributes import (
    ENVIRONMENTS,
    STATELESS_MODULES,
    WRAPPERS,
    read_attributes,
    write_attributes,
)
from sb3_clipvf.files.allowlist import full_name
from sb3_clipvf.files.codec import frozen

_SPACES = ("action_space", "observation_space")
_MONITOR = full_name(Monitor)
# The Zoo puts its own in the place of Gymnasium's; the two give SB3 the same.
_SAME = {"PatchedTimeLimit": "TimeLimit"}
# They have no state, and checkpoints do not mind whether they are there.
_OURS = ("sb3_clipvf.checkpoint.resumable.ResumableEnv", "sb3_clipvf.envs.episode_ends.EpisodeEnds")


def environment_state(env: gym.Env[Any, Any]) -> dict[str, Any]:
    """
    Read the state of an environment and of all its wrappers.

    A class may give its own by ``get_training_state()``, and take it by ``set_training_state(state)``; where it is
    neither known nor does so, the state is incomplete, and ``unknown`` says which classes are to blame.

    :param env: The outermost wrapper.
    :return: A tree.
    """
    layers, unknown = [], []
    for layer in _layers(env):
        state, reason = _layer_state(layer)
        layers.append(state)
        if reason is not None:
            unknown.append(reason)
    core = _core(env)
    return {
        "layers": layers,
        "generator": generator_state(core._np_random) if _has_generator(core) else None,
        "seed": core._np_random_seed,
        "spaces": {name: space_states(getattr(core, name)) for name in _SPACES},
        "unknown": unknown,
    }


def restore_environment(env: gym.Env[Any, Any], state: dict[str, Any]) -> None:
    """
    Put an environment and all its wrappers into a state.

    :param env: Built as the one that was read, and reset once.
    :param state: From :func:`environment_state`.
    """
    core = _core(env)
    if _has_generator(core):
        core._np_random = generator_from(state["generator"])
    core._np_random_seed = state["seed"]
    for name in _SPACES:
        set_space_states(getattr(core, name), state["spaces"][name])
    layers = list(_without_ours(env))
    kept = [layer for layer in state["layers"] if layer["class"] not in _OURS]
    # From the inside out: a wrapper's own method may read the environment.
    for layer, own in reversed(list(zip(layers, kept, strict=True))):
        write_attributes(layer, own["attributes"])
        continue_file(vars(layer).get("results_writer"), own["file"])
        if state["unknown"] and own["class"] == _MONITOR:
            layer.needs_reset = True  # as it will be: a Monitor may refuse to be reset in an episode
        if own["mujoco"] is not None:
            set_mujoco_state(layer, own["mujoco"])
        if own["given"] is not None:
            layer.set_training_state(own["given"]["state"])


def describe(env: gym.Env[Any, Any]) -> list[str]:
    """
    Name an environment and its wrappers.

    :param env: The outermost wrapper.
    :return: Classes, from the outermost wrapper to the environment, and the environment's id where it has one.
    """
    # Without modules: a script that resumes may have another name than the one that trained.
    names = [_SAME.get(type(layer).__qualname__, type(layer).__qualname__) for layer in _without_ours(env)]
    spec = _core(env).spec
    return [*names, spec.id] if isinstance(spec, EnvSpec) else names


def _without_ours(env: gym.Env[Any, Any]) -> Iterator[gym.Env[Any, Any]]:
    return (layer for layer in _layers(env) if full_name(type(layer)) not in _OURS)


def _layers(env: gym.Env[Any, Any]) -> Iterator[gym.Env[Any, Any]]:
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env
    yield env


def _core(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """Return the innermost environment, whose ``unwrapped`` may be a simulator."""
    return list(_layers(env))[-1]


def _has_generator(core: gym.Env[Any, Any]) -> bool:
    """Return whether an environment's own generator is Gymnasium's, made already or not."""
    return core._np_random is None or isinstance(core._np_random, np.random.Generator)


def _layer_state(layer: gym.Env[Any, Any]) -> tuple[dict[str, Any], str | None]:
    name = full_name(type(layer))
    table = WRAPPERS if isinstance(layer, gym.Wrapper) else ENVIRONMENTS
    state: dict[str, Any] = {"class": name, "attributes": {}, "file": None, "mujoco": None, "given": None}
    reason = None
    if gives_state(layer):
        state["given"], reason = given_state(layer)
    elif is_mujoco(layer):
        state["mujoco"] = mujoco_state(layer)
    elif name in table:
        state["attributes"] = frozen(read_attributes(layer, table[name]), name)
        state["file"] = file_state(vars(layer).get("results_writer"))
    elif type(layer).__module__ not in STATELESS_MODULES:
        reason = name
    return state, reason


def gives_state(layer: Any) -> bool:
    """
    Tell whether a class gives its state itself.

    :param layer: An environment or a wrapper.
    :return: Whether it has both methods, and not only what it wraps.
    """
    methods = ("get_training_state", "set_training_state")
    return all(callable(getattr(type(layer), method, None)) for method in methods)


def given_state(layer: Any) -> tuple[dict[str, Any] | None, str | None]:
    """
    Ask a class for its state.

    :param layer: One that :func:`gives_state`.
    :return: The state, in a dict; or None, and what is wrong with it.
    """
    name = full_name(type(layer))
    try:
        return {"state": frozen(layer.get_training_state(), f"{name}.get_training_state()")}, None
    except TypeError as error:
        return None, f"{name} ({error})"
