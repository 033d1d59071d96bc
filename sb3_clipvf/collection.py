"""Collecting a rollout: the loop over the environments, what they take, and values where episodes were cut off."""

import copy
import os
import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_clipvf.building import leave_out_kl
from sb3_clipvf.common.messages import log, show_messages
from sb3_clipvf.common.nonfinite import is_finite, observations_are_finite
from sb3_clipvf.common.validation import check_int
from sb3_clipvf.engines.interface import Acted, Engine
from sb3_clipvf.engines.recognition import has_own_add
from sb3_clipvf.envs.episode_ends import WAY_OUT, ended_unseen
from sb3_clipvf.envs.shapes import StepCheck
from sb3_clipvf.guards.diagnosis import (
    Fault,
    act_error,
    act_fault,
    find_fault,
    has_finite_statistics,
    observation_fault,
    reads_by_own_code,
    reward_error,
)
from sb3_clipvf.rollout import fit_to_rollout, takes_dist_params

if TYPE_CHECKING:
    from sb3_clipvf.clip_ppo import ClipPPO


class RolloutCollector(OnPolicyAlgorithm):
    """SB3's on-policy algorithm with a loop of its own over the environments, whose policy an engine runs."""

    _engine: Engine | None = None
    # Where the training's TrainingCheckpoint writes, if there is one.
    _checkpoint_folder: os.PathLike[str] | None = None
    # Until an episode is reported, or has ended unseen.
    _may_lose_episodes = True

    @abstractmethod
    def _current_engine(self) -> Engine:
        """The engine for the policy as it is now."""

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        """
        Fill the buffer with steps of the current policy.

        Callbacks see this method's local variables, under SB3's names.

        :param env: The training environments.
        :param callback: Called at each step and at both ends of the rollout.
        :param rollout_buffer: Filled from empty. SB3's buffers and ours are resized to the rollout first.
        :param n_rollout_steps: Steps of each environment.
        :return: False if the callback asked to stop, then the rollout is incomplete.
        """
        started = time.perf_counter()
        n_steps = 0
        with_dist_params = takes_dist_params(rollout_buffer)
        checked = StepCheck(rollout_buffer.observation_space, env.num_envs)
        checked.observations(self._last_obs)
        engine = self._begin_rollout(env, callback, rollout_buffer, n_rollout_steps)
        stores_arrays = not has_own_add(rollout_buffer)
        is_seen = not is_idle(callback)
        # Making tensors takes longer than the policy's forward pass.
        makes_tensors = is_seen or not (stores_arrays and engine.acts_on_arrays)

        while n_steps < n_rollout_steps:
            self._renew_noise(env.num_envs, n_steps)
            obs_tensor = to_tensor(self._last_obs, self.device) if makes_tensors else None
            acted = self._act(engine, obs_tensor, rollout_buffer, with_dist_params)
            actions, values, log_probs, dist_params = acted.as_tensors() if makes_tensors else acted[:4]
            clipped_actions = to_env(self.policy, self.action_space, actions)
            new_obs, rewards, dones, infos = checked(env.step(clipped_actions))
            self.num_timesteps += env.num_envs

            if is_seen:
                callback.update_locals(locals())
            if not callback.on_step():
                # The environments have moved on: a later learn() that continues starts from there.
                self._last_obs, self._last_episode_starts = copy_of(new_obs), dones.copy()
                return False

            self._update_info_buffer(infos, dones)
            n_steps += 1
            if with_dist_params and dist_params is None:
                with_dist_params = False
                leave_out_kl(cast("ClipPPO", self), rollout_buffer)
            if isinstance(self.action_space, spaces.Discrete):
                actions = actions.reshape(-1, 1)
            bootstrapped = bootstrap_truncated(engine, rewards, dones, infos, self.gamma)
            if not is_finite(bootstrapped):
                raise reward_error(self, bootstrapped, locals())
            row = (self._last_obs, actions, bootstrapped, self._last_episode_starts)
            _add(rollout_buffer, row, acted if stores_arrays else None, values, log_probs, dist_params)
            self._last_obs = copy_of(new_obs)
            self._last_episode_starts = dones.copy()

        values = self._complete(engine, rollout_buffer, dones)

        callback.update_locals(locals())
        callback.on_rollout_end()
        self.logger.record("time/rollout_seconds", time.perf_counter() - started)
        return True

    def _begin_rollout(self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int) -> Engine:
        """Empty the buffer, and let callback, policy and engine make ready. :return: The engine that acts."""
        show_messages(self.verbose)
        known = self._engine if self._engine is not None and self._engine.policy is self.policy else None
        (self.policy if known is None else known).set_training_mode(False)
        # Someone may have changed `n_steps` or the number of environments since the buffer was built.
        fit_to_rollout(rollout_buffer, check_int("n_steps", n_rollout_steps, 1, "SB3's default is 2048."), env.num_envs)
        rollout_buffer.reset()
        self._last_obs = copy_of(self._last_obs)
        # Before anything is drawn for this rollout, unlike in SB3: a checkpoint that is taken here holds no part of it.
        callback.on_rollout_start()
        if self.use_sde:
            self.policy.reset_noise(env.num_envs)
        engine = self._current_engine()  # after the callback, which may have changed the policy
        if engine is not known:  # it may know modules that the other one did not
            engine.set_training_mode(False)
        engine.begin_rollout(rollout_buffer)
        return engine

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        if self._engine is not None:
            self._engine.compile_seconds = 0.0  # before the clock starts
        return super()._setup_learn(*args, **kwargs)

    def dump_logs(self, iteration: int = 0) -> None:
        """
        Log the training's progress; ``time/fps`` and ``time/time_elapsed`` count no compilation of kernels.

        :param iteration: Number of rollouts of this call of ``learn``.
        """
        if self._engine is not None:
            self.start_time += int(self._engine.compile_seconds * 1e9)
            self._engine.compile_seconds = 0.0
        super().dump_logs(iteration)

    def _renew_noise(self, n_envs: int, n_steps: int) -> None:
        if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
            self.policy.reset_noise(n_envs)

    def _act(self, engine: Engine, obs_tensor: Any, rollout_buffer: Any, with_dist_params: bool) -> Acted:
        """Let the policy act; refuse what it gives where it is not finite, and the observations that make it so."""
        try:
            rows = self._last_obs if engine.acts_on_arrays else obs_tensor
            acted = engine.act(rows, with_dist_params=with_dist_params)
        except (ValueError, RuntimeError) as error:
            # torch draws from no distribution whose parameters are not finite.
            fault = act_fault(self.policy, self._last_obs, to_tensor(self._last_obs, self.device), None)
            if fault is None:
                raise
            raise act_error(self, fault, rollout_buffer) from error
        finite = acted.is_finite
        if finite is None:
            finite = is_finite(acted.values) and is_finite(acted.log_prob) and self._may_act()
        if not finite:
            fault = act_fault(self.policy, self._last_obs, obs_tensor, acted)
            raise act_error(self, cast(Fault, fault), rollout_buffer)
        return acted

    def _may_act(self) -> bool:
        """Return whether the observations are finite, or what the policy gives for them decides."""
        if observations_are_finite(self._last_obs):
            return True
        return reads_by_own_code(self.policy) and has_finite_statistics(self.get_vec_normalize_env())

    def _complete(self, engine: Engine, rollout_buffer: Any, dones: np.ndarray) -> th.Tensor:
        """Compute returns and advantages. :return: Values of the observations that the next rollout starts from."""
        fault = None if self._may_act() else observation_fault(self._last_obs)
        if fault is None:
            values = engine.predict_values(to_tensor(self._last_obs, self.device))
            fault = find_fault("value", None, values.cpu().numpy().reshape(-1))
            fault = fault and (observation_fault(self._last_obs) or fault)
        if fault is not None:
            raise act_error(self, fault, rollout_buffer)
        with np.errstate(over="ignore", invalid="ignore"):  # the update tells of it by name
            rollout_buffer.compute_returns_and_advantage(last_values=values, dones=dones)
        return values

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        self._checkpoint_folder = None  # a TrainingCheckpoint tells when the training starts
        self._may_lose_episodes = True
        return super()._init_callback(callback, progress_bar)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_checkpoint_folder", "_may_lose_episodes"]

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        # SB3 looks at each environment twice a step; only ends of episodes have something to tell.
        told = [index for index, info in enumerate(infos) if "episode" in info or "is_success" in info]
        if told:
            super()._update_info_buffer([infos[index] for index in told], None if dones is None else dones[told])
        if self._may_lose_episodes and dones is not None and np.count_nonzero(dones):
            self._look_for_lost_episodes(infos, dones)

    def _look_for_lost_episodes(self, infos: list[dict[str, Any]], dones: np.ndarray) -> None:
        """Warn once if episodes end outside of Monitor, until one is reported."""
        for index in np.flatnonzero(dones).tolist():
            unseen = None if "episode" in infos[index] else ended_unseen(cast(VecEnv, self.env), index)
            self._may_lose_episodes = unseen is False
            if unseen:
                log.warning(
                    "A wrapper outside of Monitor, such as TimeLimit, ends episodes that Monitor does not report: "
                    "`rollout/ep_rew_mean` lacks them, and SB3's evaluate_policy would not end. %s",
                    WAY_OUT,
                )
            if not self._may_lose_episodes:
                return


