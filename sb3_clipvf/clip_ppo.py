"""
ClipPPO, the algorithm: its arguments, the update, ``learn``, and saving, loading and resuming.

``collection`` holds the loop over the environments, ``engines`` run the minibatches of an update, ``objectives`` are
the losses. docs/architecture.md shows how they work together.
"""

import io
import os
import pathlib
import time
from collections.abc import Iterable
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, TensorDict
from stable_baselines3.common.utils import get_device, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv

from sb3_clipvf.arguments import (
    SB3_EQUIVALENT,
    check_arguments,
    check_changes,
    check_what_sb3_reads,
    discounts,
    named_at_load,
    values_to_load,
    warn_about_early_end,
    warn_about_n_envs,
    warn_about_truncated_minibatches,
)
from sb3_clipvf.checkpoint.resume import Resumed, begin_resume, resume
from sb3_clipvf.common import validation
from sb3_clipvf.common.messages import log, show_messages
from sb3_clipvf.common.nonfinite import MAX_UPDATES_WITH_SKIPS, BadMinibatchError
from sb3_clipvf.data_parallel import DataParallelCollector
from sb3_clipvf.distributed import current_group
from sb3_clipvf.engines.device import select_device
from sb3_clipvf.engines.interface import Engine, UpdateCoefficients, UpdateSettings, UpdateStatistics
from sb3_clipvf.engines.selection import is_surpassed, select_engine
from sb3_clipvf.envs.tensor import as_sb3_env, tensor_device
from sb3_clipvf.files.codec import NOTE
from sb3_clipvf.files.model import check_model, network_bound, read_model, without_methods, write_model
from sb3_clipvf.files.trust import TrustPickle, trust_of
from sb3_clipvf.guards.diagnosis import update_error
from sb3_clipvf.guards.env_checks import check_environments
from sb3_clipvf.guards.failures import failures_explained
from sb3_clipvf.policies import POLICY_ALIASES
from sb3_clipvf.rollout import TensorRolloutBuffer, check_complete, has_dist_params, needs_complete_rollout
from sb3_clipvf.schedules import (
    COEFFICIENTS,
    CONTROLLERS,
    AdaptiveKL,
    KLAdaptiveLR,
    Schedule,
    clamp_progress,
    is_zero,
    make_controller,
    schedule_of,
)

__all__ = ["SB3_EQUIVALENT", "ClipPPO"]

SPREAD_EPS = 1e-6
"""If the standard deviation is below this share of the largest absolute return, returns differ only by rounding."""


