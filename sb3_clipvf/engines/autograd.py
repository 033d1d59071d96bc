"""The reference engine: PyTorch's automatic differentiation, for every SB3 on-policy policy."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_clipvf import objectives
from sb3_clipvf.common.tensors import double_device, to_double
from sb3_clipvf.distributions import current_dist, dist_params, has_exact_kl, kl_from_params, refreshed_dist
from sb3_clipvf.engines.epochs import MinibatchStatistics, UpdateRecord
from sb3_clipvf.engines.interface import Acted, ActedTensors, UpdateCoefficients, UpdateSettings, UpdateStatistics
from sb3_clipvf.engines.reduction import run_shared_epochs
from sb3_clipvf.engines.threads import ProcessWide
from sb3_clipvf.rollout import MiniBatch

EVALUATION_BATCH = 4096
"""Transitions in a forward pass that needs no gradient."""


@contextmanager
def _validation_off() -> Iterator[None]:
    before = th.distributions.Distribution._validate_args
    th.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        th.distributions.Distribution.set_default_validate_args(before)


unvalidated_distributions = ProcessWide(_validation_off)
"""
A context without torch's checks of distributions, each of which reads a number from the device.

The update's own check of the loss finds non-finite parameters, before the step.
"""


class AutogradEngine:
    """Engine for every policy: acts by its own forward pass, and updates it by PyTorch's automatic differentiation."""

    name = "autograd"
    acts_on_arrays = False
    compile_seconds = 0.0

    def __init__(self, policy: ActorCriticPolicy, settings: UpdateSettings) -> None:
        self.policy = policy
        self.settings = settings

    def fits(self, buffer: Any) -> bool:
        """Return True, since this engine runs every policy."""
        return True

    def set_training_mode(self, mode: bool) -> None:
        """Set the policy's training mode, which batch normalisation and dropout read."""
        self.policy.set_training_mode(mode)

    def begin_rollout(self, buffer: Any) -> None:
        """Do nothing, since acting needs no preparation."""

    def act(self, observations: Any, *, with_dist_params: bool) -> Acted:
        """Sample one action for each environment; observations are tensors on the policy's device."""
        return self.act_tensors(observations, with_dist_params=with_dist_params).on_host()

    @th.no_grad()
    def act_tensors(self, observations: Any, *, with_dist_params: bool) -> ActedTensors:
        """Act as :meth:`act` does, without a copy to the host."""
        policy = self.policy
        stale = current_dist(policy) if with_dist_params else None
        actions, values, log_prob = policy(observations)
        params = None
        if with_dist_params:
            dist = refreshed_dist(policy, observations, stale, may_recompute=self.settings.needs_kl)
            if has_exact_kl(dist):
                params = dist_params(dist)
        return ActedTensors(actions, values, log_prob, params)

    @th.no_grad()
    def predict_values(self, observations: Any) -> th.Tensor:
        """Return the values of observations, shape ``(n, 1)``, return units."""
        return self.policy.predict_values(observations)

    @unvalidated_distributions
    def update(self, buffer: Any, coefficients: UpdateCoefficients) -> UpdateStatistics:
        """Run the epochs of one update."""
        record = self._run_epochs(buffer, coefficients)
        return record.statistics(self._kl_after(buffer) if self.settings.measure_kl_after else None)

    def _run_epochs(self, buffer: Any, coefficients: UpdateCoefficients) -> UpdateRecord:
        def run(checks: bool) -> UpdateRecord:
            update = AutogradUpdate(self.policy, self.settings, coefficients, buffer)
            parameters = self.policy.parameters()
            return run_shared_epochs(update, parameters, self.settings, coefficients, buffer, checks=checks)

        if self._reads_are_cheap():
            return run(checks=True)
        # On a GPU, each check waits for the device. Therefore, the update runs without checks, and again with them if a
        # minibatch was not finite. Zeroing its gradients is not enough: Adam's moments would still move.
        before = _Snapshot(self.policy)
        try:
            record = run(checks=False)
            if record.is_finite():
                return record
        except (ValueError, RuntimeError):
            if self.settings.group.size > 1:  # the other processes would not repeat the update
                raise
            # The policy may have rejected its own non-finite numbers; other errors are raised again below.
        before.restore(self.policy)
        return run(checks=True)

    def _reads_are_cheap(self) -> bool:
        return self.policy.device.type == "cpu"

    def _kl_after(self, buffer: Any) -> th.Tensor:
        """Return the mean exact KL(pi_old || pi) over the whole rollout, under the current parameters."""
        # In training mode, batch normalisation would change the policy, and dropout the KL.
        self.policy.set_training_mode(False)
        total = th.zeros((), dtype=th.float64, device=double_device(self.policy.device))
        n_transitions = 0
        with th.no_grad():
            for batch in buffer.in_order(EVALUATION_BATCH):
                dist = self.policy.get_distribution(batch.observations)
                total += to_double(kl_from_params(dist, batch.old_dist_params).sum())
                n_transitions += len(batch.returns)
        self.policy.set_training_mode(True)
        return self.settings.group.mean(total / n_transitions, n_transitions)


