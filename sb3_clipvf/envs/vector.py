"""What all adapters to SB3's ``VecEnv`` share: steps, infos and episodes, seeds, options, attributes."""

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_clipvf.envs.episodes import EpisodeFile, EpisodeStatistics, are_statistics
from sb3_clipvf.envs.rows import fill_infos


class Step(NamedTuple):
    """
    What all environments answered to one action each.

    :param obs: Observations ``(n_envs, ...)`` that belong to the adapter.
    :param rewards: As the algorithm shall see them, before clipping, shape ``(n_envs,)``.
    :param true_rewards: As the statistics count them, shape ``(n_envs,)``.
    :param terminated: bool ``(n_envs,)``.
    :param truncated: bool ``(n_envs,)``.
    :param infos: Of the batch, in Gymnasium's form.
    """

    obs: Any
    rewards: np.ndarray
    true_rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    infos: dict[str, Any]


class BatchedVecEnv(VecEnv):
    """
    SB3's ``VecEnv`` over one object that steps all environments.

    A subclass says how to begin (:meth:`_begin`), to step (:meth:`_advance`) and to go on after an episode's end
    (:meth:`_renew`). Python work for single environments is done only where an episode ended or there are infos.

    :param env: The object.
    :param n_envs: Number of environments in it.
    :param observation_space: Of one environment.
    :param action_space: Of one environment.
    :param clip_rewards: Give the algorithm the sign of each reward.
    :param monitor_path: File for the episodes' statistics, or None.
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
        self._keeps_statistics = True
        self._file = None
        self._actions: Any = None
        self._was_reset = False
        super().__init__(n_envs, observation_space, action_space)
        if monitor_path is not None:
            self._file = EpisodeFile(monitor_path, self.statistics.started_at, _env_id(env))

    @abstractmethod
    def _begin(self, seeds: list[int] | None, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        """
        Reset all environments.

        :param seeds: One an environment; None continues the random streams.
        :param options: For all of them, or None.
        :return: Observations ``(n_envs, ...)`` that belong to the adapter, and infos of the batch.
        """

    @abstractmethod
    def _advance(self, actions: np.ndarray) -> Step:
        """
        Step all environments.

        :param actions: Shape ``(n_envs, ...)``.
        :return: Their answers.
        """

    @abstractmethod
    def _renew(self, step: Step, ended: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        """
        Put ``terminal_observation`` into the infos of the rows that ended, their first observations into ``step.obs``
        and their infos of the reset into ``reset_infos``.

        :param step: Of which some rows ended.
        :param ended: Their indices, shape ``(k,)``, at least one.
        :param infos: One dict an environment, to be completed.
        :return: bool ``(k,)``: False where the row ended but its game goes on with the next life.
        """

    def reset(self) -> VecEnvObs:
        """
        Begin an episode in every environment, with what ``seed`` and ``set_options`` were given.

        :return: Observations ``(n_envs, ...)``.
        """
        seeds = None if None in self._seeds else [seed for seed in self._seeds if seed is not None]
        if any(options != self._options[0] for options in self._options):
            raise ValueError(
                "`options` must be the same for all environments here, got different ones. Give set_options one dict."
            )
        obs, infos = self._begin(seeds, self._options[0] or None)
        self.reset_infos = [{} for _ in range(self.num_envs)]
        fill_infos(self.reset_infos, infos, self._UNWANTED_INFOS)
        self._reset_seeds()
        self._reset_options()
        self.statistics.restart()
        self._was_reset = True
        return obs  # type: ignore[no-any-return]

    def step_async(self, actions: np.ndarray) -> None:
        """
        Take the actions of the next step.

        :param actions: Shape ``(n_envs, ...)``.
        :raises RuntimeError: Before the first reset.
        """
        if not self._was_reset:
            raise RuntimeError("`reset` must be called before `step`, got no call of it. Call reset() once.")
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """
        Step all environments.

        :return: Observations ``(n_envs, ...)``, the first of a new episode where one ended; rewards, float32
            ``(n_envs,)``; whether an episode ended, bool ``(n_envs,)``; one dict an environment.
        """
        step = self._advance(self._actions)
        dones = step.terminated | step.truncated
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(self.num_envs)]
        fill_infos(infos, step.infos, self._UNWANTED_INFOS)
        self.statistics.add(step.true_rewards)
        rewards = np.array(step.rewards, dtype=np.float32)
        if self.clip_rewards:
            np.sign(rewards, out=rewards)
        if np.count_nonzero(dones):  # any() takes several times as long
            self._end_episodes(step, np.flatnonzero(dones), infos)
        return step.obs, rewards, dones, infos

    def _end_episodes(self, step: Step, ended: np.ndarray, infos: list[dict[str, Any]]) -> None:
        over = self._renew(step, ended, infos)
        for index, is_over in zip(ended.tolist(), over.tolist(), strict=True):
            info = infos[index]
            info["TimeLimit.truncated"] = bool(step.truncated[index] and not step.terminated[index])
            if not is_over:
                continue
            episode = self.statistics.finish(index)
            # Statistics that a wrapper inside took below changes of the reward are the truer ones.
            if self._keeps_statistics and not are_statistics(info.get("episode")):
                info["episode"] = episode
            if self._file is not None and are_statistics(info.get("episode")):
                self._file.write(info["episode"])

    def close(self) -> None:
        """Close the environments and the file of statistics."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """
        Draw the environments.

        :return: One image ``(height, width, 3)`` an environment; None for each, with a warning, where ``render_mode``
            is not ``rgb_array``.
        """
        if self.render_mode != "rgb_array":
            warnings.warn(f"The render mode must be rgb_array for images, got {self.render_mode}.", stacklevel=2)
            return [None] * self.num_envs
        return list(self._render())

    def _render(self) -> Iterable[np.ndarray]:
        images: Iterable[np.ndarray] = self.env.render()
        return images

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        Read an attribute that all environments share.

        :param attr_name: Its name.
        :param indices: Which environments; None: all.
        :return: The value, once for each of them.
        :raises AttributeError: If there is none, or it is an array with all environments' values.
        """
        if not hasattr(self.env, attr_name):
            raise AttributeError(f"`{attr_name}` must be an attribute of {_name(self.env)}, got one that it lacks.")
        value = getattr(self.env, attr_name)
        if isinstance(value, np.ndarray):
            raise AttributeError(
                f"`{attr_name}` must be the same for all environments, got an array of {_name(self.env)}, which has no "
                "separate environments. Read it at `.env`."
            )
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """
        Refuse, as there are no separate environments.

        :param attr_name: Attribute.
        :param value: Its value.
        :param indices: Which environments.
        :raises AttributeError: Always.
        """
        raise AttributeError(
            f"`{attr_name}` must belong to separate environments to be set, got {_name(self.env)}, which has none. Set "
            "it at `.env`, or use gymnasium.make_vec(..., vectorization_mode='sync')."
        )

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """
        Refuse, as there are no separate environments.

        :param method_name: Method.
        :param method_args: Its arguments.
        :param indices: Which environments.
        :param method_kwargs: Its keyword arguments.
        :raises AttributeError: Always.
        """
        raise AttributeError(
            f"`{method_name}` must belong to separate environments to be called, got {_name(self.env)}, which has "
            "none. Call it at `.env`, or use gymnasium.make_vec(..., vectorization_mode='sync')."
        )

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None) -> list[bool]:
        """
        Tell whether environments are wrapped. ``Monitor`` counts as a wrapper, since its statistics are kept.

        :param wrapper_class: Class of the wrapper.
        :param indices: Which environments; None: all.
        :return: One bool for each of them.
        """
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]


def _name(env: Any) -> str:
    return type(getattr(env, "unwrapped", env)).__name__


def _env_id(env: Any) -> str:
    return str(getattr(getattr(env, "spec", None), "id", None) or _name(env))