class ClipPPO(DataParallelCollector):
    """
    Proximal Policy Optimization with ratio clipping, a KL penalty, both or neither, and a clipped value loss.

    The update minimises, over minibatches of the rollout of pi_old,
    ``-E[min(r A, clip(r, 1 - clip_range, 1 + clip_range) A)] + kl_coef KL(pi_old || pi) + vf_coef L_vf - ent_coef H``.

    Arguments marked *schedule* accept a number, a function of SB3's ``progress_remaining`` (1 -> 0), or a string
    ``lin_x``, ``cos_x``, ``exp_x``, ``const_x``, where x is the initial value.

    :param policy: Policy class or alias: MlpPolicy, CnnPolicy, MultiInputPolicy, SquashedMlpPolicy, SquashedCnnPolicy,
        SquashedMultiInputPolicy.
    :param env: Environment, VecEnv or registered id.
    :param learning_rate: Learning rate, at least 0 (*schedule*).
    :param n_steps: Steps per environment in a rollout. Assigning to the attribute takes effect with the next rollout.
        SB3's buffers and ``TensorRolloutBuffer`` are resized; replace a buffer of another class yourself.
    :param batch_size: Transitions per minibatch; at least 2 if advantages are normalised per minibatch.
    :param n_epochs: Passes over the rollout per update.
    :param gamma: Discount factor, in [0, 1].
    :param gae_lambda: lambda of the advantage estimate, in [0, 1].
    :param clip_range: Range epsilon of the ratio clip, positive (*schedule*). None turns clipping off.
    :param clip_range_vf: Largest change of a value prediction before it is clipped, positive (*schedule*), in
        ``vf_clip_units``. None turns value clipping off.
    :param normalize_advantage: Whether to normalise advantages to mean 0 and standard deviation 1.
    :param ent_coef: Weight of the entropy bonus, at least 0 (*schedule*).
    :param vf_coef: Weight of the value loss, at least 0 (*schedule*). The loss has no factor of 1/2.
    :param max_grad_norm: Bound on the joint gradient norm of actor and critic, positive; infinity sets no bound.
    :param use_sde: Whether to explore with SB3's gSDE.
    :param sde_sample_freq: Steps between new gSDE noise matrices, at least 1; -1: only at the start of a rollout.
    :param rollout_buffer_class: Buffer class with the interface of SB3's ``RolloutBuffer``. None:
        ``TensorRolloutBuffer``.
    :param rollout_buffer_kwargs: Further arguments of the buffer class.
    :param target_kl: Limit on the estimated KL (k3), nats, positive. An update ends before the first step for which it
        exceeds 1.5 times this value. The device is read at each minibatch (cuda_graph: after each epoch).
    :param stats_window_size: Episodes over which ``rollout/`` statistics are averaged. None: all of them.
    :param tensorboard_log: Folder for TensorBoard logs. None turns them off.
    :param policy_kwargs: Further arguments of the policy.
    :param verbose: 0: no messages; 1: messages; 2: details.
    :param seed: Seed of all random states, at least 0.
    :param device: PyTorch device. "auto": that of tensor environments; for others, the CPU or a GPU by ``engine`` and
        the sizes of networks and minibatches (``docs/engines.md``, "Device").
    :param kl_coef: Weight beta of the exact KL(pi_old || pi), 1/nats, at least 0 (*schedule*); its initial value if
        beta adapts. 0: no penalty.
    :param adaptive_kl_target: Target d_targ of the KL, nats, positive; beta adapts to it once per update
        (``schedules.AdaptiveKL``). None: beta does not adapt.
    :param vf_clip: "max": the larger of the clipped and unclipped squared error; "prediction": SB3's form.
    :param vf_clip_units: "return_std": ``clip_range_vf`` is in standard deviations of the rollout's returns;
        "absolute": in return units, as in SB3.
    :param advantage_scope: "minibatch" or "rollout": the set over which advantages are normalised.
    :param lr_kl_target: KL target of the learning rate, nats, positive; it adapts once per update
        (``schedules.KLAdaptiveLR``). None: the rate follows ``learning_rate``.
    :param on_nonfinite: How to handle a minibatch with a non-finite loss or gradient, for which no step is taken.
        "raise": a ``NonFiniteError`` ends training. "skip": it is skipped and counted, in at most 10 updates in a row.
    :param engine: "auto" (the fastest that runs the policy), "native", "fused", "autograd", or on a GPU "cuda_graph"
        or "cuda_graph_bf16" (``docs/engines.md``).
    :raises ValueError: If an argument is out of range, or two arguments contradict each other.
    :raises TypeError: If an argument is of the wrong type.
    Source: Schulman et al. 2017, arXiv 1707.06347. Departures: the clipped value loss, advantage normalisation and
        gradient clipping (all from OpenAI baselines), bounds on beta.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = POLICY_ALIASES
    # Set to True on the class to silence the warning for all models.
    _warned_of_early_end = False
    # State of a checkpoint, until `learn` restores it.
    _resumed: Resumed | None = None
    # Number of environments in the loaded file, until `learn` compares it.
    _n_envs_before: Any = None

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        learning_rate: float | str | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | str | Schedule | None = 0.2,
        clip_range_vf: float | str | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float | str | Schedule = 0.0,
        vf_coef: float | str | Schedule = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[Any] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        kl_coef: float | str | Schedule = 0.0,
        adaptive_kl_target: float | None = None,
        vf_clip: str = "max",
        vf_clip_units: str = "return_std",
        advantage_scope: str = "minibatch",
        lr_kl_target: float | None = None,
        on_nonfinite: str = "raise",
        engine: str = "auto",
    ) -> None:
        check_what_sb3_reads(policy, rollout_buffer_kwargs, verbose)
        # `load` passes no environment yet.
        if env is not None or _init_setup_model:
            env = as_sb3_env(maybe_make_env(env, verbose))  # type: ignore[arg-type]
            validation.check_env(policy, env, use_sde)
            env = self._wrap_env(env, verbose)  # type: ignore[arg-type]
        if _init_setup_model:  # `load` has checked it
            validation.check_device(device)
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,  # type: ignore[arg-type]
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,  # type: ignore[arg-type]
            vf_coef=vf_coef,  # type: ignore[arg-type]
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            # For "auto", `_setup_model` selects the device when there is a policy. With `verbose`, SB3 prints this one.
            verbose=0 if device == "auto" else verbose,
            device="cpu" if device == "auto" and engine != "autograd" else device,
            seed=seed,
            _init_setup_model=False,
        )
        self.verbose = verbose
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.kl_coef = kl_coef
        self.adaptive_kl_target = adaptive_kl_target
        self.vf_clip = vf_clip
        self.vf_clip_units = vf_clip_units
        self.advantage_scope = advantage_scope
        self.lr_kl_target = lr_kl_target
        self.on_nonfinite = on_nonfinite
        self.engine = engine

        # State that lasts across updates and is saved.
        self.adaptive_kl: AdaptiveKL | None = None
        self.adaptive_lr: KLAdaptiveLR | None = None
        self._schedule_timesteps: int | None = None
        self._updates_with_skips = 0
        # Marks the checkpoints of this run as its own.
        self._training_id: str | None = None
        # Built from the arguments when needed and not saved.
        self._schedules: dict[str, tuple[Any, Schedule]] = {}
        self._controlled: dict[str, Any] = {}  # arguments that the controllers have started from
        self._engine: Engine | None = None
        self._engine_choice = ("", "", "")  # `engine`, the name of the engine in use, and why it was chosen
        self._loads_sb3 = False  # whether the attributes come from a file of SB3
        self._device_is_auto = device == "auto"

        if _init_setup_model:
            self._setup_model()
            if self._device_is_auto and self.verbose:
                log.info("Using %s device", self.device)
            warn_about_truncated_minibatches(vars(self))

    def _setup_model(self) -> None:
        """Check the arguments, then build what they describe; SB3's ``load`` calls this, too."""
        vars(self).update(check_arguments(vars(self)))
        validation.check_env(self.policy_class, self, self.use_sde)
        validation.check_observations(self.policy_class, self.policy_kwargs, self.observation_space)
        show_messages(self.verbose)
        # Invalid schedules raise an error before anything is built or drawn.
        self._schedules, self._controlled = {}, {}
        for name in COEFFICIENTS:
            self._schedule(name)
        self._setup_lr_schedule()
        if self._device_is_auto:
            # SB3's choice until there is a policy: a seed then makes cuDNN deterministic, as in SB3.
            self.device = get_device("auto")
        self.set_random_seed(self.seed)
        self.policy = self.policy_class(
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            use_sde=self.use_sde,
            **self.policy_kwargs,
        )  # type: ignore[assignment]
        if self._device_is_auto:
            self.device = tensor_device(self.env) or select_device(self.engine, self.policy, self.batch_size)
        self.policy = self.policy.to(self.device)
        self.rollout_buffer = self._make_rollout_buffer()
        if self.engine == "autograd" or not (self._device_is_auto or self.engine.startswith("cuda_graph")):
            self._maybe_recommend_cpu()
        self._setup_controllers()
        self._engine = None

    def _setup_controllers(self) -> None:
        """Create the KL controllers, or keep the beta and the learning rate that they have reached."""
        kl_coef = cast(Schedule, self._schedule("kl_coef"))
        self.adaptive_kl = make_controller(AdaptiveKL, self.adaptive_kl, self.adaptive_kl_target, kl_coef)
        self.adaptive_lr = make_controller(KLAdaptiveLR, self.adaptive_lr, self.lr_kl_target, self.lr_schedule)
        self._controlled = {name: getattr(self, name) for name in CONTROLLERS}

    def _restarted(self) -> dict[str, None]:
        """Return None for each controller, by attribute, whose initial value was replaced: it is created again."""
        return {CONTROLLERS[name]: None for name, value in self._controlled.items() if getattr(self, name) != value}

    @property
    def lr_schedule(self) -> Schedule:
        """Function of progress that ``learning_rate`` describes; assigning a function replaces ``learning_rate``."""
        return cast(Schedule, self._schedule("learning_rate"))

    @lr_schedule.setter
    def lr_schedule(self, schedule: Schedule) -> None:
        self.learning_rate = schedule

    def _setup_lr_schedule(self) -> None:
        self._schedule("learning_rate")
        if self._controlled:  # a user calls it, as in SB3, to apply `learning_rate`: an adapted rate starts again
            self._controlled["learning_rate"] = None

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        return DataParallelCollector._wrap_env(as_sb3_env(env), verbose, monitor_wrapper)

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        validation.check_choice("policy", policy_name, tuple(self.policy_aliases), "Or pass a policy class.")
        return self.policy_aliases[policy_name]

    def _argument_that_needs_kl(self) -> str | None:
        if not is_zero(self._schedule("kl_coef")):
            return "kl_coef"
        return next((name for name in ("adaptive_kl_target", "lr_kl_target") if getattr(self, name) is not None), None)

    # ------------------------------------------------------------------ update

    @np.errstate(over="ignore", invalid="ignore")  # the update reports such numbers by name
    def train(self) -> None:
        """
        Update the policy from the rollout in the buffer, adapt the controllers, and log.

        :raises ValueError: If the rollout is not complete, or lacks the old distribution although an argument needs it.
        :raises NonFiniteError: If a minibatch is not finite, unless it may be skipped.
        """
        started = time.perf_counter()
        if needs_complete_rollout(self.rollout_buffer):
            check_complete(self.rollout_buffer)
        if isinstance(self.rollout_buffer, TensorRolloutBuffer):
            self.rollout_buffer.forget_copies()
        show_messages(self.verbose)
        self._check_kl_is_stored()
        engine = self._current_engine()
        engine.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        coefficients = self._use_first_settings(engine, self._update_coefficients())
        statistics = self._run_update(engine, coefficients)
        self._n_updates += statistics.n_epochs
        if statistics.stopped_at_kl is not None:
            log.info(
                "Early stopping at step %d due to reaching max kl: %.2f",
                statistics.n_epochs - 1,
                statistics.stopped_at_kl,
            )
        if statistics.kl_after is not None:
            self._adapt_controllers(float(statistics.kl_after))
        self._log_update(statistics, coefficients)
        self.logger.record("time/update_seconds", time.perf_counter() - started)

    def _update_coefficients(self) -> UpdateCoefficients:
        """
        Return the coefficients at the present progress.

        ``clip_range_vf`` in units of the returns' standard deviation is converted to return units. If the returns have
        no spread, there is no unit, and this update does not clip the value loss.
        """
        progress = self._current_progress_remaining
        schedules = {name: self._schedule(name) for name in COEFFICIENTS}
        values: dict[str, Any] = {name: None if s is None else s(progress) for name, s in schedules.items()}
        in_stds = values["clip_range_vf"] is not None and self.vf_clip_units == "return_std"
        # Several processes compute it together, whatever callbacks have changed in the first one.
        spread, largest = self._spread_of_returns() if in_stds or current_group().size > 1 else (0.0, 0.0)
        if in_stds:
            values["clip_range_vf"] = values["clip_range_vf"] * spread if spread > SPREAD_EPS * largest else None
        if self.adaptive_kl is not None:
            values["kl_coef"] = self.adaptive_kl.beta
        return UpdateCoefficients(**values)

    def _schedule(self, name: str) -> Schedule | None:
        """Return a coefficient's schedule, built again if a callback replaced the coefficient; None if that is None."""
        return schedule_of(getattr(self, name), name, self._schedules)

    def _run_update(self, engine: Engine, coefficients: UpdateCoefficients) -> UpdateStatistics:
        """Run the epochs, and raise if a minibatch is not finite or too many updates in a row skipped some."""
        try:
            statistics = engine.update(self.rollout_buffer, coefficients)
        except BadMinibatchError as bad:
            reason = "training has ended since all minibatches of the update were skipped."
            raise self._update_error(bad, reason if self.on_nonfinite == "skip" else "") from None
        except AssertionError:
            check_complete(self.rollout_buffer)  # SB3's `get` asserts it without a message
            raise
        self._updates_with_skips = self._updates_with_skips + 1 if statistics.n_skipped else 0
        if statistics.skipped is None:
            return statistics
        if self._updates_with_skips > MAX_UPDATES_WITH_SKIPS:
            reason = f"training has ended since {self._updates_with_skips} updates in a row have skipped minibatches."
            raise self._update_error(statistics.skipped, reason)
        if self._updates_with_skips == 1:
            log.warning(
                "%d minibatches were skipped in the update at num_timesteps=%d (first cause: %s). "
                "`train/skipped_minibatches` counts them; training ends after %d updates in a row that skip some.",
                statistics.n_skipped,
                self.num_timesteps,
                statistics.skipped,
                MAX_UPDATES_WITH_SKIPS + 1,
            )
        return statistics

    def _update_error(self, bad: BadMinibatchError, reason: str) -> Exception:
        return update_error(self._fault_context(), bad, self.rollout_buffer, reason)

    def _current_engine(self) -> Engine:
        """Return the engine for the policy and the arguments as they are now; callbacks may have replaced them."""
        vars(self).update(self._restarted())
        vars(self).update(check_changes(vars(self)))
        self._setup_controllers()
        settings = self._update_settings()
        if self._engine is None or not self._may_keep(self._engine):
            logged = self._engine_choice
            self._engine, reason = select_engine(self.engine, self.policy, settings, self.rollout_buffer)
            self._engine_choice = (self.engine, self._engine.name, reason)
            if self._engine_choice != logged:
                log.info("Training runs on the engine %r: %s", self._engine.name, reason)
        self._engine.settings = settings
        return self._engine

    def _may_keep(self, engine: Engine) -> bool:
        if engine.policy is not self.policy or self.engine != self._engine_choice[0]:
            return False
        # A faster engine may run the policy now.
        if self.engine == "auto" and is_surpassed(engine, self.rollout_buffer):
            return False
        return engine.fits(self.rollout_buffer)

    def _update_settings(self) -> UpdateSettings:
        return UpdateSettings(
            batch_size=self.batch_size,
            n_epochs=self.n_epochs,
            normalize_advantage=self.normalize_advantage,
            advantage_scope=self.advantage_scope,
            vf_clip=self.vf_clip,
            max_grad_norm=self.max_grad_norm,
            target_kl=self.target_kl,
            measure_kl_after=self.adaptive_kl is not None or self.adaptive_lr is not None,
            has_dist_params=has_dist_params(self.rollout_buffer),
            discrete_actions=isinstance(self.action_space, spaces.Discrete),
            needs_kl=self._argument_that_needs_kl() is not None,
            on_nonfinite=self.on_nonfinite,
            group=current_group(),
        )

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        horizon = self._schedule_timesteps or total_timesteps
        self._current_progress_remaining = clamp_progress(1.0 - float(num_timesteps) / float(horizon))

    def _update_learning_rate(self, optimizers: Any) -> None:
        if self.adaptive_lr is None:
            super()._update_learning_rate(optimizers)
            return
        self.logger.record("train/learning_rate", self.adaptive_lr.learning_rate)
        update_learning_rate(optimizers, self.adaptive_lr.learning_rate)

    def _adapt_controllers(self, kl_after: float) -> None:
        if self.adaptive_kl is not None:
            self.adaptive_kl = self.adaptive_kl.next(kl_after)
        if self.adaptive_lr is not None:
            self.adaptive_lr = self.adaptive_lr.next(kl_after)

    def _log_update(self, statistics: UpdateStatistics, coefficients: UpdateCoefficients) -> None:
        record = self.logger.record
        for name, value in statistics.read().items():
            record(f"train/{name}", value)
        if self.on_nonfinite == "skip":
            record("train/skipped_minibatches", statistics.n_skipped)
        record("train/kl_coef", coefficients.kl_coef)
        record("train/explained_variance", self._explained_variance())
        if hasattr(self.policy, "log_std"):
            record("train/std", th.exp(self.policy.log_std).mean().item())
        record("train/n_updates", self._n_updates, exclude="tensorboard")
        if coefficients.clip_range is not None:
            record("train/clip_range", coefficients.clip_range)
        if coefficients.clip_range_vf is not None:
            record("train/clip_range_vf", coefficients.clip_range_vf)

    # ------------------------------------------------------------------ learn

    def learn(
        self,
        total_timesteps: float,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str = "ClipPPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        schedule_timesteps: float | None = None,
    ) -> Self:
        """
        Train the model.

        :param total_timesteps: Environment steps of this call, over all environments. Whole rollouts are collected, so
            the last one may exceed it. Floats with a whole value, such as 1e6, are accepted.
        :param callback: Callback, or list of callbacks.
        :param log_interval: Updates between two logs. None: never.
        :param tb_log_name: Name of the TensorBoard run.
        :param reset_num_timesteps: Whether to count steps from 0 again. False: continue the count.
        :param progress_bar: Whether to show a progress bar.
        :param schedule_timesteps: Environment steps, counted from 0, at which schedules end. Pass it to the first of
            several calls with ``reset_num_timesteps=False``; later calls keep it. None: schedules end with each call,
            as in SB3.
        :return: This model.
        :raises ValueError: If a number is out of range, or there is no environment.
        :raises NonFiniteError: If observations, rewards, values, losses or gradients are not finite.
        """
        show_messages(self.verbose)
        total = validation.check_int("total_timesteps", total_timesteps, 0, "Pass the number of environment steps.")
        horizon = None
        if schedule_timesteps is not None:
            horizon = validation.check_int(
                "schedule_timesteps", schedule_timesteps, 1, "Pass the environment steps of all calls together."
            )
        if log_interval is not None:
            log_interval = validation.check_int("log_interval", log_interval, 1, "None turns it off.")
        self.n_steps = validation.check_int("n_steps", self.n_steps, 1, "SB3's default is 2048.")
        if self.env is None:
            raise ValueError("`env` must be set before learning, got None. Pass it to `load`, or call `set_env`.")
        check_environments(self.env, self.observation_space, self.action_space, self.n_envs)
        if self.tensorboard_log is not None and not self._custom_logger:
            hint = "Choose a different one, or None for no such log."
            validation.ensure_writable_folder("tensorboard_log", self.tensorboard_log, hint)
        if horizon is not None or reset_num_timesteps:
            self._schedule_timesteps = horizon
        if isinstance(self._n_envs_before, int) and self._n_envs_before != self.n_envs:
            warn_about_n_envs(vars(self), self._n_envs_before)
        self._n_envs_before = None
        with failures_explained(callback, lambda: (self.env, self.num_timesteps, self._total_timesteps)):
            return super().learn(total, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _warn_about_early_end(self, n_envs: int, start: int, end: int, *, on_command_line: bool = False) -> None:
        """Warn once if schedules run mostly at their final values from one step of ``n_envs`` to another."""
        if self._schedule_timesteps is not None or self._warned_of_early_end:
            return
        schedules = {name: self._schedule(name) for name in ("learning_rate", *COEFFICIENTS)}
        self._warned_of_early_end = warn_about_early_end(
            {name: schedule for name, schedule in schedules.items() if schedule is not None},
            rollout=self.n_steps * n_envs,
            done=start,
            to_do=end - start,
            on_command_line=on_command_line,
        )

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        self._warn_about_early_end(self.n_envs + self._n_envs_elsewhere, self.num_timesteps, self._total_timesteps)
        initialised = super()._init_callback(callback, progress_bar)
        begin_resume(self, initialised)
        return initialised

    # ------------------------------------------------------------------ saving, loading, resuming

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model; only the user's own functions and classes are pickled, and a warning names them.

        An existing file is replaced when the new one is complete. An open file is written in-place.

        :param path: Zip file, with or without its suffix, or an open binary file.
        :param exclude: Attributes to omit, besides those that are always omitted.
        :param include: Attributes to save although they are omitted otherwise.
        :raises OSError: If the file cannot be written. The previous content of ``path`` is then unchanged.
        """
        attributes = self._saved_attributes(exclude or (), include or ())
        write_model(path, attributes, self.get_parameters(), self._saved_variables())

    def _saved_attributes(self, exclude: Iterable[str] = (), include: Iterable[str] = ()) -> dict[str, Any]:
        """Return the attributes to save, by name, without those that are saved as tensors."""
        names, variables = self._get_torch_save_params()
        omitted = {*self._excluded_save_params(), *exclude}.difference(include)
        omitted.update(name.split(".")[0] for name in names + variables)
        attributes = {**vars(self), **self._restarted(), **discounts(vars(self), self.rollout_buffer, self._discounts)}
        return without_methods(type(self), {key: value for key, value in attributes.items() if key not in omitted})

    def _saved_variables(self) -> dict[str, Any]:
        """Return the tensors to save besides state dicts, by name."""
        return {name: recursive_getattr(self, name) for name in self._get_torch_save_params()[1]}

    def _excluded_save_params(self) -> list[str]:
        built = ("_schedules", "_controlled", "_engine_choice")
        of_this_process = ("_device_is_auto", "_loads_sb3", "_warned_of_early_end", "_n_envs_before", "_resumed")
        return [*super()._excluded_save_params(), *built, *of_this_process]

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        trust_pickle: TrustPickle = None,
        **kwargs: Any,
    ) -> Self:
        """
        Load a model that ClipPPO or SB3's PPO saved, without running code that the file contains or names.

        A file of SB3's PPO lacks ClipPPO's own arguments. They get the values of :data:`SB3_EQUIVALENT`, so that
        training continues as SB3's PPO would; a warning names them. A KL controller continues from the file's state,
        unless its initial value changes.

        :param path: Zip file, with or without its suffix, or an open binary file.
        :param env: Environments to continue in; their number may differ. None: the model can only predict.
        :param device: PyTorch device, or "auto", as for the constructor.
        :param custom_objects: Values that replace the file's, by attribute; the replaced ones are not read.
        :param print_system_info: Whether to print the versions of the packages then and now.
        :param force_reset: Whether to reset the environments before training.
        :param trust_pickle: True: the file may run any code. False: it may use classes of Gymnasium, NumPy, torch, SB3
            and this package that are known to be harmless. Classes and functions: it may use these, too. None: the
            environment variable ``SB3_CLIPVF_TRUST_PICKLE`` decides: "1" or "0", the default.
        :param kwargs: Arguments of the constructor to change.
        :return: The model.
        :raises UnsafeFileError: If the file needs a class or function that ``trust_pickle`` does not allow.
        :raises ValueError: If the file is not a model, is damaged, does not fit into memory, or holds a value that the
            installed packages cannot read; or PyTorch does not know the device.
        :raises RuntimeError: If the weights do not fit the policy that the file describes.
        :raises FileNotFoundError: If there is no file.
        """
        validation.check_device(device)
        trust = trust_of(trust_pickle)
        file = read_model(path)
        replaced = dict(custom_objects or {})
        check_model(file, cls, trust, replaced)
        kwargs = values_to_load(file.data or {}, kwargs, replaced, cls)
        # `_setup_model` builds `lr_schedule`. `policy_kwargs` stay, since SB3 compares them with the file's.
        replaced = {"lr_schedule": None, **{key: kwargs[key] for key in kwargs if key != "policy_kwargs"}, **replaced}
        with named_at_load(file.data or {}, replaced | kwargs), validation.same_spaces(), network_bound(file, trust):
            model = super().load(
                file.stream(),
                env=env,
                device="cpu" if device == "auto" else device,
                custom_objects={**file.unpickled(trust, replaced), **replaced},
                print_system_info=print_system_info,
                force_reset=force_reset,
                _device_is_auto=device == "auto",
                **kwargs,
            )
        for name in (NOTE, "lr_schedule"):
            vars(model).pop(name, None)
        model._n_envs_before = (file.data or {}).get("n_envs")
        model._training_id = None  # only `resume` continues the file's training
        return model

    def set_parameters(
        self,
        load_path_or_dict: str | pathlib.Path | io.BufferedIOBase | TensorDict,
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Set the weights and the state of the optimizer.

        :param load_path_or_dict: Zip file of a model, of which only tensors are read, or a dict from
            ``get_parameters``.
        :param exact_match: Whether all parameters must be given. False: set those that are given.
        :param device: PyTorch device to which a file is read. "auto": the model's.
        :raises UnsafeFileError: If the file holds more than tensors as weights.
        :raises ValueError: If the file is not a model, is damaged or does not fit into memory; or a name is unknown or,
            with ``exact_match``, missing.
        """
        parameters: Any = load_path_or_dict
        if not isinstance(parameters, dict):
            parameters = read_model(parameters, needs_data=False).stream()
        # Adam's step counts stay on the device to which they are read.
        device = self.device if device == "auto" else device
        super().set_parameters(parameters, exact_match=exact_match, device=device)

    @property
    def remaining_timesteps(self) -> int:
        """Environment steps left in the latest run, at least 0."""
        return max(0, self._total_timesteps - self.num_timesteps)

    @classmethod
    def resume(cls, path: str | os.PathLike[str], env: GymEnv, device: th.device | str = "auto", **kwargs: Any) -> Self:
        """
        Resume an interrupted run from a checkpoint of ``TrainingCheckpoint``.

        ``model.learn(model.remaining_timesteps, reset_num_timesteps=False, callback=...)`` then ends with the same
        weights as an uninterrupted run, bit for bit on the CPU. If something prevents that, the checkpoint lists it.
        Pass the same callbacks: their state is part of the checkpoint.

        :param path: Checkpoint, or the folder of checkpoints, whose newest complete one is read.
        :param env: Environments, built as for the interrupted run. They are reset, then their state is restored.
        :param device: PyTorch device, or "auto", as for the constructor.
        :param kwargs: Further arguments of :meth:`load`, such as arguments of the constructor to change; not ``seed``.
        :return: The model.
        :raises FileNotFoundError: If there is no checkpoint.
        :raises ValueError: If all checkpoints are damaged, the environments are built differently, or the file is a
            model without the state of its training, as ``save`` writes it.
        """
        return resume(cls, path, env, device, **kwargs)
