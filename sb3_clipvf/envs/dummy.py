"""
SB3's DummyVecEnv without its deep copies: the same results at a fraction of the overhead.

SB3's class hands the buffers of observations and the list of infos to ``copy.deepcopy`` at every step. Here arrays and
plain dicts are copied by their own methods, and only what these do not cover goes the general way.
"""

from collections import OrderedDict
from copy import deepcopy
from typing import Any, cast

import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.util import dict_to_obs

from sb3_clipvf.envs.shapes import check_one

# np.void, which may be written to, is not among them.
_IMMUTABLE = frozenset(
    {type(None), bool, int, float, complex, str, bytes}
    | {kind for kind in np.sctypeDict.values() if kind not in (np.object_, np.void)}
)


class FastDummyVecEnv(DummyVecEnv):
    """
    Step environments one after the other, as SB3's ``DummyVecEnv`` does, at less cost.

    Results are those of ``DummyVecEnv``: values, types, and what shares memory with what. They may be kept and changed:
    neither the environments nor later steps see it, nor do later steps change them. Values of infos are copied as
    ``copy.deepcopy`` of the whole list copies them: an object that stands in several places, or in several infos, is
    one object in the copy as well.

    An observation whose shape is not that of the space, but for leading axes of length 1, is refused: there, NumPy
    stretches it where it can.

    Infos of numbers, text, arrays and plain dicts cost little. Lists, objects and whatever else goes through
    ``copy.deepcopy`` at its speed. A class that overrides ``_save_obs`` should derive from ``DummyVecEnv``: here,
    ``step_wait`` calls it for dicts and tuples only.

    :param env_fns: Functions that make one environment each.
    :raises ValueError: If two of them give the same environment.
    """

    # The constructor is DummyVecEnv's own.

    def step_wait(self) -> VecEnvStepReturn:
        """
        Step each environment by its action, and reset those that end.

        :return: Observations, rewards (float32), dones and infos. There, ``TimeLimit.truncated`` says whether the
            episode was cut off and had not ended by itself, and ``terminal_observation`` is the last observation of one
            that is over.
        """
        actions, rewards, dones, infos = self.actions, self.buf_rews, self.buf_dones, self.buf_infos
        buffers: dict[Any, np.ndarray] = self.buf_obs
        rows = buffers.get(None)  # None is the key where observations are neither dicts nor tuples
        shape = self.observation_space.shape
        obs: Any
        for index, env in enumerate(self.envs):
            obs, rewards[index], terminated, truncated, info = env.step(actions[index])
            infos[index] = info
            done = dones[index] = terminated or truncated
            info["TimeLimit.truncated"] = truncated and not terminated
            if done:
                if info["TimeLimit.truncated"] and obs is not None:  # its value will be asked for
                    check_one(self.observation_space, obs, index)
                info["terminal_observation"] = obs
                obs, self.reset_infos[index] = env.reset()
            if rows is None:
                self._save_obs(index, obs)
                continue
            if type(obs) is not np.ndarray or obs.shape != shape:
                check_one(self.observation_space, obs, index)
            rows[index] = obs
        # Not before the last step: environments may share what they give, and change it.
        memo: dict[int, Any] = {}
        return self._obs_from_buf(), rewards.copy(), dones.copy(), [_copied(info, memo) for info in infos]

    def _save_obs(self, env_idx: int, obs: VecEnvObs) -> None:
        check_one(self.observation_space, obs, env_idx)
        super()._save_obs(env_idx, obs)

    def _obs_from_buf(self) -> VecEnvObs:
        buffers: dict[Any, np.ndarray] = self.buf_obs
        memo: dict[int, Any] = {}
        if None in buffers:
            return cast(np.ndarray, _copied(buffers[None], memo))
        copies = OrderedDict((key, _copied(array, memo)) for key, array in buffers.items())
        return dict_to_obs(self.observation_space, copies)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """
    Copy as ``copy.deepcopy(value, memo)`` does.

    :param value: Anything. It must live until the last copy with this memo is made.
    :param memo: ``deepcopy``'s: copies so far, by the ``id`` of what they are copies of.
    :return: The copy.
    """
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
            copied = memo[id(value)] = value.copy("K")  # deepcopy keeps the order of memory, too
        return copied
    return deepcopy(value, memo)
