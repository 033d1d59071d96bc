"""
SB3's VecNormalize with its arithmetic in compiled kernels: the same results and files at a fraction of the cost.

SB3's class spends its time in the overhead of some forty NumPy calls per step. Here one kernel processes the
observations, and one the rewards. They keep no state: they read the statistics from the objects where SB3's code keeps
them, and put new arrays there. A change of these objects takes effect at the next step.
"""

import inspect
import math
import os
from copy import copy, deepcopy
from pathlib import Path
from typing import Any, Self, cast

import numba
import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_clipvf.common.jit import cached
from sb3_clipvf.files.atomic import atomic_write
from sb3_clipvf.files.statistics import digest_of_pickle, load_vec_normalize
from sb3_clipvf.files.trust import TrustPickle

Observations = np.ndarray | dict[str, np.ndarray]


class FastVecNormalize(VecNormalize):
    """
    Normalise observations and rewards by running statistics, as SB3's ``VecNormalize`` does, at less cost.

    Observations, per element: (x - mean) / sqrt(var + epsilon), clipped. Rewards: r / sqrt(var + epsilon), clipped,
    with the variance of the discounted sums of rewards.

    Results are those of ``VecNormalize``, bit for bit. Operations, their order and their precision are the same:
    moments of one step in the observations' own precision, all else in float64. NaN and infinity give the same
    results, without NumPy's warnings.

    Dones may be numbers as well as bools. If they are integers, SB3's class resets the sums of the wrong environments.

    SB3's own code, at its speed, handles what the kernels do not: float16, arrays that are not contiguous, statistics
    of a different class or shape, a clipping range for each element.

    Files are SB3's. Those that ``save`` writes name SB3's classes only, so that ``VecNormalize.load`` needs no package
    but SB3 to read them. A class that overrides single methods should derive from ``VecNormalize``: this ``step_wait``
    does not call ``normalize_obs`` and ``normalize_reward``.

    :param venv: Environments to wrap.
    :param training: Whether the statistics are updated.
    :param norm_obs: Whether observations are normalised. They are float32 then.
    :param norm_reward: Whether rewards are normalised. They are always float32.
    :param clip_obs: Largest absolute value of a normalised observation.
    :param clip_reward: Largest absolute value of a normalised reward.
    :param gamma: Discount factor of the sums of rewards.
    :param epsilon: Constant added to the variance before its root is taken.
    :param norm_obs_keys: Entries of a dict observation to normalise; None: all of them.
    :raises ValueError: If an observation to be normalised is not a Box, or ``norm_obs_keys`` is given without a dict.
    """

    @classmethod
    def from_sb3(cls, vec_normalize: VecNormalize) -> Self:
        """
        Return a replacement for SB3's ``VecNormalize``, in the same state.

        :param vec_normalize: Wrapper to replace. The two share environments, settings and statistics: do not use it
            afterwards.
        :raises TypeError: If it is of a subclass, whose own behaviour would be lost.
        """
        if type(vec_normalize) not in (VecNormalize, cls):
            raise TypeError(
                f"`vec_normalize` must be a VecNormalize of Stable-Baselines3, got {type(vec_normalize).__name__}. "
                "Keep the wrapper as it is: what it does beyond VecNormalize would be lost."
            )
        fast = cls.__new__(cls)
        fast.__dict__.update(vec_normalize.__dict__)
        fast.class_attributes = dict(inspect.getmembers(cls))
        return fast

    @classmethod
    def load(cls, load_path: str | os.PathLike[str], venv: VecEnv, trust_pickle: TrustPickle = None) -> Self:
        """
        Load a file that ``save`` of this class or of SB3's ``VecNormalize`` wrote, without running code.

        :param load_path: File.
        :param venv: Environments to wrap.
        :param trust_pickle: As in :meth:`sb3_clipvf.ClipPPO.load`. True: the file may run any code.
        :return: Wrapper with the file's settings and statistics; sums of rewards start at 0.
        :raises UnsafeFileError: If the file needs classes or functions that it may not use.
        :raises ValueError: If the file holds something else, is damaged or does not fit into memory.
        :raises TypeError: If the file holds a subclass of ``VecNormalize``.
        """
        return cls.from_sb3(load_vec_normalize(load_path, venv, trust_pickle))

    def save(self, save_path: str) -> None:
        """
        Save settings and statistics atomically, in SB3's format.

        A digest follows the pickle, where SB3 does not read: ``load`` refuses a file whose bytes have changed.

        :param save_path: File to write.
        :raises OSError: If the file cannot be written. Its old content is then unchanged.
        """
        plain = VecNormalize.__new__(VecNormalize)
        plain.__dict__.update(self.__dict__)
        with atomic_write(save_path) as file:
            plain.save(file.name)
            pickled = Path(file.name).read_bytes()
            file.seek(len(pickled))
            file.write(digest_of_pickle(pickled))

    def step_wait(self) -> VecEnvStepReturn:
        """Wait for the step, update the statistics if ``training``, and normalise, including final observations."""
        return normalized(self, self.venv.step_wait())

    def reset(self) -> Observations:
        """Reset all environments, update the statistics if ``training``, and return normalised observations."""
        self.old_obs = self.venv.reset()  # type: ignore[assignment]
        self.returns = np.zeros(self.num_envs)
        return _processed(self, self.old_obs, update=self.training)

    def normalize_obs(self, obs: Observations) -> Observations:
        """
        Normalise observations, without an update of the statistics.

        :param obs: One observation, or several along leading dimensions. It is not changed.
        :return: New arrays of the same shape, float32 if normalised.
        """
        return _processed(self, obs, update=False)