def _add(
    buffer: Any, row: tuple[Any, ...], arrays: Acted | None, values: Any, log_probs: Any, dist_params: Any
) -> None:
    """Store a step: in our buffer from arrays, where given; one with an ``add`` of its own expects SB3's tensors."""
    if arrays is not None:
        buffer.add(*row, *arrays[1:4])
    else:
        more = {} if dist_params is None else {"dist_params": dist_params}
        buffer.add(*row, values, log_probs, **more)


def is_idle(callback: BaseCallback) -> bool:
    """
    Tell whether a callback looks at nothing: what SB3 puts in the place of None, or a list of such.

    :param callback: Of a training.
    :return: Whether nobody will see the local variables of a step.
    """
    if type(callback) is CallbackList:
        return all(is_idle(child) for child in callback.callbacks)
    return type(callback) is ConvertCallback and callback.callback is None


def to_tensor(observations: Any, device: th.device) -> Any:
    """
    Turn observations into tensors that share their memory where they can.

    :param observations: An array, or a dict of such.
    :param device: Where they are needed.
    :return: A tensor, or a dict of such.
    """
    if device.type == "cpu" and type(observations) is np.ndarray:
        return th.from_numpy(observations)  # a third of the time of SB3's way
    return obs_as_tensor(observations, device)


