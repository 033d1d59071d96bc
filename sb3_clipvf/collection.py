"""
The loop over the environments: acting, bootstrapping truncated episodes, and the buffer that holds a rollout.

``RolloutCollector`` is the base of ``ClipPPO``: SB3's ``OnPolicyAlgorithm`` with a loop and a buffer of its own.
"""

import os
import time
from abc import abstractmethod
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_clipvf.arguments import discounts
from sb3_clipvf.common.messages import log, show_messages
from sb3_clipvf.common.nonfinite import NonFiniteError, is_finite, observations_are_finite
from sb3_clipvf.common.tensors import to_tensor
from sb3_clipvf.common.validation import check_int, same_spaces
from sb3_clipvf.distributions import dist_param_dim
from sb3_clipvf.engines.callback_access import is_noop, may_read_actions
from sb3_clipvf.engines.env_actions import env_actions
from sb3_clipvf.engines.interface import Acted, Engine
from sb3_clipvf.engines.recognition import has_own_add
from sb3_clipvf.engines.rollout_writer import RolloutWriter, writer_for
from sb3_clipvf.envs.episode_ends import MONITOR_ADVICE, UnreportedEnd, unreported_end
from sb3_clipvf.envs.faster import faster_step
from sb3_clipvf.envs.rows import copy_of, stack_rows, truncated_rows
from sb3_clipvf.envs.shapes import StepCheck
from sb3_clipvf.guards.diagnosis import (
    Fault,
    FaultContext,
    act_fault,
    find_fault,
    has_finite_statistics,
    observation_fault,
    reads_by_own_code,
    reward_fault,
    step_error,
)
from sb3_clipvf.rollout import (
    TensorRolloutBuffer,
    fit_to_rollout,
    has_dist_params,
    is_known_class,
    space_of_rows,
    stored_observation_space,
    takes_dist_params,
)


