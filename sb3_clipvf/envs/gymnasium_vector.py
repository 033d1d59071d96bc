"""SB3's ``VecEnv`` over gymnasium's ``VectorEnv`` in its three autoreset modes, including ale-py's class."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers import RecordEpisodeStatistics as RecordStatisticsOfOne
from gymnasium.wrappers.vector import NormalizeObservation, NormalizeReward, RecordEpisodeStatistics
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from sb3_clipvf.envs.rows import copy_batch, copy_row, fill_infos, put_rows, same, take_rows
from sb3_clipvf.envs.vector import BatchedVecEnv, Step, are_statistics, keep_final_obs

# Wrappers that lose the state of all rows when one row is reset (Gymnasium 1.4).
_FORGETFUL_WRAPPERS = (NormalizeObservation, NormalizeReward, RecordEpisodeStatistics)

_MODE_HINT = "Create it with autoreset_mode=AutoresetMode.SAME_STEP"


class GymnasiumVecEnv(BatchedVecEnv):
    """
    SB3's ``VecEnv`` over a ``VectorEnv``, wrapped or not.

    SAME_STEP resets rows within the step and returns the final observations in the infos. In the other two modes the
    adapter resets only the rows that ended, by ``reset(options={"reset_mask": mask})`` right after the step. In
    NEXT_STEP mode this replaces the pending reset, for which the next step would return no transition.
    """

    _UNWANTED_INFOS = frozenset({"final_obs", "final_info"})

    def __init__(self, env: VectorEnv[Any, Any, Any], **kwargs: Any) -> None:
        self.autoreset_mode = _autoreset_mode(env)
        # Classes whose masked reset is known to keep the other rows; any other class is checked.
        self._masks_reset = type(env) in (SyncVectorEnv, AsyncVectorEnv)
        if self.autoreset_mode is not AutoresetMode.SAME_STEP:
            _refuse_forgetful(env)
        super().__init__(env, env.num_envs, env.single_observation_space, env.single_action_space, **kwargs)

    def _reset_all(self, seeds: list[int] | None, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        obs, infos = self.env.reset(seed=None if seeds is None else self._seed_argument(seeds), options=options)
        _check_infos(infos)
        return copy_batch(self.observation_space, obs), infos

    def _seed_argument(self, seeds: list[int]) -> Any:
        # The interface of VectorEnv has one seed for all.
        return seeds[0]

    def _step_all(self, actions: np.ndarray) -> Step:
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        _check_infos(infos)
        rewards = np.asarray(rewards)
        return Step(
            copy_batch(self.observation_space, obs),
            rewards,
            rewards,
            np.array(terminated, dtype=bool),
            np.array(truncated, dtype=bool),
            infos,
        )

    def _begin_next(self, step: Step, ended: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            self._sort_infos(step, ended, infos)
        else:
            keep_final_obs(infos, step.obs, ended)
            first_obs, batch_infos = self._reset_rows(step, ended)
            put_rows(step.obs, ended, first_obs)
            reset_infos = self._info_rows(batch_infos, self.num_envs)
            for index in ended.tolist():
                self.reset_infos[index] = reset_infos[index]
        return np.ones(len(ended), dtype=bool)

    def _sort_infos(self, step: Step, ended: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """Sort the infos of a SAME_STEP reset: those of the step into ``infos``, the others into ``reset_infos``."""
        final_obs = step.infos.get("final_obs")
        if final_obs is None:
            raise RuntimeError(
                f"{type(self.env).__name__} must put `final_obs` into the infos of steps that end an episode, since "
                "its metadata has AutoresetMode.SAME_STEP, got none. The class or one of its wrappers is at fault."
            )
        final_infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        fill_infos(final_infos, step.infos.get("final_info", {}))
        for index in ended.tolist():
            # The infos at this row belong to the first observation of the next episode.
            reset_info = infos[index]
            infos[index] = {"TimeLimit.truncated": False, **final_infos[index]}
            infos[index]["terminal_observation"] = self._final_row(final_obs, index)
            reset_info.pop("TimeLimit.truncated")
            if are_statistics(reset_info.get("episode")):
                # Gymnasium's RecordEpisodeStatistics adds them outside of `final_info`.
                infos[index]["episode"] = reset_info.pop("episode")
            self.reset_infos[index] = reset_info

    def _final_row(self, final_obs: Any, index: int) -> Any:
        # Sync and Async: an array of objects, one observation each. Others may return a batch like `obs`.
        row = final_obs[index] if isinstance(final_obs, np.ndarray) else copy_row(final_obs, index)
        return copy_row(copy_batch(self.observation_space, _batch_of_one(row)), 0)

    def _reset_rows(self, step: Step, ended: np.ndarray) -> tuple[Any, dict[str, Any]]:
        """Reset the rows that ended; return their first observations, and the infos of the batch."""
        if len(ended) == self.num_envs:
            obs, infos = self.env.reset()
            return obs, infos
        mask = np.zeros(self.num_envs, dtype=bool)
        mask[ended] = True
        obs, infos = self.env.reset(options={"reset_mask": mask.copy()})
        # Compare in the space's dtypes, which `step.obs` has.
        if not self._masks_reset and not same(
            take_rows(copy_batch(self.observation_space, obs), ~mask), take_rows(step.obs, ~mask)
        ):
            raise ValueError(
                "`env` must reset only the rows of `options['reset_mask']`, got a "
                f"{type(self.env.unwrapped).__name__} that changes others too. {_MODE_HINT} if supported, or use "
                "gymnasium.make_vec(..., vectorization_mode='sync'). On the command line, omit `--vec-env gymnasium`."
            )
        return take_rows(obs, ended), infos


class SeparateVecEnv(GymnasiumVecEnv):
    """
    SB3's ``VecEnv`` over ``SyncVectorEnv`` and ``AsyncVectorEnv``, whose environments can be reached one by one.

    Episode statistics of SB3's ``Monitor`` or gymnasium's ``RecordEpisodeStatistics`` in the environments are passed
    on: below other wrappers these see true rewards and whole games.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], **kwargs: Any) -> None:
        core: Any = env.unwrapped
        self._core = core
        super().__init__(env, **kwargs)
        if (
            isinstance(core, AsyncVectorEnv)
            and self.autoreset_mode is AutoresetMode.NEXT_STEP
            and not core.shared_memory
        ):
            # Its workers drop a pending reset only with shared memory (Gymnasium 1.4).
            raise ValueError(
                "`shared_memory` must be True for an AsyncVectorEnv in NEXT_STEP mode, got False, with which it "
                f"resets rows twice. {_MODE_HINT}, or with shared memory."
            )
        self._adds_statistics = not _all_report_episodes(core)

    def _seed_argument(self, seeds: list[int]) -> Any:
        return seeds

    def has_attr(self, attr_name: str) -> bool:
        """Return whether all environments have an attribute."""
        if not isinstance(self._core, AsyncVectorEnv):
            return super().has_attr(attr_name)
        return all(self._core.call("has_wrapper_attr", attr_name))

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of each environment; worker processes send copies."""
        if not isinstance(self._core, AsyncVectorEnv):
            return [self._core.envs[index].get_wrapper_attr(attr_name) for index in self._get_indices(indices)]
        # An error in a worker process ends it.
        if not self.has_attr(attr_name):
            raise AttributeError(f"`{attr_name}` must be an attribute of all environments, got one that some lack.")
        try:
            # Its own get_attr calls an attribute that is callable.
            values = self._core.call("get_wrapper_attr", attr_name)
        except Exception as error:
            raise RuntimeError(
                f"`{attr_name}` must be an attribute that worker processes can send, got {type(error).__name__}: "
                f"{error}, which ended the processes of the AsyncVectorEnv. Use a SyncVectorEnv."
            ) from error
        return [values[index] for index in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of environments to the same value."""
        if not isinstance(self._core, AsyncVectorEnv):
            for index in self._get_indices(indices):
                self._core.envs[index].set_wrapper_attr(attr_name, value)
            return
        chosen = {range(self.num_envs)[index] for index in self._get_indices(indices)}
        if len(chosen) == self.num_envs:
            self._core.set_attr(attr_name, [value] * self.num_envs)
            return
        self._core.call("has_wrapper_attr", attr_name)  # raises if a step is pending
        # Its own set_attr needs values for the other environments, too, and those that can be read are copies.
        pipes = [self._core.parent_pipes[index] for index in sorted(chosen)]
        for pipe in pipes:
            pipe.send(("_setattr", (attr_name, value)))
        successes = [pipe.recv()[1] for pipe in pipes]
        self._core._raise_if_errors(successes + [True] * (self.num_envs - len(pipes)))

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of each environment; an ``AsyncVectorEnv`` calls it in all of them only."""
        chosen = list(self._get_indices(indices))
        if not isinstance(self._core, AsyncVectorEnv):
            methods: list[Callable[..., Any]] = [self._core.envs[i].get_wrapper_attr(method_name) for i in chosen]
            return [method(*method_args, **method_kwargs) for method in methods]
        if chosen != list(range(self.num_envs)):
            raise ValueError(
                f"`indices` must be None for an AsyncVectorEnv, which calls {method_name} in all environments, got "
                f"{chosen}. Use a SyncVectorEnv, or SB3's SubprocVecEnv."
            )
        # `call` would take the method's argument `name` for its own.
        self._core.call_async(method_name, *method_args, **method_kwargs)
        return list(self._core.call_wait())

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None) -> list[bool]:
        """Return whether each environment is wrapped. ``Monitor`` counts as a wrapper: its statistics are kept."""
        chosen = list(self._get_indices(indices))
        if wrapper_class is Monitor:
            return [True] * len(chosen)
        if isinstance(self._core, AsyncVectorEnv):
            raise ValueError(
                f"`wrapper_class` must be Monitor for an AsyncVectorEnv, got {wrapper_class.__name__}, which cannot be "
                "found in worker processes. Use a SyncVectorEnv."
            )
        return [is_wrapped(self._core.envs[index], wrapper_class) for index in chosen]


class CartPoleVecEnv(GymnasiumVecEnv):
    """
    SB3's ``VecEnv`` over ``CartPoleVectorEnv``, which ``make_vec("CartPole-v1")`` creates.

    It has NEXT_STEP mode only, and no masked reset, but its state is accessible. Rows that ended get a new state, drawn
    as its own next step would draw it.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], **kwargs: Any) -> None:
        if isinstance(env, VectorWrapper):
            raise ValueError(
                f"`env` must be a CartPoleVectorEnv without wrappers, got it inside {type(env).__name__}, since it "
                "cannot reset single rows through them. Use gymnasium.make_vec(..., vectorization_mode='sync')."
            )
        super().__init__(env, **kwargs)

    def _reset_rows(self, step: Step, ended: np.ndarray) -> tuple[Any, dict[str, Any]]:
        env = self.env
        state = env.np_random.uniform(low=env.low, high=env.high, size=(4, len(ended)))
        env.state[:, ended] = state
        env.steps[ended] = 0
        env.prev_done[ended] = False
        return state.T, {}


