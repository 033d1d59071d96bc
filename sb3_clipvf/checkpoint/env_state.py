"""The state of one Gymnasium environment with its wrappers."""

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.monitor import Monitor

from sb3_clipvf.checkpoint.monitor_files import file_state, restore_file
from sb3_clipvf.checkpoint.mujoco_state import is_mujoco, mujoco_state, set_mujoco_state
from sb3_clipvf.checkpoint.random_state import generator_from, generator_state, set_space_states, space_states
from sb3_clipvf.checkpoint.state_attributes import ATTRIBUTES, STATELESS_MODULES, read_attributes, write_attributes
from sb3_clipvf.files.allowlist import full_name
from sb3_clipvf.files.codec import frozen

# The Zoo replaces Gymnasium's wrapper by its own; to SB3 the two are the same.
_SAME = {"PatchedTimeLimit": "TimeLimit"}
# These have no state, and a resumed run may add or drop them.
_OURS = ("sb3_clipvf.checkpoint.resumable.ResumableEnv", "sb3_clipvf.envs.episode_ends.EpisodeEnds")


def env_state(env: gym.Env[Any, Any]) -> dict[str, Any]:
    """
    Return the state of an environment and of all its wrappers.

    ``unknown`` names the classes that define no ``get_training_state`` and ``set_training_state``, and are not in the
    table of ``state_attributes``.
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
        "spaces": space_states(core),
        "unknown": unknown,
    }


def restore_env(env: gym.Env[Any, Any], state: dict[str, Any]) -> None:
    """Restore the state from :func:`env_state` in an environment with the same wrappers, which has been reset once."""
    core = _core(env)
    if _has_generator(core):
        core._np_random = generator_from(state["generator"])
    core._np_random_seed = state["seed"]
    set_space_states(core, state["spaces"])
    saved = [layer for layer in state["layers"] if layer["class"] not in _OURS]
    # From the inside out: a wrapper's own method may read the environment.
    for layer, own in reversed(list(zip(_without_ours(env), saved, strict=True))):
        write_attributes(layer, own["attributes"], ATTRIBUTES.get(full_name(type(layer)), ""))
        restore_file(vars(layer).get("results_writer"), own["file"])
        if own["mujoco"] is not None:
            set_mujoco_state(layer, own["mujoco"])
        if own["given"] is not None:
            layer.set_training_state(own["given"]["state"])


def allow_reset(env: gym.Env[Any, Any]) -> None:
    """Let ``Monitor`` accept a reset within an episode, whatever its ``allow_early_resets``."""
    for layer in _layers(env):
        if isinstance(layer, Monitor):
            layer.needs_reset = True


def describe_env(env: gym.Env[Any, Any]) -> list[str]:
    """Return the classes of an environment, from the outermost wrapper, and the environment's id if it has one."""
    # Without modules: a script that resumes may have a different name from the one that trained.
    names = [_SAME.get(type(layer).__qualname__, type(layer).__qualname__) for layer in _without_ours(env)]
    spec = _core(env).spec
    return [*names, spec.id] if isinstance(spec, EnvSpec) else names


def has_own_state(layer: Any) -> bool:
    """Return whether the class of a layer itself, not only what it wraps, has the two methods for its state."""
    methods = ("get_training_state", "set_training_state")
    return all(callable(getattr(type(layer), method, None)) for method in methods)


def own_state(layer: Any) -> tuple[dict[str, Any] | None, str | None]:
    """Return ``{"state": ...}`` from the layer's own method, and None or the reason why it cannot be saved."""
    name = full_name(type(layer))
    try:
        return {"state": frozen(layer.get_training_state(), f"{name}.get_training_state()")}, None
    except TypeError as error:
        return None, f"{name} ({error})"


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
    """Return whether ``_np_random`` is Gymnasium's generator, or will be."""
    return core._np_random is None or isinstance(core._np_random, np.random.Generator)


def _layer_state(layer: gym.Env[Any, Any]) -> tuple[dict[str, Any], str | None]:
    name = full_name(type(layer))
    state: dict[str, Any] = {"class": name, "attributes": {}, "file": None, "mujoco": None, "given": None}
    reason = None
    if has_own_state(layer):
        state["given"], reason = own_state(layer)
    elif is_mujoco(layer):
        state["mujoco"] = mujoco_state(layer)
    elif name in ATTRIBUTES:
        state["attributes"] = frozen(read_attributes(layer, ATTRIBUTES[name]), name)
        state["file"] = file_state(vars(layer).get("results_writer"))
    elif type(layer).__module__ not in STATELESS_MODULES:
        reason = name
    return state, reason
