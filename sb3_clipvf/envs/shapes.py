"""What environments give at a step, checked for shapes and types that NumPy would stretch or cut in silence."""

import contextlib
from collections.abc import Iterator
from itertools import dropwhile, pairwise
from types import MethodType
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_clipvf.envs.layers import vec_env_layers

_NUMBERS = "biuf"
"""NumPy's kinds: truth values, whole numbers with and without a sign, floats."""

_WHOLE = "biu"

_WAY_OUT = "Mend it, or its observation space; stable_baselines3.common.env_checker.check_env finds more."


class StepCheck:
    """
    Refuse what environments give where it does not fit their spaces. What fits costs some comparisons.

    SB3's PPO casts float64 observations and takes whole numbers as rewards and values outside of the space; so does
    this, with the same numbers.

    :param space: Of one environment's observations.
    :param n_envs: Number of environments.
    """

    def __init__(self, space: spaces.Space[Any], n_envs: int) -> None:
        self._space = space
        self._n_envs = n_envs
        self._column_shape = (n_envs,)
        # Kinds of numbers that need no look at the numbers themselves.
        self._parts = [
            (key, part, (n_envs, *(part.shape or ())), _NUMBERS if np.dtype(part.dtype).kind == "f" else _WHOLE)
            for key, part in _parts(space)
        ]

    def observations(self, obs: Any) -> None:
        """
        Check the observations of all environments.

        :param obs: An array, or a dict of such.
        :raises ValueError: If a shape is not that of the space, or fractions come where it has whole numbers.
        :raises TypeError: If it is no array of numbers.
        """
        for key, space, shape, kinds in self._parts:
            part = obs if key is None else obs[key]
            if type(part) is not np.ndarray or part.shape != shape or part.dtype.kind not in kinds:
                _check_batch(_name(key), space, shape, part)

    def __call__(self, step: tuple[Any, Any, Any, Any]) -> tuple[Any, np.ndarray, np.ndarray, Any]:
        """
        Check a step.

        :param step: Observations, rewards, dones and infos of a ``VecEnv``.
        :return: The same; rewards are an array, dones one of bools, if they were not.
        :raises ValueError: If a shape is wrong, or fractions come where a space has whole numbers.
        :raises TypeError: If something is no array of numbers.
        """
        obs, rewards, dones, infos = step
        self.observations(obs)
        rewards, dones = self._column("rewards", rewards), self._column("dones", dones)
        if dones.dtype != bool:
            dones = dones.astype(bool)  # numbers would be rows where they index
        _check_final(self._space, dones, infos)
        return obs, rewards, dones, infos

    def _column(self, name: str, values: Any) -> np.ndarray:
        array = values if type(values) is np.ndarray else np.asarray(values)
        if array.shape != self._column_shape:
            raise ValueError(
                f"`env` must give {name} of the shape ({self._n_envs},), got {array.shape}. Let step() give one number "
                "for each environment."
            )
        if array.dtype.kind not in _NUMBERS:
            raise TypeError(f"`env` must give numbers as {name}, got {values!r}. Let step() give int, float or bool.")
        return array


def check_one(space: spaces.Space[Any], obs: Any, index: int, *, columns: bool = False) -> None:
    """
    Check the shape of one environment's observation, which NumPy would stretch to that of the space.

    Leading axes of length 1 do not count, since its numbers stay the same without them.

    :param space: Of the observation.
    :param obs: The observation.
    :param index: Which environment gave it.
    :param columns: Whether a discrete observation may be an array of one, which NumPy does not write into a row.
    :raises ValueError: If its shape is another.
    """
    if type(obs) is np.ndarray and obs.shape == space.shape:
        return
    for key, wanted, shape in _misfits(space, obs, (), columns=columns):
        raise ValueError(
            f"`env` must give {_name(key)} of its space's shape {wanted}, got {shape} from environment {index}. "
            f"{_WAY_OUT}"
        )


@contextlib.contextmanager
def checked_rows(venv: VecEnv) -> Iterator[None]:
    """
    Let environments refuse observations that they or a wrapper would stretch, for as long as this lasts.

    What they give is checked before wrappers, ``VecNormalize`` among them, see it; in SB3's ``DummyVecEnv`` before it
    saves a row. ``FastDummyVecEnv`` does it itself. Where there are no wrappers, the rest is :class:`StepCheck`'s.
    Layers below a wrapper that converts observations to other shapes are left alone, and so are arrays that are not
    NumPy's.

    :param venv: With its wrappers.
    :return: Context manager.
    """
    from sb3_clipvf.envs.dummy import FastDummyVecEnv  # which imports this module

    layers = vec_env_layers(venv)
    base = layers[-1]
    names = ("reset", "step_wait", "_save_obs", "_obs_from_buf")
    checks_itself = all(getattr(type(base), name, None) is getattr(FastDummyVecEnv, name) for name in names)
    checks: list[tuple[VecEnv, str, Any]] = []
    for outer, inner in reversed(list(pairwise(layers))):
        if _takes_shapes_of(outer, inner):
            if not (inner is base and checks_itself):
                checks = [(inner, "reset", _reset), (inner, "step_wait", _step_wait)]
            break
    if isinstance(base, DummyVecEnv) and type(base)._save_obs is DummyVecEnv._save_obs:
        checks.append((base, "_save_obs", _save_obs))
    # Methods, so that a copy of the environments writes into its own rows. What others put there stays, also meanwhile.
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
    """Return whether a wrapper relies on the shapes of the space inside; one of the user's may convert them."""
    shapes = [[(key, part.shape) for key, part in _parts(venv.observation_space)] for venv in (outer, inner)]
    return type(outer).__module__.startswith("stable_baselines3.") or shapes[0] == shapes[1]