def normalized(env: VecNormalize, step: VecEnvStepReturn) -> VecEnvStepReturn:
    """Normalise the result of a step as ``env.step_wait`` does."""
    env.old_obs, env.old_reward, dones, infos = step  # type: ignore[assignment]
    obs = _processed(env, env.old_obs, update=env.training)
    rewards = _processed_reward(env, env.old_reward, update=env.training)
    if np.count_nonzero(dones):
        ended = np.flatnonzero(dones)
        for index in ended:
            info = infos[index]
            if "terminal_observation" in info:
                info["terminal_observation"] = env.normalize_obs(info["terminal_observation"])
        env.returns[ended] = 0  # not [dones]: integers would select rows
    return obs, rewards, dones, infos


def _processed(env: VecNormalize, obs: Observations, *, update: bool) -> Observations:
    """Return normalised observations, after an update of the statistics if asked for."""
    if not env.norm_obs:
        return deepcopy(obs)
    if not (isinstance(obs, dict) and isinstance(env.obs_rms, dict)):
        return _processed_array(env, obs, env.obs_rms, update=update)  # type: ignore[arg-type]
    keys = env.norm_obs_keys or []
    processed = copy(obs)
    for key in obs.keys() - keys:
        processed[key] = deepcopy(obs[key])
    for key in keys:
        processed[key] = _processed_array(env, obs[key], env.obs_rms[key], update=update)
    if update:
        for key in env.obs_rms.keys() - keys:
            env.obs_rms[key].update(obs[key])
    return processed


def _processed_array(env: VecNormalize, values: np.ndarray, rms: RunningMeanStd, *, update: bool) -> np.ndarray:
    if _is_plain(rms):
        try:
            flat = values.ndim == 2 and rms.mean.ndim == 1
            rows, mean, var = (values, rms.mean, rms.var) if flat else _flattened(values, rms)
            mean, var, scaled = _scale_rows(
                _as_floats(rows, adds=update), mean, var, rms.count, env.epsilon, env.clip_obs, update
            )
        except (AttributeError, TypeError):
            pass  # the kernel does not support these types
        else:
            if update:
                shape = rms.mean.shape
                rms.mean, rms.var = (mean, var) if flat else (mean.reshape(shape), var.reshape(shape))
                rms.count = len(values) + rms.count
            return cast(np.ndarray, scaled if flat else scaled.reshape(values.shape))
    if update:
        rms.update(values)
    return env._normalize_obs(values, rms).astype(np.float32)