class AtariVecEnv(GymnasiumVecEnv):
    """
    SB3's ``VecEnv`` over ale-py's ``AtariVectorEnv``.

    With ``life_loss_info=True`` a lost life ends a row while the game continues, as with SB3's ``EpisodicLifeEnv``;
    ``info["episode"]`` comes when the game ends. Only the infos of SAME_STEP mode distinguish the two ends. With
    ``reward_clipping=True``, its default, the true rewards are lost: create it with False, and this adapter with
    ``clip_rewards=True``.
    """

    _UNWANTED_INFOS = frozenset({"final_obs", "final_info", "env_id"})

    def __init__(self, env: VectorEnv[Any, Any, Any], **kwargs: Any) -> None:
        core: Any = env.unwrapped
        if core.batch_size != core.num_envs:
            raise ValueError(
                f"`batch_size` must be `num_envs` or 0, got {core.batch_size} of {core.num_envs}: SB3 steps all "
                "environments together. Omit it."
            )
        super().__init__(env, **kwargs)
        self._masks_reset = self._masks_reset or type(env) is type(core)
        self._earlier_frames = np.zeros(self.num_envs, np.int64)
        if core.spec is not None and core.spec.kwargs.get("reward_clipping", True):
            warnings.warn(
                "AtariVectorEnv clips rewards, so the returns in info['episode'] are those of clipped ones. Create "
                "it with reward_clipping=False, and call as_vec_env with clip_rewards=True.",
                stacklevel=3,
            )

    def _seed_argument(self, seeds: list[int]) -> Any:
        # Seeds must fit an int32, and negative ones mean none.
        return np.array([seed % 2**31 for seed in seeds], np.int64)

    def _reset_all(self, seeds: list[int] | None, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        obs, infos = super()._reset_all(seeds, options)
        self._earlier_frames = _earlier_frames(infos)
        return obs, infos

    def _begin_next(self, step: Step, ended: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            earlier_frames = _earlier_frames(step.infos)
            over: np.ndarray = earlier_frames[ended] != self._earlier_frames[ended]
            self._earlier_frames = earlier_frames
            if over.any():
                self._sort_infos(step, ended[over], infos)
            keep_final_obs(infos, step.obs, ended[~over])
            return over
        if np.any(step.terminated[ended] & (np.asarray(step.infos["lives"])[ended] > 0)):
            raise ValueError(
                "`autoreset_mode` must be SAME_STEP if episodes end with lives left (`life_loss_info`, "
                "`episodic_life`), got NEXT_STEP, which does not report whether the game continues. Create the "
                "environment with autoreset_mode='SameStep'."
            )
        return super()._begin_next(step, ended, infos)


def _check_infos(infos: Any) -> None:
    """Raise TypeError if a wrapper has converted the infos of the batch, as Gymnasium's ``DictInfoToList`` does."""
    if not isinstance(infos, Mapping):
        raise TypeError(
            f"`env` must return infos as one dict of the batch, got a value of type {type(infos).__name__}. Omit "
            "wrappers that convert infos, such as DictInfoToList: the adapter returns one dict per environment."
        )


def _earlier_frames(infos: dict[str, Any]) -> np.ndarray:
    """Return the number of frames of earlier games, which changes only when a game ends."""
    return np.array(infos["frame_number"], np.int64) - np.array(infos["episode_frame_number"], np.int64)


def _autoreset_mode(env: VectorEnv[Any, Any, Any]) -> AutoresetMode:
    core = env.unwrapped
    mode = getattr(core, "autoreset_mode", None)
    # AtariVectorEnv writes its mode into the dict that all classes without their own metadata share.
    if mode is None and core.metadata is not VectorEnv.metadata:
        mode = env.metadata.get("autoreset_mode")
    if not isinstance(mode, AutoresetMode):
        raise ValueError(
            f"`env.metadata['autoreset_mode']` must be an AutoresetMode, got {mode!r} in {type(core).__name__}. Set it "
            "to the mode of the class."
        )
    return mode


def _all_report_episodes(core: Any) -> bool:
    """Return whether a wrapper of each environment puts the statistics of episodes into ``info["episode"]``."""
    if not isinstance(core, AsyncVectorEnv):
        return all(map(_reports_episodes, core.envs))

    def has(*names: str) -> bool:
        return all(all(core.call("has_wrapper_attr", name)) for name in names)

    # Classes of wrappers in a worker cannot be read, and one name may be an environment's own.
    if has("current_reset_info", "info_keywords", "results_writer"):
        return True  # Monitor
    return has("_stats_key", "return_queue", "time_queue") and set(core.get_attr("_stats_key")) == {"episode"}


def _reports_episodes(env: gym.Env[Any, Any]) -> bool:
    while isinstance(env, gym.Wrapper):
        if isinstance(env, Monitor) or (isinstance(env, RecordStatisticsOfOne) and env._stats_key == "episode"):
            return True
        env = env.env
    return False


def _refuse_forgetful(env: VectorEnv[Any, Any, Any]) -> None:
    while isinstance(env, VectorWrapper):
        if isinstance(env, _FORGETFUL_WRAPPERS):
            raise ValueError(
                f"`env` must not be wrapped in {type(env).__name__} in this autoreset mode: a reset of one row resets "
                "the wrapper's state of all rows. Omit it: the adapter keeps episode statistics, and SB3's "
                "VecNormalize normalises."
            )
        env = env.env


def _batch_of_one(row: Any) -> Any:
    if isinstance(row, dict):
        return {key: _batch_of_one(part) for key, part in row.items()}
    if isinstance(row, tuple):
        return tuple(_batch_of_one(part) for part in row)
    return np.asarray(row)[None]
