"""ClipPPO: the algorithm under SB3's interface. It validates, collects, hands the update to an engine and logs once."""

import time
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch as th
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.utils import explained_variance, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv

from sb3_clipvf import coefficients
from sb3_clipvf.arguments import (
    SB3_EQUIVALENT,
    check_arguments,
    check_what_sb3_reads,
    check_words,
    warn_of_truncated_minibatches,
)
from sb3_clipvf.building import (
    check_kl_is_stored,
    make_adaptive_kl,
    make_adaptive_lr,
    make_rollout_buffer,
    make_update_settings,
    stored_observation_space,
)
from sb3_clipvf.common import validation
from sb3_clipvf.common.messages import log, show_messages
from sb3_clipvf.engines.interface import Engine, UpdateCoefficients, UpdateStatistics
from sb3_clipvf.engines.selection import is_surpassed, select_engine
from sb3_clipvf.guarded_update import guarded_update
from sb3_clipvf.guards import failures
from sb3_clipvf.policies import (
    SquashedActorCriticCnnPolicy,
    SquashedActorCriticPolicy,
    SquashedMultiInputActorCriticPolicy,
)
from sb3_clipvf.rollout import TensorRolloutBuffer, check_complete, draws_from_complete
from sb3_clipvf.saving import SavedAlgorithm
from sb3_clipvf.schedules import AdaptiveKL, KLAdaptiveLR, Schedule, clamp_progress, make_schedule

__all__ = ["SB3_EQUIVALENT", "ClipPPO"]