def to_env(policy: ActorCriticPolicy, action_space: spaces.Space[Any], actions: np.ndarray) -> np.ndarray:
    """
    Turn the policy's actions into what the environments take; log-probs and the buffer keep the policy's own.

    :param policy: Says whether it squashes its actions.
    :param action_space: Of one environment.
    :param actions: Shape ``(n_envs, ...)``.
    :return: Scaled from [-1, 1] where the policy squashes, else clipped to the bounds of a Box.
    """
    if not isinstance(action_space, spaces.Box):
        return actions
    if policy.squash_output:
        return np.asarray(policy.unscale_action(actions))
    # In a third of the time of clip(), with the same results.
    bounded: np.ndarray = np.minimum(np.maximum(actions, action_space.low), action_space.high)
    return bounded


def copy_of(observations: Any) -> Any:
    """
    Copy observations, since some VecEnvs write the next step into the same arrays.

    :param observations: An array, or a dict or tuple of such.
    :return: The same with memory of its own.
    """
    # In the same layout of memory, since sums in another order round differently.
    return observations.copy("K") if isinstance(observations, np.ndarray) else copy.deepcopy(observations)


def bootstrap_truncated(
    engine: Engine, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]], gamma: float
) -> np.ndarray:
    """
    Add gamma * V(final observation) where an episode was cut off rather than ended, by one forward pass for all.

    :param engine: Gives the values.
    :param rewards: Of this step, shape ``(n_envs,)``; left as they are, since callbacks read them.
    :param dones: Whether an episode was cut off or ended, shape ``(n_envs,)``.
    :param infos: One dict an environment, with SB3's ``TimeLimit.truncated`` and ``terminal_observation``.
    :param gamma: Discount factor.
    :return: A copy with the values added, or ``rewards`` itself where nothing was cut off; NaN where a final
        observation is not finite, unless the policy reads it by code of its own and gives a finite value.
    Source: Pardo et al. 2018, arXiv 1712.00378.
    """
    if not np.count_nonzero(dones):  # any() takes several times as long
        return rewards
    truncated = [
        index
        for index in np.flatnonzero(dones)
        if infos[index].get("TimeLimit.truncated", False) and infos[index].get("terminal_observation") is not None
    ]
    if not truncated:
        return rewards
    final_obs: Any = [infos[index]["terminal_observation"] for index in truncated]
    space = engine.policy.observation_space
    if isinstance(space, spaces.Dict):
        stacked: Any = {key: _stacked(part, [obs[key] for obs in final_obs]) for key, part in space.spaces.items()}
    else:
        stacked = _stacked(space, final_obs)
    # Environments may give integers, which cannot hold the values.
    bootstrapped = rewards.astype(np.result_type(rewards, np.float32))
    if not (observations_are_finite(stacked) or reads_by_own_code(engine.policy)):
        bootstrapped[truncated] = np.nan  # whatever a network would make of them
        return bootstrapped
    final_values = engine.predict_values(engine.policy.obs_to_tensor(stacked)[0])
    bootstrapped[truncated] += gamma * final_values.cpu().numpy().reshape(-1)
    return bootstrapped


def _stacked(space: spaces.Space[Any], rows: list[Any]) -> np.ndarray:
    # Environments may give leading axes of length 1 beside those of the space.
    return np.stack([np.reshape(row, space.shape or ()) for row in rows])