class AutogradUpdate:
    """PPO's loss, its gradients and the optimizer's step, for the minibatches of one update."""

    def __init__(
        self, policy: ActorCriticPolicy, settings: UpdateSettings, coefficients: UpdateCoefficients, buffer: Any
    ) -> None:
        self.policy = policy
        self.settings = settings
        self.coefficients = coefficients
        # Mean and divisor of the rollout's advantages, or of a minibatch's in all processes; None: of each minibatch
        self._fixed_moments: tuple[th.Tensor, th.Tensor] | None = None
        if settings.normalizes_rollout:  # else not read: a user's buffer may keep its advantages under another name
            self._fixed_moments = advantage_moments(buffer.advantages, settings, policy.device)
        self._has_penalty = bool(coefficients.kl_coef)

    def loss(self, batch: MiniBatch, measure_kl: bool) -> MinibatchStatistics:
        """Compute the loss of a minibatch, with its graph."""
        coefficients = self.coefficients
        actions = batch.actions.long().flatten() if self.settings.discrete_actions else batch.actions
        stale = current_dist(self.policy)
        values, log_prob, entropy = self.policy.evaluate_actions(batch.observations, actions)
        values = values.flatten()
        log_ratio = log_prob - batch.old_log_prob
        ratio = th.exp(log_ratio)

        policy_loss = -self._surrogate(ratio, self._normalized(batch.advantages))
        value_loss = self._value_loss(values, batch)
        entropy_loss = objectives.entropy_loss(entropy, log_prob)
        loss = policy_loss + coefficients.ent_coef * entropy_loss + coefficients.vf_coef * value_loss
        kl = None
        if self._has_penalty:
            kl = cast(th.Tensor, self._exact_kl(batch, stale, may_recompute=True))
            loss = loss + coefficients.kl_coef * kl
        self._loss = loss

        # Statistics, without the graphs, which would keep the activations in memory
        clipped = vf_clipped = None
        with th.no_grad():
            if kl is None and measure_kl:
                kl = self._exact_kl(batch, stale, may_recompute=self.settings.needs_kl)
            if coefficients.clip_range is not None:
                clipped = objectives.clip_fraction(ratio, coefficients.clip_range)
            if coefficients.clip_range_vf is not None:
                vf_clipped = objectives.vf_clip_fraction(values, batch.old_values, coefficients.clip_range_vf)
            return MinibatchStatistics(
                policy_loss=policy_loss.detach(),
                value_loss=value_loss.detach(),
                entropy_loss=entropy_loss.detach(),
                kl=None if kl is None else kl.detach(),
                loss=loss.detach(),
                approx_kl=objectives.kl_k3(log_ratio),
                ratio_max=ratio.max(),
                clip_fraction=clipped,
                vf_clip_fraction=vf_clipped,
            )

    def set_advantage_moments(self, mean: float, divisor: float) -> None:
        """Normalise advantages as ``(advantages - mean) / divisor`` from the next minibatch on."""
        self._fixed_moments = (th.tensor(mean), th.tensor(divisor))

    def backward(self) -> None:
        """Compute the gradients of the last loss."""
        self.policy.optimizer.zero_grad()
        self._loss.backward()  # type: ignore[no-untyped-call]

    def prepare_step(self) -> th.Tensor:
        """Clip the gradients, and return their joint norm before that."""
        return th.nn.utils.clip_grad_norm_(self.policy.parameters(), self.settings.max_grad_norm).detach()

    def step(self) -> None:
        """Take an optimizer step."""
        self.policy.optimizer.step()

    def _surrogate(self, ratio: th.Tensor, advantages: th.Tensor) -> th.Tensor:
        clip_range = self.coefficients.clip_range
        if clip_range is None:
            return objectives.unclipped_surrogate(ratio, advantages)
        return objectives.clipped_surrogate(ratio, advantages, clip_range)

    def _value_loss(self, values: th.Tensor, batch: MiniBatch) -> th.Tensor:
        clip_range_vf = self.coefficients.clip_range_vf
        if clip_range_vf is None:
            return objectives.value_loss(values, batch.returns)
        if self.settings.vf_clip == "max":
            return objectives.value_loss_clipped_max(values, batch.old_values, batch.returns, clip_range_vf)
        return objectives.value_loss_clipped_prediction(values, batch.old_values, batch.returns, clip_range_vf)

    def _normalized(self, advantages: th.Tensor) -> th.Tensor:
        if self._fixed_moments is not None:
            mean, divisor = self._fixed_moments
            return (advantages - mean) / divisor
        return objectives.normalize_advantages(advantages) if self.settings.normalize_advantage else advantages

    def _exact_kl(self, batch: MiniBatch, stale: object, *, may_recompute: bool) -> th.Tensor | None:
        """Return the mean KL(pi_old || pi) of a minibatch just evaluated; None if it is unknown and not needed."""
        dist = refreshed_dist(self.policy, batch.observations, stale, may_recompute=may_recompute)
        if not may_recompute and not has_exact_kl(dist):
            return None
        return kl_from_params(dist, old_dist_params(batch)).mean()