class ClipPPO(SavedAlgorithm):
    """
    Proximal Policy Optimization with ratio clipping, a KL penalty, both or neither, and a clipped value loss.

    The update minimises, over minibatches of the rollout of pi_old,
    ``-E[min(r A, clip(r, 1 - clip_range, 1 + clip_range) A)] + kl_coef KL(pi_old || pi) + vf_coef L_vf - ent_coef H``.

    Coefficients marked *schedule* take a number, a function of SB3's ``progress_remaining`` (1 -> 0), or a string
    ``lin_x``, ``cos_x``, ``exp_x``, ``const_x`` with x the value at the start.

    :param policy: Policy class or alias: MlpPolicy, CnnPolicy, MultiInputPolicy, SquashedMlpPolicy, SquashedCnnPolicy,
        SquashedMultiInputPolicy.
    :param env: Environment, VecEnv or registered id.
    :param learning_rate: Schedule, at least 0.
    :param n_steps: Steps of each environment in a rollout. Assigned to the model, it counts from the next rollout on,
        for which a buffer of ours or SB3's is resized; one of another class must be replaced with it.
    :param batch_size: Transitions in a minibatch; more than 1 if advantages are normalised in minibatches.
    :param n_epochs: Passes over the rollout in an update.
    :param gamma: Discount factor, in [0, 1].
    :param gae_lambda: lambda of the advantage estimate, in [0, 1].
    :param clip_range: Schedule, positive: epsilon of the ratio clip. None: the ratio is not clipped.
    :param clip_range_vf: Schedule, positive: the largest change of a value prediction that is let through, in
        ``vf_clip_units``. None: plain squared error.
    :param normalize_advantage: Whether advantages are shifted and scaled to mean 0 and standard deviation 1.
    :param ent_coef: Schedule, at least 0: weight of the entropy.
    :param vf_coef: Schedule, at least 0: weight of the value loss, a mean of squared errors without a factor 1/2.
    :param max_grad_norm: Bound on the joint gradient norm of actor and critic, positive; infinity sets none.
    :param use_sde: Whether to explore with SB3's gSDE.
    :param sde_sample_freq: Steps between new gSDE noise matrices; -1: only at the start of a rollout.
    :param rollout_buffer_class: A buffer class with SB3's ``RolloutBuffer`` interface. None: ``TensorRolloutBuffer``.
    :param rollout_buffer_kwargs: Its further arguments.
    :param target_kl: nats, positive: an update ends before the step of the first minibatch whose estimated KL (k3)
        exceeds 1.5 times this. It reads one number from the device at each minibatch.
    :param stats_window_size: Episodes over which ``rollout/`` statistics are averaged.
    :param tensorboard_log: Folder for TensorBoard. None: no such log.
    :param policy_kwargs: Further arguments of the policy.
    :param verbose: 0 is silent, 1 shows messages, 2 shows details.
    :param seed: Seed of all random states, at least 0.
    :param device: PyTorch device, or "auto".
    :param kl_coef: Schedule, at least 0: weight beta of the exact KL(pi_old || pi), in 1/nats; the initial one where
        it adapts. 0: no penalty.
    :param adaptive_kl_target: d_targ, nats, positive: beta adapts once an update (``schedules.AdaptiveKL``). None: it
        does not.
    :param vf_clip: "max": the larger of the clipped and unclipped squared error; "prediction": SB3's form.
    :param vf_clip_units: "return_std": ``clip_range_vf`` counts in standard deviations of the rollout's returns;
        "absolute": in return units, as in SB3.
    :param advantage_scope: "minibatch" or "rollout": over what advantages are normalised.
    :param lr_kl_target: nats, positive: the learning rate adapts once an update (``schedules.KLAdaptiveLR``). None: it
        follows ``learning_rate``.
    :param on_nonfinite: What comes of a minibatch whose loss or gradient is not finite; it makes no step in any case.
        "raise": the training ends with a ``NonFiniteError``. "skip": it is left out and counted, until the bound of
        ``nonfinite.MAX_UPDATES_WITH_SKIPS``.
    :param engine: "auto" (the fastest that runs the policy), "native", "fused" or "autograd" (``docs/engines.md``).
    :raises ValueError: If an argument is out of range, or two arguments contradict each other. While training, a
        ``NonFiniteError``, which is one, for observations, rewards, values, losses and gradients that are not finite.
    :raises TypeError: If an argument is of the wrong type.
    Source: Schulman et al. 2017, arXiv 1707.06347. Departures: the clipped value loss (OpenAI baselines), advantage
        normalisation and gradient clipping (the same), bounds on beta.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ActorCriticPolicy,
        "CnnPolicy": ActorCriticCnnPolicy,
        "MultiInputPolicy": MultiInputActorCriticPolicy,
        "SquashedMlpPolicy": SquashedActorCriticPolicy,
        "SquashedCnnPolicy": SquashedActorCriticCnnPolicy,
        "SquashedMultiInputPolicy": SquashedMultiInputActorCriticPolicy,
    }
    rollout_buffer: Any
    # Set on the class, it holds for all models that do not have it themselves.
    _warned_of_early_end = False

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
        # `load` makes a model without one.
        if env is not None or _init_setup_model:
            env = validation.as_gymnasium(maybe_make_env(env, verbose))  # type: ignore[arg-type]
            validation.check_env(policy, env, use_sde)
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
            verbose=verbose,
            device=device,
            seed=seed,
            _init_setup_model=False,
        )
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

        # State that lasts over updates, and is saved.
        self.adaptive_kl: AdaptiveKL | None = None
        self.adaptive_lr: KLAdaptiveLR | None = None
        self._schedule_timesteps: int | None = None
        self._updates_with_skips = 0
        # Whose checkpoints are its own.
        self._training_id: str | None = None
        # Built from the arguments when needed, and not saved.
        self._schedules: dict[str, tuple[Any, Schedule]] = {}
        self._engine: Engine | None = None
        self._engine_reason = ("", "", "")
        self._loads_sb3 = False
        self._warned_of_missing_kl = False

        if _init_setup_model:
            self._setup_model()
            warn_of_truncated_minibatches(self)

    def _setup_model(self) -> None:
        """Check the arguments, then build what they describe; SB3's ``load`` comes here as well."""
        if self._loads_sb3 and self.rollout_buffer_class in (RolloutBuffer, DictRolloutBuffer):
            # SB3 writes the class that it picked itself; ours draws the same minibatches.
            self.rollout_buffer_class = None
        check_arguments(self)
        validation.check_env(self.policy_class, self, self.use_sde)
        validation.check_observations(self.policy_class, self.policy_kwargs, self.observation_space)
        show_messages(self.verbose)
        # Schedules are refused before anything is built or drawn.
        self._schedules = {}
        for name in coefficients.NAMES:
            coefficients.schedule_of(self, name)
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.policy = self.policy_class(
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            use_sde=self.use_sde,
            **self.policy_kwargs,
        ).to(self.device)  # type: ignore[assignment]
        self.rollout_buffer = make_rollout_buffer(self)
        self._maybe_recommend_cpu()
        self._setup_controllers()
        self._engine = None

    def _setup_controllers(self) -> None:
        """Start the controllers of the KL, or go on with the beta and the rate that they have come to."""
        kl_coef = cast(Schedule, coefficients.schedule_of(self, "kl_coef"))
        self.adaptive_kl = make_adaptive_kl(self.adaptive_kl, self.adaptive_kl_target, kl_coef)
        self.adaptive_lr = make_adaptive_lr(self.adaptive_lr, self.lr_kl_target, self.lr_schedule)

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = make_schedule(self.learning_rate, "learning_rate")

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        return SavedAlgorithm._wrap_env(validation.as_gymnasium(env), verbose, monitor_wrapper)

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        validation.check_choice("policy", policy_name, tuple(self.policy_aliases), "Or pass a policy class.")
        return self.policy_aliases[policy_name]

    # ------------------------------------------------------------------ schedules and progress

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        horizon = self._schedule_timesteps or total_timesteps
        self._current_progress_remaining = clamp_progress(1.0 - float(num_timesteps) / float(horizon))

    def _update_learning_rate(self, optimizers: Any) -> None:
        if self.adaptive_lr is None:
            super()._update_learning_rate(optimizers)
            return
        self.logger.record("train/learning_rate", self.adaptive_lr.learning_rate)
        update_learning_rate(optimizers, self.adaptive_lr.learning_rate)

    # ------------------------------------------------------------------ update

    @np.errstate(over="ignore", invalid="ignore")  # such numbers are told of by name
    def train(self) -> None:
        """
        Update the policy from the rollout in the buffer, adapt the controllers, and log.

        :raises ValueError: If the rollout is not complete, or lacks the old distribution where an argument needs it.
        """
        started = time.perf_counter()
        if draws_from_complete(self.rollout_buffer):
            check_complete(self.rollout_buffer)
        if isinstance(self.rollout_buffer, TensorRolloutBuffer):
            self.rollout_buffer.forget_copies()
        show_messages(self.verbose)
        check_kl_is_stored(self)
        # Callbacks may have changed these arguments since the last update.
        check_words(self)
        self._setup_controllers()
        engine = self._current_engine()
        engine.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        current = coefficients.update_coefficients(self)
        statistics = guarded_update(self, engine, current)
        self._n_updates += statistics.n_epochs
        if statistics.stopped_at_kl is not None:
            log.info(
                "Early stopping at step %d due to reaching max kl: %.2f",
                statistics.n_epochs - 1,
                statistics.stopped_at_kl,
            )
        if statistics.kl_after is not None:
            self._adapt(float(statistics.kl_after))
        self._log_update(statistics, current)
        self.logger.record("time/update_seconds", time.perf_counter() - started)

    def _current_engine(self) -> Engine:
        """The engine for the policy and the arguments as they are now: callbacks may have replaced them."""
        settings = make_update_settings(self)
        if self._engine is None or not self._engine_stays(self._engine):
            told = self._engine_reason
            self._engine, reason = select_engine(self.engine, self.policy, settings, self.rollout_buffer)
            self._engine_reason = (self.engine, self._engine.name, reason)
            if self._engine_reason != told:
                log.info("Training runs on the engine %r: %s", self._engine.name, reason)
        self._engine.settings = settings
        return self._engine

    def _engine_stays(self, engine: Engine) -> bool:
        if engine.policy is not self.policy or self.engine != self._engine_reason[0]:
            return False
        # What kept a faster engine from running the policy may be gone.
        if self.engine == "auto" and is_surpassed(engine, self.rollout_buffer):
            return False
        return engine.fits(self.rollout_buffer)

    def _adapt(self, kl_after: float) -> None:
        if self.adaptive_kl is not None:
            self.adaptive_kl = self.adaptive_kl.next(kl_after)
        if self.adaptive_lr is not None:
            self.adaptive_lr = self.adaptive_lr.next(kl_after)

    def _log_update(self, statistics: UpdateStatistics, current: UpdateCoefficients) -> None:
        record = self.logger.record
        for name, value in statistics.read().items():
            record(f"train/{name}", value)
        if self.on_nonfinite == "skip":
            record("train/skipped_minibatches", statistics.n_skipped)
        record("train/kl_coef", current.kl_coef)
        values, returns = self.rollout_buffer.values.flatten(), self.rollout_buffer.returns.flatten()
        record("train/explained_variance", explained_variance(values, returns))
        if hasattr(self.policy, "log_std"):
            record("train/std", th.exp(self.policy.log_std).mean().item())
        record("train/n_updates", self._n_updates, exclude="tensorboard")
        if current.clip_range is not None:
            record("train/clip_range", current.clip_range)
        if current.clip_range_vf is not None:
            record("train/clip_range_vf", current.clip_range_vf)

    # ------------------------------------------------------------------ learn

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Go on in other environments.

        :param env: Their spaces and their number must be those of the model; :meth:`load` takes another number.
        :param force_reset: Whether to reset them before training.
        :raises ValueError: If the spaces are others.
        :raises AssertionError: If the number is another.
        """
        show_messages(self.verbose)
        with validation.same_spaces():
            super().set_env(env, force_reset)
        buffer = getattr(self, "rollout_buffer", None)
        if buffer is not None and buffer.observation_space != stored_observation_space(self):
            self.rollout_buffer = make_rollout_buffer(self)

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
        Train.

        :param total_timesteps: Environment steps of this call, over all environments; whole rollouts are collected, so
            the last one may go beyond. A float with a whole value, such as 1e6, is fine.
        :param callback: Called at each step.
        :param log_interval: Updates between two logs. None: never.
        :param tb_log_name: Name of the TensorBoard run.
        :param reset_num_timesteps: Whether this starts counting steps at 0, or goes on.
        :param progress_bar: Whether to show one.
        :param schedule_timesteps: Environment steps, counted from 0, at which schedules end. Give it where training
            runs over several calls with ``reset_num_timesteps=False``; later calls keep it. None at first: SB3's way,
            in which schedules end with each call.
        :return: This model.
        :raises ValueError: If a number is out of range, or there is no environment.
        """
        show_messages(self.verbose)
        total = validation.check_int("total_timesteps", total_timesteps, 0, "Pass the number of environment steps.")
        horizon = None
        if schedule_timesteps is not None:
            horizon = validation.check_int(
                "schedule_timesteps", schedule_timesteps, 1, "Pass the environment steps of the whole training."
            )
        if log_interval is not None:
            log_interval = validation.check_int("log_interval", log_interval, 1, "None turns it off.")
        self.n_steps = validation.check_int("n_steps", self.n_steps, 1, "SB3's default is 2048.")
        if self.env is None:
            raise ValueError("`env` must be set before learning, got None. Pass it to `load`, or call `set_env`.")
        failures.check_ready(self)
        if horizon is not None or reset_num_timesteps:
            self._schedule_timesteps = horizon
        failures.tell_of_n_envs(self)
        coefficients.warn_of_early_end(self, total, reset_num_timesteps)
        with failures.told(self, callback):
            return super().learn(
                total_timesteps=total,
                callback=callback,
                log_interval=log_interval,  # type: ignore[arg-type]
                tb_log_name=tb_log_name,
                reset_num_timesteps=reset_num_timesteps,
                progress_bar=progress_bar,
            )