def _processed_reward(env: VecNormalize, reward: np.ndarray, *, update: bool) -> np.ndarray:
    rms: Any = env.ret_rms  # SB3 annotates the moments as arrays, and stores numbers
    if _is_plain(rms) and (update or env.norm_reward):
        try:
            env.returns, mean, var, scaled = _scale_rewards(
                _as_floats(reward),
                env.returns,
                env.gamma,
                rms.mean,
                rms.var,
                rms.count,
                env.epsilon,
                env.clip_reward,
                update,
            )
        except TypeError:
            pass  # the kernel does not support these types; the moments of new statistics are arrays
        else:
            if update:
                rms.mean, rms.var = np.float64(mean), np.float64(var)
                rms.count = len(reward) + rms.count
            return scaled if env.norm_reward else reward.astype(np.float32)
    if update:
        env._update_reward(reward)
    return env.normalize_reward(reward)


def _is_plain(rms: RunningMeanStd) -> bool:
    """Return whether running moments are updated by SB3's own code."""
    return type(rms) is RunningMeanStd and vars(rms).keys().isdisjoint(("update", "update_from_moments"))


def _flattened(values: np.ndarray, rms: RunningMeanStd) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return values ``(rows, size)``, mean ``(size,)`` and variance ``(size,)`` for the kernel."""
    if rms.mean.size == 0 or values.shape[values.ndim - rms.mean.ndim :] != rms.mean.shape:
        raise TypeError("values and moments differ in shape")
    return values.reshape(-1, rms.mean.size), rms.mean.ravel(), rms.var.ravel()


def _as_floats(values: np.ndarray, *, adds: bool = False) -> np.ndarray:
    """
    Return a contiguous array, with integers as float64, in which NumPy averages them.

    With ``adds``, the kernel adds the rows in NumPy's order for contiguous arrays; NumPy adds others as they lie.
    """
    if adds and not values.flags.c_contiguous:
        raise TypeError("values are not contiguous")
    return np.ascontiguousarray(values.astype(np.float64) if values.dtype.kind in "iub" else values)


# The kernels restate RunningMeanStd.update and VecNormalize's formulas, each operation rounded where theirs is.
# tests/test_envs_normalize.py compares streams of both. Signatures are fixed, so that other types raise TypeError
# instead of a new compilation.

_types: Any = numba.types
_F4, _F8 = _types.float32, _types.float64
_FLOATS = (_F4, _F8)


def _array(dtype: Any, ndim: int) -> Any:
    """Return Numba's type of a contiguous array that may be read-only."""
    return _types.Array(dtype, ndim, "C", readonly=True)


@cached(_F8(_F8, _F8))
def _clipped(value: float, bound: float) -> float:
    """Clip to [-bound, bound]. Comparisons, unlike min and max, let NaN through."""
    if value < -bound:
        value = -bound
    if value > bound:
        value = bound
    return value


@cached(*(dtype(_array(dtype, 1), _types.intp, _types.intp) for dtype in _FLOATS))
def _sum(values: Any, start: int, n: int) -> Any:
    """Add ``n`` values in the order in which NumPy adds contiguous ones, which limits the rounding error."""
    if n > 128:
        half = n // 2
        half -= half % 8
        return _sum(values, start, half) + _sum(values, start + half, n - half)
    if n < 8:
        total = values[start]
        for i in range(start + 1, start + n):
            total += values[i]
        return total
    partial = values[start : start + 8].copy()
    n_whole = n - n % 8
    for i in range(8, n_whole, 8):
        for j in range(8):
            partial[j] += values[start + i + j]
    for width in (4, 2, 1):  # (0 + 1) + (2 + 3), (4 + 5) + (6 + 7), then the two
        for j in range(width):
            partial[j] = partial[2 * j] + partial[2 * j + 1]
    total = partial[0]
    for i in range(start + n_whole, start + n):
        total += values[i]
    return total


