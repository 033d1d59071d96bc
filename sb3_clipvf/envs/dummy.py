"""
SB3's DummyVecEnv without most of its deep copies: the same results at less overhead.

SB3's class passes the buffers of observations and the list of infos to ``copy.deepcopy`` at every step. Here arrays and
plain dicts are copied by their own methods, and only other objects by ``copy.deepcopy``.
"""

from collections import OrderedDict
from copy import deepcopy
from typing import Any, cast

import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.util import dict_to_obs

from sb3_clipvf.envs.rows import copy_of
from sb3_clipvf.envs.shapes import check_one

# Types that need no copy; np.void is mutable.
_IMMUTABLE = frozenset(
    {type(None), bool, int, float, complex, str, bytes}
    | {kind for kind in np.sctypeDict.values() if kind not in (np.object_, np.void)}
)


class FastDummyVecEnv(DummyVecEnv):
    """
    Step environments one after the other, as SB3's ``DummyVecEnv`` does, at less cost.

    Results are those of ``DummyVecEnv``: values, types, and which objects share memory. They may be kept and changed,
    since neither environments nor later steps use them. Infos are copied as ``copy.deepcopy`` copies the whole list: an
    object in several places, or in several infos, is one object in the copy as well.

    Final observations are copied before the environment is reset. ``DummyVecEnv`` copies them after it: an environment
    that resets into the array that it returned has overwritten them by then.

    An observation is refused if its shape is not that of the space, apart from leading axes of length 1.
    ``DummyVecEnv`` broadcasts it if NumPy can.

    Infos of numbers, text, arrays and plain dicts cost little. Lists and other objects are copied by ``copy.deepcopy``,
    at its speed. A class that overrides ``_save_obs`` should derive from ``DummyVecEnv``: this ``step_wait`` calls it
    for dicts and tuples only.

    :param env_fns: Functions that create one environment each.
    :raises ValueError: If two of them return the same environment.
    """

    _first = 0  # number of the first environment in messages

    def step_wait(self) -> VecEnvStepReturn:
        """
        Step each environment with its action, and reset those whose episode ended.

        :return: Observations, rewards (float32), dones and infos. In the infos, ``TimeLimit.truncated`` is whether the
            episode was truncated and not terminated, and ``terminal_observation`` is its last observation.
        """
        return fast_step_wait(self, self._first)

    def _save_obs(self, env_idx: int, obs: VecEnvObs) -> None:
        check_one(self.observation_space, obs, self._first + env_idx)
        super()._save_obs(env_idx, obs)

    def _obs_from_buf(self) -> VecEnvObs:
        return _copied_obs(self)


def fast_step_wait(venv: DummyVecEnv, first: int = 0) -> VecEnvStepReturn:
    """Step the environments as ``venv.step_wait`` does; ``first`` is the number of the first one in messages."""
    step_envs(venv, first)
    # Copy after the last step, since environments may share objects and change them.
    return _copied_obs(venv), venv.buf_rews.copy(), venv.buf_dones.copy(), copied_infos(venv)


def step_envs(venv: DummyVecEnv, first: int) -> None:
    """Step all environments into the buffers."""
    actions, rewards, dones, infos = venv.actions, venv.buf_rews, venv.buf_dones, venv.buf_infos
    buffers: dict[Any, np.ndarray] = venv.buf_obs
    rows = buffers.get(None)  # the key is None if observations are neither dicts nor tuples
    shape = venv.observation_space.shape
    obs: Any
    for index, env in enumerate(venv.envs):
        obs, rewards[index], terminated, truncated, info = env.step(actions[index])
        infos[index] = info
        done = dones[index] = terminated or truncated
        info["TimeLimit.truncated"] = truncated and not terminated
        if done:
            if info["TimeLimit.truncated"] and obs is not None:  # its value will be bootstrapped
                check_one(venv.observation_space, obs, first + index)
            info["terminal_observation"] = copy_of(obs)  # the reset may write to the same memory
            obs, venv.reset_infos[index] = env.reset()
        if rows is None:
            venv._save_obs(index, obs)
            continue
        if type(obs) is not np.ndarray or obs.shape != shape:
            check_one(venv.observation_space, obs, first + index)
        rows[index] = obs


def _copied_obs(venv: DummyVecEnv) -> VecEnvObs:
    buffers: dict[Any, np.ndarray] = venv.buf_obs
    rows = buffers.get(None)
    if rows is not None and not rows.dtype.hasobject:
        return rows.copy("K")
    memo: dict[int, Any] = {}
    if rows is not None:
        return cast(np.ndarray, _copied(rows, memo))
    copies = OrderedDict((key, _copied(array, memo)) for key, array in buffers.items())
    return dict_to_obs(venv.observation_space, copies)


def copied_infos(venv: DummyVecEnv) -> list[dict[str, Any]]:
    """Return copies of the infos in the buffers."""
    memo: dict[int, Any] = {}
    return [_copied(info, memo) for info in venv.buf_infos]


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Copy as ``copy.deepcopy(value, memo)`` does; ``value`` must live until the last copy with this memo."""
    kind = type(value)
    if kind is dict:
        copied = memo.get(id(value))
        if copied is None:
            copied = memo[id(value)] = {}
            for key, entry in value.items():
                if type(key) not in _IMMUTABLE:
                    key = deepcopy(key, memo)
                copied[key] = entry if type(entry) in _IMMUTABLE else _copied(entry, memo)
        return copied
    if kind is np.ndarray and not value.dtype.hasobject:
        copied = memo.get(id(value))
        if copied is None:
            copied = memo[id(value)] = value.copy("K")  # as deepcopy, keep the memory order
        return copied
    return deepcopy(value, memo)