def advantage_moments(
    advantages: Any, settings: UpdateSettings, device: th.device
) -> tuple[th.Tensor, th.Tensor] | None:
    """
    Return the mean of a rollout's advantages and the divisor that normalises them; None for a single advantage.

    The divisor is the standard deviation plus ``objectives.ADVANTAGE_EPS``.
    """
    if settings.group.size > 1:
        moments = settings.group.moments(advantages)
        return th.tensor(moments.mean), th.tensor(moments.sample_std + objectives.ADVANTAGE_EPS)
    advantages = th.as_tensor(advantages, device=device).flatten()
    if len(advantages) <= 1:
        return None
    return advantages.mean(), advantages.std() + objectives.ADVANTAGE_EPS


def old_dist_params(batch: Any) -> th.Tensor:
    """
    Return the parameters of the rollout's action distribution in a minibatch, shape ``(n, k)``.

    :raises ValueError: If the minibatch has none, though its buffer's class stores them.
    """
    params = getattr(batch, "old_dist_params", None)  # SB3's own minibatches have none
    if params is None:
        raise ValueError(
            f"`rollout_buffer_class` must return minibatches with `old_dist_params`, got {type(batch).__name__}. Yield "
            "sb3_clipvf.rollout.MiniBatch in its get(), or set its `dist_param_dim` to 0."
        )
    return cast(th.Tensor, params)


class _Snapshot:
    """Policy, optimizer and random states before an update, to repeat it."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self._policy_state = copy.deepcopy(policy.state_dict())
        self._optimizer_state = copy.deepcopy(policy.optimizer.state_dict())
        self._numpy, self._torch = np.random.get_state(), th.get_rng_state()
        # Random state of a device whose torch module can return it: th.cuda, th.mps, th.xpu
        self._device = policy.device
        module = getattr(th, self._device.type, None)
        self._module: Any = module if hasattr(module, "get_rng_state") else None
        self._device_state = None if self._module is None else self._module.get_rng_state(self._device)

    def restore(self, policy: ActorCriticPolicy) -> None:
        policy.load_state_dict(self._policy_state)
        policy.optimizer.load_state_dict(self._optimizer_state)
        np.random.set_state(self._numpy)
        th.set_rng_state(self._torch)
        if self._module is not None:
            self._module.set_rng_state(self._device_state, self._device)