@cached(
    *(
        _types.Tuple((_F8[::1], _F8[::1], _F4[:, ::1]))(
            _array(dtype, 2), _array(_F8, 1), _array(_F8, 1), _F8, _F8, _F8, _types.boolean
        )
        for dtype in _FLOATS
    )
)
def _scale_rows(
    rows: np.ndarray, mean: np.ndarray, var: np.ndarray, count: float, epsilon: float, clip: float, update: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Join the moments of rows ``(n, k)`` to running ones ``(k,)`` of ``count`` rows; centre, scale and clip the rows.

    Return new arrays: mean and (population) variance, unchanged without ``update``, and the scaled rows, float32.

    Source: Chan, Golub and LeVeque 1979, Stanford STAN-CS-79-773, equation 2.1.
    """
    n, k = rows.shape
    if len(mean) != k or len(var) != k:
        raise TypeError("rows and moments differ in shape")
    new_mean, new_var = mean.copy(), var.copy()
    if update:
        # Sums in the rows' own precision, as NumPy takes them: a single column pairwise, several row after row.
        batch_mean, batch_m2 = np.zeros(k, rows.dtype), np.zeros(k, rows.dtype)
        if k == 1:
            column = rows[:, 0].copy()
            batch_mean[0] = _sum(column, 0, n)
            batch_mean[0] /= n
            for i in range(n):
                column[i] -= batch_mean[0]
                column[i] *= column[i]
            batch_m2[0] = _sum(column, 0, n)
        else:
            for i in range(n):
                for j in range(k):
                    batch_mean[j] += rows[i, j]
            for j in range(k):
                batch_mean[j] /= n
            for i in range(n):
                for j in range(k):
                    deviation = rows[i, j] - batch_mean[j]
                    batch_m2[j] += deviation * deviation
        total = count + n
        for j in range(k):
            batch_m2[j] /= n  # SB3 computes the variance first, rounded
            batch_m2[j] *= n
            delta = batch_mean[j] - mean[j]
            new_mean[j] = mean[j] + delta * n / total
            new_var[j] = (var[j] * count + batch_m2[j] + delta * delta * count * n / total) / total
    scaled = np.empty((n, k), np.float32)
    for i in range(n):
        for j in range(k):
            scaled[i, j] = _clipped((rows[i, j] - new_mean[j]) / math.sqrt(new_var[j] + epsilon), clip)
    return new_mean, new_var, scaled


@cached(
    *(
        _types.Tuple((_F8[::1], _F8, _F8, _F4[::1]))(
            _array(dtype, 1), _array(_F8, 1), _F8, _F8, _F8, _F8, _F8, _F8, _types.boolean
        )
        for dtype in _FLOATS
    )
)
def _scale_rewards(
    rewards: np.ndarray,
    returns: np.ndarray,
    gamma: float,
    mean: float,
    var: float,
    count: float,
    epsilon: float,
    clip: float,
    update: bool,
) -> tuple[np.ndarray, float, float, np.ndarray]:
    """
    Add rewards ``(n,)`` to their discounted sums, the sums to running moments, and scale and clip the rewards.

    Return sums, mean and variance, unchanged without ``update``, and the scaled rewards, float32. Arrays are new.
    """
    n = len(rewards)
    if len(returns) != n:
        raise TypeError("rewards and returns differ in shape")
    new_returns = returns.copy()
    if update:
        for i in range(n):
            new_returns[i] = returns[i] * gamma + rewards[i]
        batch_mean = _sum(new_returns, 0, n) / n
        squares = np.empty(n, np.float64)
        for i in range(n):
            deviation = new_returns[i] - batch_mean
            squares[i] = deviation * deviation
        batch_m2 = _sum(squares, 0, n) / n * n
        delta = batch_mean - mean
        total = count + n
        mean = mean + delta * n / total
        var = (var * count + batch_m2 + delta * delta * count * n / total) / total
    scaled = np.empty(n, np.float32)
    for i in range(n):
        scaled[i] = _clipped(rewards[i] / math.sqrt(var + epsilon), clip)
    return new_returns, mean, var, scaled
