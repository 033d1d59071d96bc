"""Checks of the training environments: they must fit the model, and observations must have their space's shape."""

import contextlib
from collections.abc import Iterator
from itertools import pairwise, starmap
from types import MethodType
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_clipvf.common.validation import same_spaces
from sb3_clipvf.envs.dummy import FastDummyVecEnv
from sb3_clipvf.envs.faster import faster_step_wait
from sb3_clipvf.envs.layers import vec_env_layers
from sb3_clipvf.envs.shapes import check_final, check_one, misfits, name_of, parts, shape_error


def check_environments(
    env: VecEnv, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], n_envs: int
) -> None:
    """Raise ValueError if environments are closed or do not fit a model; ``model.env`` may have been replaced."""
    base = vec_env_layers(env)[-1]
    if isinstance(base, SubprocVecEnv) and base.closed:
        raise ValueError("`env` is closed: its worker processes have ended. Build it again.")
    same = _same_but_for_bounds(env.observation_space, observation_space)
    with same_spaces():
        check_for_correct_spaces(env, env.observation_space if same else observation_space, action_space)
    if env.num_envs != n_envs:
        raise ValueError(
            f"`env` must have the number of environments that the model was built for, {n_envs}, got {env.num_envs}. "
            "Save the model, and pass the environments to `load`."
        )


def _same_but_for_bounds(first: spaces.Space[Any], second: spaces.Space[Any]) -> bool:
    """Return whether spaces are equal except for the bounds of boxes, which a curriculum may move."""
    if isinstance(first, spaces.Dict) and isinstance(second, spaces.Dict):
        pairs = [(first.spaces[key], second.spaces[key]) for key in first.spaces.keys() & second.spaces.keys()]
        return len(pairs) == len(first.spaces) == len(second.spaces) and all(starmap(_same_but_for_bounds, pairs))
    if isinstance(first, spaces.Box) and isinstance(second, spaces.Box):
        return (first.shape, first.dtype) == (second.shape, second.dtype)
    return first == second


@contextlib.contextmanager
def checked_and_faster(venv: VecEnv) -> Iterator[None]:
    """
    Check the observations of environments in this context, and step SB3's own ``DummyVecEnv`` by faster code.

    Environments raise an error for observations that they or a wrapper would broadcast. The faster code
    (:func:`.faster_step_wait`) replaces the method that a check would replace, so both are done here.

    Observations are checked before wrappers such as ``VecNormalize`` get them, and in SB3's ``DummyVecEnv`` before it
    saves a row. ``FastDummyVecEnv`` and the faster code check by themselves. Without wrappers,
    :class:`StepCheck` does the rest. Layers below a wrapper that converts observations to different shapes are not
    checked, and neither are arrays of other libraries.
    """
    layers = vec_env_layers(venv)
    base = layers[-1]
    names = ("reset", "step_wait", "_save_obs", "_obs_from_buf")
    checks_itself = all(getattr(type(base), name, None) is getattr(FastDummyVecEnv, name) for name in names)
    checks: list[tuple[VecEnv, str, Any]] = []
    if (faster := faster_step_wait(base)) is not None:
        checks_itself, checks = True, [(base, "step_wait", faster)]
    for outer, inner in reversed(list(pairwise(layers))):
        if _takes_shapes_of(outer, inner):
            if not (inner is base and checks_itself):
                checks += [(inner, "reset", _reset), (inner, "step_wait", _step_wait)]
            break
    if isinstance(base, DummyVecEnv) and type(base)._save_obs is DummyVecEnv._save_obs:
        checks.append((base, "_save_obs", _save_obs))
    # Bound to the layer, so that a deep copy has methods bound to the copy. Attributes set by the user are kept.
    methods = [(layer, name, MethodType(check, layer)) for layer, name, check in checks if name not in vars(layer)]
    for layer, name, method in methods:
        vars(layer)[name] = method
    try:
        yield
    finally:
        for layer, name, method in methods:
            if vars(layer).get(name) is method:
                del vars(layer)[name]


def _takes_shapes_of(outer: VecEnv, inner: VecEnv) -> bool:
    """Return whether a wrapper needs observations of the inner space's shapes; a user's wrapper may convert them."""
    shapes = [[(key, part.shape) for key, part in parts(venv.observation_space)] for venv in (outer, inner)]
    return type(outer).__module__.startswith("stable_baselines3.") or shapes[0] == shapes[1]


def _save_obs(self: DummyVecEnv, env_idx: int, obs: Any) -> None:
    check_one(self.observation_space, obs, env_idx)
    DummyVecEnv._save_obs(self, env_idx, obs)


def _reset(self: VecEnv, *args: Any, **kwargs: Any) -> Any:
    obs = type(self).reset(self, *args, **kwargs)
    if not args and not kwargs:  # with arguments, some classes reset single environments
        _check_shapes(self, obs)
    return obs


def _step_wait(self: VecEnv) -> Any:
    step = type(self).step_wait(self)
    # If the step does not have SB3's form, a wrapper must convert it: it is not checked here.
    if (
        isinstance(step, tuple)
        and len(step) == 4
        and _check_shapes(self, step[0])
        and isinstance(step[3], list | tuple)
    ):
        check_final(self.observation_space, step[2], step[3])
    return step


def _check_shapes(venv: VecEnv, obs: Any) -> bool:
    """Check the shapes of observations; return False if these are of a type that only a wrapper can convert."""
    n_envs, space = venv.num_envs, venv.observation_space
    if type(obs) is np.ndarray and obs.shape == (n_envs, *(space.shape or ())):
        return True
    try:
        given = [obs if key is None else obs[key] for key, _ in parts(space)]
    except (IndexError, KeyError, TypeError):
        return False
    if not all(isinstance(part, np.ndarray | list) for part in given):
        return False
    for key, wanted, shape in misfits(space, obs, (n_envs,), columns=True):
        raise shape_error(name_of(key), wanted, shape)
    return True