def _save_obs(self: DummyVecEnv, env_idx: int, obs: Any) -> None:
    check_one(self.observation_space, obs, env_idx)
    DummyVecEnv._save_obs(self, env_idx, obs)


def _reset(self: VecEnv, *args: Any, **kwargs: Any) -> Any:
    obs = type(self).reset(self, *args, **kwargs)
    if not args and not kwargs:  # some classes reset by themselves only those environments that are over
        _check_shapes(self, obs)
    return obs


def _step_wait(self: VecEnv) -> Any:
    step = type(self).step_wait(self)
    # In another form than SB3's, it is for a wrapper to convert.
    if (
        isinstance(step, tuple)
        and len(step) == 4
        and _check_shapes(self, step[0])
        and isinstance(step[3], list | tuple)
    ):
        _check_final(self.observation_space, step[2], step[3])
    return step


def _check_shapes(venv: VecEnv, obs: Any) -> bool:
    """Check shapes; types are checked behind the wrappers. :return: False for what only a wrapper can convert."""
    n_envs, space = venv.num_envs, venv.observation_space
    if type(obs) is np.ndarray and obs.shape == (n_envs, *(space.shape or ())):
        return True
    try:
        given = [obs if key is None else obs[key] for key, _ in _parts(space)]
    except (IndexError, KeyError, TypeError):
        return False
    if not all(isinstance(part, np.ndarray | list) for part in given):
        return False
    for key, wanted, shape in _misfits(space, obs, (n_envs,), columns=True):
        raise _shape_error(_name(key), wanted, shape)
    return True


def _misfits(
    space: spaces.Space[Any], obs: Any, leading: tuple[int, ...], *, columns: bool
) -> Iterator[tuple[Any, tuple[int, ...], tuple[int, ...]]]:
    """Parts whose shape does not fit the leading axes and the space's own: the key, the shape wanted, the one given."""
    for key, part in _parts(space):
        given = obs if key is None else obs[key]
        shape = given.shape if isinstance(given, np.ndarray) else np.shape(given)
        if part.shape is not None and not _fits(part, shape, leading, columns=columns):
            yield key, (*leading, *part.shape), shape


def _fits(space: spaces.Space[Any], shape: tuple[int, ...], leading: tuple[int, ...], *, columns: bool) -> bool:
    """Return whether a shape is the leading axes and the space's own, or one that SB3 reshapes to it."""
    own = space.shape or ()
    if shape == (*leading, *own):
        return True
    if isinstance(space, spaces.Discrete):
        return columns and shape == (*leading, 1)
    return not leading and _without_ones(shape) == _without_ones(own)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dropwhile(lambda length: length == 1, shape))


def _check_final(space: spaces.Space[Any], dones: Any, infos: Any) -> None:
    if np.count_nonzero(dones):
        for index in np.flatnonzero(dones).tolist():
            # Of others it is not read, so that wrappers may leave it as it is.
            if infos[index].get("TimeLimit.truncated") and infos[index].get("terminal_observation") is not None:
                check_one(space, infos[index]["terminal_observation"], index, columns=True)


def _check_batch(name: str, space: spaces.Space[Any], shape: tuple[int, ...], obs: Any) -> None:
    if not isinstance(obs, np.ndarray) or obs.dtype.kind not in _NUMBERS:
        kind = f"of {obs.dtype}" if isinstance(obs, np.ndarray) else f"of type {type(obs).__name__}"
        raise TypeError(f"`env` must give {name} as a NumPy array of numbers, got one {kind}. {_WAY_OUT}")
    if not _fits(space, obs.shape, shape[:1], columns=True):
        raise _shape_error(name, shape, obs.shape)
    is_whole = obs.dtype.kind in _WHOLE or np.dtype(space.dtype).kind == "f"
    # NaN is found, and told by its name, where the policy is to act on it.
    if not is_whole and not np.array_equal(obs, np.trunc(obs), equal_nan=True):
        raise ValueError(
            f"`env` must give whole numbers as {name}, as its space of {space.dtype} says, got fractions, which the "
            f"rollout would cut off. {_WAY_OUT}"
        )


def _shape_error(name: str, shape: tuple[int, ...], given: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"`env` must give {name} of its space's shape, {shape} for {shape[0]} environments, got {given}. {_WAY_OUT}"
    )


def _parts(space: spaces.Space[Any]) -> list[tuple[Any, spaces.Space[Any]]]:
    """Spaces that are stored in one array each, by their key; None where observations have no keys."""
    if isinstance(space, spaces.Dict):
        return list(space.spaces.items())
    return list(enumerate(space.spaces)) if isinstance(space, spaces.Tuple) else [(None, space)]


def _name(key: Any) -> str:
    return "observations" if key is None else f"observations[{key!r}]"