class RolloutCollector(OnPolicyAlgorithm):
    """SB3's on-policy algorithm whose policy acts through an engine, in a loop and with a buffer of its own."""

    rollout_buffer: Any
    _engine: Engine | None = None
    # Set by the run's TrainingCheckpoint, if there is one.
    _checkpoint_folder: os.PathLike[str] | None = None
    # True until Monitor has reported an episode or missed one.
    _may_lose_episodes = True
    _warned_of_missing_kl = False
    _n_envs_elsewhere = 0  # environments in other processes of the run
    _discounts: dict[str, float]  # `gamma` and `gae_lambda` when model and buffer last had the same

    @abstractmethod
    def _current_engine(self) -> Engine:
        """Return the engine for the policy as it is now."""

    @abstractmethod
    def _argument_that_needs_kl(self) -> str | None:
        """Return the name of the first argument that needs the exact KL(pi_old || pi), or None."""

    # ------------------------------------------------------------------ rollout

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        """
        Fill the buffer with steps of the current policy.

        Callbacks see this method's local variables, under SB3's names.

        :param env: The training environments.
        :param callback: Callback, called at each step and at both ends of the rollout.
        :param rollout_buffer: Buffer to fill. SB3's buffers and ours are resized to the rollout first.
        :param n_rollout_steps: Steps of each environment.
        :return: False if the callback asked to stop; the rollout is then incomplete.
        :raises NonFiniteError: If observations, rewards, values or log-probabilities are not finite.
        :raises RuntimeError: If the environments have not been reset.
        """
        self._check_was_reset()
        started = time.perf_counter()
        n_steps = 0
        with_dist_params = takes_dist_params(rollout_buffer)
        check_step = StepCheck(space_of_rows(rollout_buffer, self._stored_space()), env.num_envs)
        check_step.observations(self._last_obs)
        engine = self._begin_rollout(env, callback, rollout_buffer, n_rollout_steps)
        gamma = self.gamma  # the buffer's, until the next rollout
        stores_arrays = not has_own_add(rollout_buffer)
        has_callback, shows_actions = not is_noop(callback), may_read_actions(callback)
        # Creating tensors takes longer than the policy's forward pass.
        makes_tensors = shows_actions or not (stores_arrays and engine.acts_on_arrays)
        # Callbacks may change what they read before it is stored.
        writer = None if shows_actions else writer_for(engine, rollout_buffer, self.action_space)

        step_envs = faster_step(env)
        while n_steps < n_rollout_steps:
            self._renew_noise(env.num_envs, n_steps)
            if writer is None:
                obs_tensor = to_tensor(self._last_obs, self.device) if makes_tensors else None
                acted = self._act(engine, obs_tensor, rollout_buffer, with_dist_params)
                actions, values, log_probs, dist_params, *_ = acted.as_tensors() if makes_tensors else acted
                clipped_actions = env_actions(self.policy, self.action_space, actions)
            else:
                clipped_actions = self._act_by_writer(writer, rollout_buffer)
            new_obs, rewards, dones, infos = check_step(step_envs(clipped_actions))
            self.num_timesteps += env.num_envs + self._n_envs_elsewhere

            if has_callback:
                callback.update_locals(locals())
            if not callback.on_step():
                # The environments have stepped: a later learn() that continues must start from there.
                self._last_obs, self._last_episode_starts = copy_of(new_obs), dones.copy()
                return False

            self._update_info_buffer(infos, dones)
            n_steps += 1
            acted_values = writer.values if writer else acted.values
            bootstrapped = bootstrap_truncated(engine, rewards, dones, infos, gamma, acted_values)
            if not is_finite(bootstrapped):
                raise self._reward_error(bootstrapped, n_steps - 1, {**locals(), **(writer.row() if writer else {})})
            if writer is None:
                with_dist_params = dist_params is not None
                if isinstance(self.action_space, spaces.Discrete):
                    actions = actions.reshape(-1, 1)
                row = (self._last_obs, actions, bootstrapped, self._last_episode_starts)
                if stores_arrays:
                    rollout_buffer.add(*row, acted.values, acted.log_prob, acted.dist_params)
                else:
                    _add_sb3_tensors(rollout_buffer, row, values, log_probs, dist_params)
            else:
                writer.add(self._last_obs, bootstrapped, self._last_episode_starts)
            self._last_obs = copy_of(new_obs)
            self._last_episode_starts = dones.copy()

        values = self._compute_returns(engine, rollout_buffer, dones)

        callback.update_locals(locals())
        callback.on_rollout_end()
        self.logger.record("time/rollout_seconds", time.perf_counter() - started)
        return True

    def _check_was_reset(self) -> None:
        if self._last_obs is None:
            raise RuntimeError(
                "`env` must be reset by the model before `collect_rollouts`, got no observation. Call `learn`, which "
                "resets it and collects."
            )

    def _begin_rollout(self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int) -> Engine:
        """Empty the buffer, prepare callback, policy and engine, and return the engine that acts."""
        show_messages(self.verbose)
        known = self._engine if self._engine is not None and self._engine.policy is self.policy else None
        (self.policy if known is None else known).set_training_mode(False)
        # `n_steps` or the number of environments may have changed since the buffer was built.
        fit_to_rollout(rollout_buffer, check_int("n_steps", n_rollout_steps, 1, "SB3's default is 2048."), env.num_envs)
        rollout_buffer.reset()
        self._last_obs = copy_of(self._last_obs)
        # SB3 draws noise before this call. Here the call comes first: a checkpoint then holds nothing of this rollout.
        callback.on_rollout_start()
        if self.use_sde:
            self.policy.reset_noise(env.num_envs)
        engine = self._current_engine()  # after the callback, which may have changed the policy
        agreed = discounts(vars(self), rollout_buffer, self._discounts)
        for values in (self._discounts, vars(self), vars(rollout_buffer)):
            values.update(agreed)
        if engine is not known:  # the mode was set above without it
            engine.set_training_mode(False)
        engine.begin_rollout(rollout_buffer)
        return engine

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        # Kernels are loaded or compiled before the clock starts.
        faster_step(cast(VecEnv, self.env))
        if self._engine is not None:
            self._engine.compile_seconds = 0.0
        return super()._setup_learn(*args, **kwargs)

    def dump_logs(self, iteration: int = 0) -> None:
        """
        Log the progress of the training. ``time/fps`` and ``time/time_elapsed`` exclude the compilation of kernels.

        :param iteration: Number of rollouts in this call of ``learn``.
        """
        if self._engine is not None:
            self.start_time += int(self._engine.compile_seconds * 1e9)
            self._engine.compile_seconds = 0.0
        super().dump_logs(iteration)

    def _renew_noise(self, n_envs: int, n_steps: int) -> None:
        if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
            self.policy.reset_noise(n_envs)

    def _act(self, engine: Engine, obs_tensor: Any, rollout_buffer: Any, with_dist_params: bool) -> Acted:
        """Sample actions from the policy, and raise if observations, values or log-probabilities are not finite."""
        try:
            rows = self._last_obs if engine.acts_on_arrays else obs_tensor
            acted = engine.act(rows, with_dist_params=with_dist_params)
        except (ValueError, RuntimeError) as error:
            # torch refuses to sample from a distribution whose parameters are not finite.
            fault = act_fault(self.policy, self._last_obs, to_tensor(self._last_obs, self.device), None)
            if fault is None:
                raise
            raise self._act_error(fault, rollout_buffer) from error
        finite = acted.is_finite
        if finite is None:
            finite = is_finite(acted.values) and is_finite(acted.log_prob) and self._may_act()
        if not finite:
            fault = act_fault(self.policy, self._last_obs, obs_tensor, acted)
            raise self._act_error(cast(Fault, fault), rollout_buffer)
        if with_dist_params and acted.dist_params is None:
            self._omit_kl(rollout_buffer)
        return acted

    def _act_by_writer(self, writer: RolloutWriter, rollout_buffer: Any) -> np.ndarray:
        """Sample actions as :meth:`_act` does, and return the actions for the environments."""
        actions, finite = writer.act(self._last_obs)
        if not finite:
            row = writer.row()
            acted = Acted(row["actions"], row["values"], row["log_probs"], None)
            fault = act_fault(self.policy, self._last_obs, None, acted)
            raise self._act_error(cast(Fault, fault), rollout_buffer)
        return actions

    def _may_act(self) -> bool:
        """Return whether observations are finite, or the policy handles non-finite ones by code of its own."""
        if observations_are_finite(self._last_obs):
            return True
        return reads_by_own_code(self.policy) and has_finite_statistics(self.get_vec_normalize_env())

    def _compute_returns(self, engine: Engine, rollout_buffer: Any, dones: np.ndarray) -> th.Tensor:
        """Compute returns and advantages, and return the values of the observations after the last step."""
        fault = None if self._may_act() else observation_fault(self._last_obs)
        if fault is None:
            values = engine.predict_values(to_tensor(self._last_obs, self.device))
            fault = find_fault("value", None, values.cpu().numpy().reshape(-1))
            fault = fault and (observation_fault(self._last_obs) or fault)
        if fault is not None:
            raise self._act_error(fault, rollout_buffer)
        with np.errstate(over="ignore", invalid="ignore"):  # the update reports them
            rollout_buffer.compute_returns_and_advantage(last_values=values, dones=dones)
        return values

    def _reward_error(self, bootstrapped: np.ndarray, step: int, arrays: dict[str, Any]) -> NonFiniteError:
        """Return the error for non-finite rewards of a step; ``arrays`` holds the loop's local variables."""
        fault = reward_fault(arrays["rewards"], bootstrapped, arrays["infos"])
        arrays |= {"observations": self._last_obs, "new_observations": arrays["new_obs"]}
        return step_error(self._fault_context(), fault, step, arrays)

    def _act_error(self, fault: Fault, buffer: Any) -> NonFiniteError:
        """Return the error for a fault where the policy acts or predicts values, after the last step in the buffer."""
        arrays: dict[str, Any] = {"new_observations": self._last_obs, "dones": self._last_episode_starts}
        if buffer.pos:
            for name in ("observations", "actions", "values", "log_probs", "rewards"):
                rows, last = getattr(buffer, name), buffer.pos - 1
                arrays[name] = {key: rows[key][last] for key in rows} if isinstance(rows, dict) else rows[last]
        return step_error(self._fault_context(), fault, buffer.pos, arrays)

    def _fault_context(self) -> FaultContext:
        folder = self._checkpoint_folder
        has_own_log = self._custom_logger or self.tensorboard_log is not None
        if folder is None and has_own_log:
            folder = None if self.logger.dir is None else Path(self.logger.dir)
        return FaultContext(
            policy=self.policy,
            num_timesteps=self.num_timesteps,
            folder=None if folder is None else Path(folder),
            normalizes=self.get_vec_normalize_env() is not None,
        )

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        self._checkpoint_folder = None  # a TrainingCheckpoint sets it when training starts
        self._may_lose_episodes = True
        return super()._init_callback(callback, progress_bar)

    def _excluded_save_params(self) -> list[str]:
        of_this_run = ("_checkpoint_folder", "_discounts", "_engine", "_may_lose_episodes", "_warned_of_missing_kl")
        return [*super()._excluded_save_params(), *of_this_run]

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        # SB3 reads each environment's info twice per step; only the ends of episodes hold what it looks for.
        ended = [index for index, info in enumerate(infos) if "episode" in info or "is_success" in info]
        if ended:
            super()._update_info_buffer([infos[index] for index in ended], None if dones is None else dones[ended])
        if self._may_lose_episodes and dones is not None and np.count_nonzero(dones):
            self._look_for_lost_episodes(infos, dones)

    def _look_for_lost_episodes(self, infos: list[dict[str, Any]], dones: np.ndarray) -> None:
        """Warn once if episodes end outside of Monitor; stop looking when it reports one."""
        for index in np.flatnonzero(dones).tolist():
            end = None if "episode" in infos[index] else unreported_end(cast(VecEnv, self.env), index)
            if end is UnreportedEnd.LOST:
                log.warning(
                    "A wrapper outside of Monitor, such as TimeLimit, ends episodes that Monitor does not report: "
                    "`rollout/ep_rew_mean` does not include them, and SB3's evaluate_policy would loop forever. %s",
                    MONITOR_ADVICE,
                )
            if end is not UnreportedEnd.RUNNING:
                self._may_lose_episodes = False
                return

    # ------------------------------------------------------------------ environments and buffer

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Replace the environments.

        :param env: Environments with the model's spaces and ``n_envs``. To change their number, use :meth:`load`.
        :param force_reset: Whether to reset them before training.
        :raises ValueError: If the spaces differ from the model's.
        :raises AssertionError: If the number of environments differs from ``n_envs``.
        """
        show_messages(self.verbose)
        space = self._stored_space()
        with same_spaces():
            super().set_env(env, force_reset)
        buffer = getattr(self, "rollout_buffer", None)
        # A buffer of the user's own that replaced the model's is kept.
        is_built = type(buffer) is self.rollout_buffer_class or is_known_class(type(buffer))
        if is_built and self._stored_space() != space:
            self.rollout_buffer = self._make_rollout_buffer()

    def _stored_space(self) -> spaces.Space[Any]:
        """Return the space of the observations that the policy sees, and a buffer gets."""
        return stored_observation_space(self.observation_space, self.get_vec_normalize_env())

    def _make_rollout_buffer(self, default: type[Any] = TensorRolloutBuffer, *, checks_memory: bool = True) -> Any:
        """Build the buffer; raise ValueError if it does not fit into memory or cannot store what the KL needs."""
        buffer_class = self.rollout_buffer_class or default
        width = dist_param_dim(getattr(self.policy, "action_dist", None))
        kwargs = dict(self.rollout_buffer_kwargs)
        if issubclass(buffer_class, TensorRolloutBuffer):
            kwargs.setdefault("dist_param_dim", width or 0)
        stores_dist = issubclass(buffer_class, TensorRolloutBuffer) and kwargs["dist_param_dim"] == width
        self._check_kl_is_known(buffer_class, width, stores_dist)
        self._discounts = {"gamma": self.gamma, "gae_lambda": self.gae_lambda}
        rollout_buffer = buffer_class(
            self.n_steps,
            self._stored_space(),
            self.action_space,
            device=self.device,
            n_envs=self.n_envs,
            **self._discounts,
            **kwargs,
        )
        if checks_memory and isinstance(rollout_buffer, TensorRolloutBuffer) and self.env is not None:
            rollout_buffer.check_memory()
        return rollout_buffer

    # ------------------------------------------------------------------ the exact KL

    def _check_kl_is_known(self, buffer_class: type[Any], width: int | None, stores_dist: bool) -> None:
        """Raise ValueError if an argument needs the exact KL, and policy or buffer lack what it is computed from."""
        name = self._argument_that_needs_kl()
        if name is None or (width and stores_dist):
            return
        if width:
            cause = f"`rollout_buffer_class` {buffer_class.__name__} does not store the old distribution"
            hint = "Derive the buffer class from TensorRolloutBuffer, and keep its `dist_param_dim`."
        else:
            dist = type(getattr(self.policy, "action_dist", None)).__name__
            cause = f"that of the policy's action distribution ({dist}) is not known"
            hint = "Use one of SB3's action distributions."
        raise ValueError(f"`{name}` needs the exact KL, but {cause}, got {name}={getattr(self, name)!r}. {hint}")

    def _check_kl_is_stored(self) -> None:
        """
        Raise ValueError if the rollout lacks the old distribution's parameters although an argument needs them.

        SB3's loop, or the user's own, may add steps without them.
        """
        rollout_buffer = self.rollout_buffer
        if has_dist_params(rollout_buffer):
            return
        name, can_store = self._argument_that_needs_kl(), bool(getattr(rollout_buffer, "dist_param_dim", 0))
        if name is None:
            if can_store:
                self._log_missing_kl("`train/kl` is omitted: the rollout lacks the old distribution's parameters.")
            return
        if can_store:
            raise ValueError(
                f"`dist_params` must be given at each step if `{name}` is set, got None with {name}="
                f"{getattr(self, name)!r}. Pass them to `rollout_buffer.add`, or collect with ClipPPO's own "
                "`collect_rollouts`, which passes them."
            )
        width = dist_param_dim(getattr(self.policy, "action_dist", None))
        self._check_kl_is_known(type(rollout_buffer), width, stores_dist=False)

    def _omit_kl(self, rollout_buffer: Any) -> None:
        """Log that ``train/kl`` is omitted; raise ValueError if an argument needs the KL."""
        self._check_kl_is_known(type(rollout_buffer), None, stores_dist=False)
        self._log_missing_kl("`train/kl` is omitted: the exact KL of the policy's action distribution is not known.")

    def _log_missing_kl(self, message: str) -> None:
        if not self._warned_of_missing_kl:
            self._warned_of_missing_kl = True
            log.info(message)


def bootstrap_truncated(
    engine: Engine, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]], gamma: float, values: Any
) -> np.ndarray:
    """
    Return rewards with ``gamma * V(final observation)`` added where an episode was truncated, shape ``(n_envs,)``.

    The values come from one forward pass for all. Where the final observation is not known, ``values`` of the
    observations before the step, an array or tensor, take their place. ``rewards`` is not changed in-place, since
    callbacks read it. The result is NaN for all truncated episodes if a final observation is not finite, unless the
    policy has its own code that reads observations.

    Source: Pardo et al. 2018, arXiv 1712.00378.
    """
    if not np.count_nonzero(dones):  # any() takes several times as long
        return rewards
    truncated, unknown = truncated_rows(dones, infos)
    # Integer rewards cannot hold the values.
    bootstrapped = rewards.astype(np.result_type(rewards, np.float32)) if truncated or unknown else rewards
    if unknown:
        bootstrapped[unknown] += gamma * th.as_tensor(values).cpu().numpy().reshape(-1)[unknown]
    if not truncated:
        return bootstrapped
    final_obs: Any = [infos[index]["terminal_observation"] for index in truncated]
    stacked = stack_rows(engine.policy.observation_space, final_obs)
    if not (observations_are_finite(stacked) or reads_by_own_code(engine.policy)):
        bootstrapped[truncated] = np.nan  # a network may turn them into finite numbers
        return bootstrapped
    final_values = engine.predict_values(engine.policy.obs_to_tensor(stacked)[0])
    bootstrapped[truncated] += gamma * final_values.cpu().numpy().reshape(-1)
    return bootstrapped


def _add_sb3_tensors(buffer: Any, row: tuple[Any, ...], values: Any, log_probs: Any, dist_params: Any) -> None:
    """Store a step in a buffer of SB3 or the user, whose ``add`` may not know ``dist_params``."""
    more = {} if dist_params is None else {"dist_params": dist_params}
    buffer.add(*row, values, log_probs, **more)
