"""Base class of the adapters to SB3's ``VecEnv``: steps, infos, episode statistics, seeds and attributes."""

import time
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from os import PathLike, fspath
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_clipvf.envs.rows import copy_row, fill_infos


class Step(NamedTuple):
    """One step of all environments. Arrays have the shape ``(n_envs,)``."""

    obs: Any  # (n_envs, ...), copied out of the environments' memory
    rewards: np.ndarray  # for the algorithm, before clipping
    true_rewards: np.ndarray  # for the statistics
    terminated: np.ndarray
    truncated: np.ndarray
    infos: dict[str, Any]  # of the batch, in Gymnasium's form


class BatchedVecEnv(VecEnv):
    """
    SB3's ``VecEnv`` over one object that steps all environments.

    A subclass defines :meth:`_reset_all`, :meth:`_step_all` and :meth:`_begin_next`. Python loops over environments run
    only if an episode ended or there are infos. The spaces are those of one environment.
    """

    _UNWANTED_INFOS: frozenset[str] = frozenset()

    def __init__(
        self,
        env: Any,
        n_envs: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *,
        clip_rewards: bool = False,
        monitor_path: str | PathLike[str] | None = None,
    ) -> None:
        self.env = env
        self.clip_rewards = clip_rewards
        self.statistics = EpisodeStatistics(n_envs)
        self._adds_statistics = True
        self._writer: ResultsWriter | None = None
        self._actions: Any = None
        self._was_reset = False
        super().__init__(n_envs, observation_space, action_space)
        self.metadata: dict[str, Any] = {**self.metadata, **(getattr(env, "metadata", None) or {})}
        if monitor_path is not None:
            env_id = str(getattr(getattr(env, "spec", None), "id", None) or _name(env))
            header: dict[str, float | str] = {"t_start": self.statistics.started_at, "env_id": env_id}
            self._writer = ResultsWriter(fspath(monitor_path), header=header, extra_keys=("total_timesteps",))

    @abstractmethod
    def _reset_all(self, seeds: list[int] | None, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        """Reset all environments, with one seed each or None, and return copied observations and the batch's infos."""

    @abstractmethod
    def _step_all(self, actions: np.ndarray) -> Step:
        """Step all environments, with actions ``(n_envs, ...)``."""

    @abstractmethod
    def _begin_next(self, step: Step, ended: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        """
        Begin the next episodes of the rows ``ended``, shape ``(k,)``.

        Put their first observations into ``step.obs``, the final ones into ``infos`` as ``terminal_observation``, and
        the infos of the reset into ``reset_infos``. Return bool ``(k,)``: False where the game continues with the next
        life.
        """

    def reset(self) -> VecEnvObs:
        """Begin an episode in every environment, with the seeds and options of ``seed`` and ``set_options``."""
        seeds = None if None in self._seeds else [seed for seed in self._seeds if seed is not None]
        if not all(_are_equal(options, self._options[0]) for options in self._options):
            raise ValueError(
                "`options` must be the same for all environments here, got different ones. Pass one dict to "
                "set_options."
            )
        obs, infos = self._reset_all(seeds, self._options[0] or None)
        self.reset_infos = self._info_rows(infos, self.num_envs)
        self._reset_seeds()
        self._reset_options()
        self.statistics.restart()
        self._was_reset = True
        return obs  # type: ignore[no-any-return]

    def step_async(self, actions: np.ndarray) -> None:
        """Store the actions of the next step, shape ``(n_envs, ...)``."""
        if not self._was_reset:
            raise RuntimeError("`reset` must be called before `step`. Call reset() once.")
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step all environments. Where an episode ended, the observation is the first one of the next."""
        step = self._step_all(self._actions)
        dones = step.terminated | step.truncated
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(self.num_envs)]
        fill_infos(infos, step.infos, self._UNWANTED_INFOS)
        self.statistics.add(step.true_rewards)
        rewards = np.array(step.rewards, dtype=np.float32)
        if self.clip_rewards:
            np.sign(rewards, out=rewards, where=np.isfinite(rewards))  # training reports the others
        if np.count_nonzero(dones):  # any() is several times slower
            self._end_episodes(step, np.flatnonzero(dones), infos)
        return step.obs, rewards, dones, infos

    def _end_episodes(self, step: Step, ended: np.ndarray, infos: list[dict[str, Any]]) -> None:
        over = self._begin_next(step, ended, infos)
        for index, is_over in zip(ended.tolist(), over.tolist(), strict=True):
            info = infos[index]
            info["TimeLimit.truncated"] = bool(step.truncated[index] and not step.terminated[index])
            if not is_over:
                continue
            episode = self.statistics.finish(index)
            # Keep the statistics of an inner wrapper, which saw the rewards before others changed them.
            if self._adds_statistics and not are_statistics(info.get("episode")):
                info["episode"] = episode
            if self._writer is not None and are_statistics(info.get("episode")):
                row = {key: info["episode"][key] for key in ("r", "l", "t")}
                self._writer.write_row({**row, "total_timesteps": self.statistics.total_timesteps})

    def _info_rows(self, infos: dict[str, Any], n_rows: int) -> list[dict[str, Any]]:
        """Return the infos of a batch as one dict per row."""
        rows: list[dict[str, Any]] = [{} for _ in range(n_rows)]
        fill_infos(rows, infos, self._UNWANTED_INFOS)
        return rows

    def close(self) -> None:
        """Close the environments and the file of statistics."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return an image ``(height, width, 3)`` of each environment, or None unless ``render_mode`` is rgb_array."""
        if self.render_mode != "rgb_array":
            warnings.warn(f"The render mode must be rgb_array for images, got {self.render_mode}.", stacklevel=2)
            return [None] * self.num_envs
        return list(self._render())

    def _render(self) -> Iterable[np.ndarray]:
        return list(self.env.render())

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute that all environments share, once for each of ``indices``."""
        if not hasattr(self.env, attr_name):
            raise AttributeError(f"`{attr_name}` must be an attribute of {_name(self.env)}, got a name that it lacks.")
        value = getattr(self.env, attr_name)
        if isinstance(value, np.ndarray):
            raise AttributeError(
                f"`{attr_name}` must be the same for all environments, got an array of {_name(self.env)}, which has no "
                "separate environments. Read it from `.env`."
            )
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Raise AttributeError, since there are no separate environments."""
        raise AttributeError(
            f"`{attr_name}` must belong to separate environments to be set, got {_name(self.env)}, which has none. Set "
            "it on `.env`, or use gymnasium.make_vec(..., vectorization_mode='sync')."
        )

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Raise AttributeError, since there are no separate environments."""
        raise AttributeError(
            f"`{method_name}` must belong to separate environments to be called, got {_name(self.env)}, which has "
            "none. Call it on `.env`, or use gymnasium.make_vec(..., vectorization_mode='sync')."
        )

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None) -> list[bool]:
        """Return whether each environment is wrapped. ``Monitor`` counts as a wrapper: its statistics are kept."""
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]


def keep_final_obs(infos: list[dict[str, Any]], obs: Any, ended: np.ndarray) -> None:
    """Copy the final observations of the rows that ended into their infos, before new ones replace them."""
    for index in ended.tolist():
        infos[index]["terminal_observation"] = copy_row(obs, index)


class EpisodeStatistics:
    """Running return and length of each environment's episode, as SB3's ``Monitor`` keeps them for one."""

    def __init__(self, n_envs: int) -> None:
        self.started_at = time.time()
        self.returns = np.zeros(n_envs, np.float64)
        self.lengths = np.zeros(n_envs, np.int64)
        self.total_timesteps = 0  # of all environments and episodes

    def restart(self) -> None:
        """Begin a new episode in every environment."""
        self.returns[:] = 0.0
        self.lengths[:] = 0

    def add(self, rewards: np.ndarray) -> None:
        """Add one step of every environment, with true rewards ``(n_envs,)``."""
        self.returns += rewards
        self.lengths += 1
        self.total_timesteps += len(self.lengths)

    def finish(self, index: int) -> dict[str, Any]:
        """End an episode; return ``r``, its return, ``l``, its length in steps of the agent, and ``t``, seconds."""
        episode = {
            "r": round(float(self.returns[index]), 6),
            "l": int(self.lengths[index]),
            "t": round(time.time() - self.started_at, 6),
        }
        self.returns[index] = 0.0
        self.lengths[index] = 0
        return episode


def are_statistics(value: Any) -> bool:
    """Return whether ``info["episode"]`` holds an episode's statistics: an environment may use the key otherwise."""
    return isinstance(value, dict) and {"r", "l", "t"} <= value.keys()


def _are_equal(first: Any, second: Any) -> bool:
    """Return whether options are equal; they may hold arrays, of which `==` returns an array."""
    if first is second:
        return True
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_are_equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and type(first) is type(second):
        return len(first) == len(second) and all(map(_are_equal, first, second))
    if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
        return bool(np.array_equal(first, second))
    return bool(first == second)


def _name(env: Any) -> str:
    return type(getattr(env, "unwrapped", env)).__name__
