"""The reference engine: PyTorch's automatic differentiation, for every SB3 on-policy policy."""

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_clipvf import objectives
from sb3_clipvf.common.nonfinite import BadMinibatchError, drawn_indices
from sb3_clipvf.distributions import current_dist, dist_params, has_exact_kl, kl_from_params, refreshed_dist
from sb3_clipvf.engines.interface import Acted, UpdateCoefficients, UpdateSettings, UpdateStatistics, named_terms
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


_unvalidated = ProcessWide(_validation_off)


@contextmanager
def unvalidated_distributions() -> Iterator[None]:
    """
    Leave out torch's checks of distributions, which read the device two or three times a minibatch.

    Parameters that are not finite are found by the loss, before its step. The switch is the process's own: the last of
    several threads turns it back.
    """
    with _unvalidated.inside():
        yield


def old_dist_params(batch: Any) -> th.Tensor:
    """
    Find the parameters of the rollout's action distribution in a minibatch.

    :param batch: From the rollout buffer.
    :return: Shape ``(n, k)``.
    :raises ValueError: If it has none, though its buffer's class stores them.
    """
    params = getattr(batch, "old_dist_params", None)  # SB3's own minibatches have none
    if params is None:
        raise ValueError(
            f"`rollout_buffer_class` must give minibatches with `old_dist_params`, got {type(batch).__name__} without. "
            "Let its get() yield sb3_clipvf.rollout.MiniBatch, or set its `dist_param_dim` to 0."
        )
    return cast(th.Tensor, params)


class AutogradEngine:
    """
    Acts by a policy's own forward pass, and updates it by minibatch gradient steps.

    :param policy: Its parameters and its optimizer are changed in place.
    :param settings: What stays the same over all updates.
    """

    name = "autograd"
    acts_on_arrays = False
    compile_seconds = 0.0

    def __init__(self, policy: ActorCriticPolicy, settings: UpdateSettings) -> None:
        self.policy = policy
        self.settings = settings

    def fits(self, buffer: Any) -> bool:
        """
        Tell whether this engine still runs its policy: it runs every one.

        :param buffer: The rollout buffer.
        :return: True.
        """
        return True

    def set_training_mode(self, mode: bool) -> None:
        """
        Say to the policy whether it is being trained.

        :param mode: Whether it is.
        """
        self.policy.set_training_mode(mode)

    def begin_rollout(self, buffer: Any) -> None:
        """
        Make ready for the steps of a rollout: there is nothing to do.

        :param buffer: Will be filled.
        """

    @th.no_grad()
    def act(self, observations: Any, *, with_dist_params: bool) -> Acted:
        """
        Sample one action for each environment.

        :param observations: Tensors on the policy's device, ``n_envs`` rows.
        :param with_dist_params: Whether the distribution's parameters are wanted.
        :return: What the rollout stores.
        """
        policy = self.policy
        stale = current_dist(policy) if with_dist_params else None
        actions, values, log_prob = policy(observations)
        row = None
        if with_dist_params:
            dist = refreshed_dist(policy, observations, stale, may_recompute=self.settings.needs_kl)
            if has_exact_kl(dist):
                row = dist_params(dist).cpu().numpy()
        return Acted(actions.cpu().numpy(), values.cpu().numpy(), log_prob.cpu().numpy(), row)

    @th.no_grad()
    def predict_values(self, observations: Any) -> th.Tensor:
        """
        Predict the values of observations.

        :param observations: Tensors on the policy's device, ``n`` rows.
        :return: Shape ``(n, 1)``, return units.
        """
        return self.policy.predict_values(observations)

    @unvalidated_distributions()
    def update(self, buffer: Any, coefficients: UpdateCoefficients) -> UpdateStatistics:
        """
        Run the epochs of one update.

        :param buffer: A complete rollout: ours, or any with the interface of SB3's ``RolloutBuffer``.
        :param coefficients: Of this update.
        :return: Statistics, on the device of the policy.
        :raises BadMinibatchError: If a minibatch is not finite, unless it may be skipped; or if each one was skipped.
        """
        if self._may_read():
            return cast(UpdateStatistics, self._run(buffer, coefficients, looks=True))
        # A GPU would have to be waited for at each look. So the update runs without, and once more with it in the rare
        # case that a minibatch was not finite. Setting its gradients to 0 would not do: Adam would still move.
        start = _Start(self.policy)
        try:
            statistics = self._run(buffer, coefficients, looks=False)
        except (ValueError, RuntimeError):
            # The policy may have refused what a look would have kept from it; any other error comes once more.
            statistics = None
        if statistics is None:
            start.restore(self.policy)
            statistics = self._run(buffer, coefficients, looks=True)
        return cast(UpdateStatistics, statistics)

    def _may_read(self) -> bool:
        return self.policy.device.type == "cpu"

    def _run(self, buffer: Any, coefficients: UpdateCoefficients, *, looks: bool) -> UpdateStatistics | None:
        """
        Run all epochs.

        :param buffer: A complete rollout.
        :param coefficients: Of this update.
        :param looks: Whether to look at each minibatch before its step.
        :return: None if a minibatch was not finite and nobody has looked.
        """
        settings = self.settings
        record, state = _Record(), np.random.get_state()
        shift_scale = self._rollout_shift_scale(buffer)
        for epoch in range(settings.n_epochs):
            measure_kl = settings.measures_kl(epoch, coefficients)
            record.begin_epoch()
            for number, batch in enumerate(buffer.get(settings.batch_size)):
                minibatch = self._loss(batch, coefficients, shift_scale, measure_kl)
                if not self._step(minibatch, looks=looks):
                    record.n_skipped += 1
                    if record.skipped is None:
                        indices = drawn_indices(state, buffer, epoch, number * settings.batch_size, batch)
                        terms = minibatch.named(coefficients)
                        record.skipped = BadMinibatchError(terms, epoch, number, batch, indices)
                    if settings.on_nonfinite == "raise":
                        raise record.skipped
                    continue
                record.add(minibatch)
                if minibatch.grad_norm is None:
                    return self._finish(record, buffer, float(minibatch.approx_kl), looks=looks)
        if record.skipped is not None and not record.losses:
            raise record.skipped
        return self._finish(record, buffer, None, looks=looks)

    def _step(self, minibatch: "_Minibatch", *, looks: bool) -> bool:
        """
        Make a step, unless ``target_kl`` ends the update before it.

        :return: False where there is none since the loss or the gradient is not finite.
        """
        target_kl = self.settings.target_kl
        if looks and not math.isfinite(float(minibatch.loss.detach())):
            return False
        if target_kl is not None and float(minibatch.approx_kl) > 1.5 * target_kl:
            return True
        self.policy.optimizer.zero_grad()
        minibatch.loss.backward()  # type: ignore[no-untyped-call]
        norm = th.nn.utils.clip_grad_norm_(self.policy.parameters(), self.settings.max_grad_norm).detach()
        minibatch.grad_norm = norm
        if looks and not math.isfinite(float(norm)):
            return False
        self.policy.optimizer.step()
        return True

    def _loss(
        self,
        batch: MiniBatch,
        coefficients: UpdateCoefficients,
        shift_scale: tuple[th.Tensor, th.Tensor] | None,
        measure_kl: bool,
    ) -> "_Minibatch":
        """The loss of one minibatch, and what is measured of it."""
        actions = batch.actions.long().flatten() if self.settings.discrete_actions else batch.actions
        stale = current_dist(self.policy)
        values, log_prob, entropy = self.policy.evaluate_actions(batch.observations, actions)
        values = values.flatten()
        log_ratio = log_prob - batch.old_log_prob
        ratio = th.exp(log_ratio)

        policy_loss = -self._surrogate(ratio, self._advantages(batch, shift_scale), coefficients.clip_range)
        value_loss = self._value_loss(values, batch, coefficients.clip_range_vf)
        entropy_loss = objectives.entropy_loss(entropy, log_prob)
        loss = policy_loss + coefficients.ent_coef * entropy_loss + coefficients.vf_coef * value_loss
        kl = None
        if coefficients.kl_coef:
            kl = cast(th.Tensor, self._exact_kl(batch, stale, asks=True))
            loss = loss + coefficients.kl_coef * kl

        with th.no_grad():
            if kl is None and measure_kl:
                kl = self._exact_kl(batch, stale, asks=self.settings.needs_kl)
            terms = {"policy_gradient_loss": policy_loss, "value_loss": value_loss, "entropy_loss": entropy_loss}
            if coefficients.clip_range is not None:
                terms["clip_fraction"] = objectives.clip_fraction(ratio, coefficients.clip_range)
            if coefficients.clip_range_vf is not None:
                terms["vf_clip_fraction"] = objectives.vf_clip_fraction(
                    values, batch.old_values, coefficients.clip_range_vf
                )
            # Keeping the terms' graphs would keep their activations.
            terms = {name: term.detach() for name, term in terms.items()}
            kl = None if kl is None else kl.detach()
            return _Minibatch(loss, terms, objectives.kl_k3(log_ratio), kl, ratio.max())

    def _surrogate(self, ratio: th.Tensor, advantages: th.Tensor, clip_range: float | None) -> th.Tensor:
        if clip_range is None:
            return objectives.unclipped_surrogate(ratio, advantages)
        return objectives.clipped_surrogate(ratio, advantages, clip_range)

    def _value_loss(self, values: th.Tensor, batch: MiniBatch, clip_range_vf: float | None) -> th.Tensor:
        if clip_range_vf is None:
            return objectives.value_loss(values, batch.returns)
        if self.settings.vf_clip == "max":
            return objectives.value_loss_clipped_max(values, batch.old_values, batch.returns, clip_range_vf)
        return objectives.value_loss_clipped_prediction(values, batch.old_values, batch.returns, clip_range_vf)

    def _advantages(self, batch: MiniBatch, shift_scale: tuple[th.Tensor, th.Tensor] | None) -> th.Tensor:
        if shift_scale is not None:
            shift, scale = shift_scale
            return (batch.advantages - shift) / scale
        if self.settings.normalize_advantage:
            return objectives.normalize_advantages(batch.advantages)
        return batch.advantages

    def _rollout_shift_scale(self, buffer: Any) -> tuple[th.Tensor, th.Tensor] | None:
        """Mean and standard deviation over the rollout, where advantages are normalised over it."""
        if not (self.settings.normalize_advantage and self.settings.advantage_scope == "rollout"):
            return None
        advantages = th.as_tensor(buffer.advantages, device=self.policy.device).flatten()
        if len(advantages) <= 1:
            return None
        return advantages.mean(), advantages.std() + objectives.ADVANTAGE_EPS

    def _exact_kl(self, batch: MiniBatch, stale: object, *, asks: bool) -> th.Tensor | None:
        """Mean KL(pi_old || pi) of a batch that was just evaluated; None where it is neither known nor needed."""
        dist = refreshed_dist(self.policy, batch.observations, stale, may_recompute=asks)
        if not asks and not has_exact_kl(dist):
            return None
        return kl_from_params(dist, old_dist_params(batch)).mean()

    def _kl_after(self, buffer: Any) -> th.Tensor:
        """Mean exact KL(pi_old || pi) over the whole rollout, under the parameters as they are now."""
        # Batch normalisation and dropout would let the measurement change the policy, or the KL.
        self.policy.set_training_mode(False)
        total = th.zeros((), dtype=th.float64, device=self.policy.device)
        n_transitions = 0
        with th.no_grad():
            for batch in buffer.in_order(EVALUATION_BATCH):
                dist = self.policy.get_distribution(batch.observations)
                total += kl_from_params(dist, batch.old_dist_params).sum()
                n_transitions += len(batch.returns)
        self.policy.set_training_mode(True)
        return total / n_transitions

    def _finish(
        self, record: "_Record", buffer: Any, stopped_at_kl: float | None, *, looks: bool
    ) -> UpdateStatistics | None:
        if not looks and not record.is_finite():
            return None
        return record.statistics(
            kl_after=self._kl_after(buffer) if self.settings.measure_kl_after else None,
            stopped_at_kl=stopped_at_kl,
        )


class _Start:
    """What an update changes, as it was before it."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self._policy_state = copy.deepcopy(policy.state_dict())
        self._optimizer_state = copy.deepcopy(policy.optimizer.state_dict())
        self._numpy, self._torch = np.random.get_state(), th.get_rng_state()
        # Of the device itself, where torch lets it be read: th.cuda, th.mps, th.xpu.
        self._device = policy.device
        module = getattr(th, self._device.type, None)
        self._module: Any = module if hasattr(module, "get_rng_state") else None
        self._of_device = None if self._module is None else self._module.get_rng_state(self._device)

    def restore(self, policy: ActorCriticPolicy) -> None:
        policy.load_state_dict(self._policy_state)
        policy.optimizer.load_state_dict(self._optimizer_state)
        np.random.set_state(self._numpy)
        th.set_rng_state(self._torch)
        if self._module is not None:
            self._module.set_rng_state(self._of_device, self._device)


@dataclass
class _Minibatch:
    """One minibatch: scalars on the policy's device, read by nobody yet. Without gradient norm there was no step."""

    loss: th.Tensor
    terms: dict[str, th.Tensor]
    approx_kl: th.Tensor
    kl: th.Tensor | None
    ratio_max: th.Tensor
    grad_norm: th.Tensor | None = None

    def named(self, coefficients: UpdateCoefficients) -> dict[str, float]:
        """:return: Terms as :class:`BadMinibatchError` takes them."""
        return named_terms(
            coefficients,
            policy_loss=float(self.terms["policy_gradient_loss"]),
            value_loss=float(self.terms["value_loss"]),
            entropy_loss=float(self.terms["entropy_loss"]),
            kl=0.0 if self.kl is None else float(self.kl),
            loss=float(self.loss.detach()),
            grad_norm=0.0 if self.grad_norm is None else float(self.grad_norm),
        )


class _Record:
    """The statistics of an update while it runs: scalars on the policy's device, read by nobody yet."""

    def __init__(self) -> None:
        self.terms: dict[str, list[th.Tensor]] = {}
        self.losses: list[th.Tensor] = []
        self.ratios_max: list[th.Tensor] = []
        self.grad_norms: list[th.Tensor] = []
        self.approx_kls: list[th.Tensor] = []
        self.kls: list[th.Tensor] = []
        self.n_epochs = 0
        self.n_skipped = 0
        self.skipped: BadMinibatchError | None = None

    def begin_epoch(self) -> None:
        self.n_epochs += 1
        self.approx_kls, self.kls = [], []

    def add(self, minibatch: _Minibatch) -> None:
        for name, value in minibatch.terms.items():
            self.terms.setdefault(name, []).append(value)
        self.losses.append(minibatch.loss.detach())
        self.ratios_max.append(minibatch.ratio_max)
        self.approx_kls.append(minibatch.approx_kl)
        if minibatch.kl is not None:
            self.kls.append(minibatch.kl)
        if minibatch.grad_norm is not None:
            self.grad_norms.append(minibatch.grad_norm)

    def is_finite(self) -> bool:
        return bool(th.stack([*self.losses, *self.grad_norms]).isfinite().all())

    def statistics(self, kl_after: th.Tensor | None, stopped_at_kl: float | None) -> UpdateStatistics:
        means = {name: _mean(values) for name, values in self.terms.items()}
        if self.grad_norms:
            means["grad_norm"] = _mean(self.grad_norms)
        return UpdateStatistics(
            means=means,
            last_loss=self.losses[-1],
            # All of the last epoch may have been skipped.
            approx_kl=_mean(self.approx_kls) if self.approx_kls else th.tensor(math.nan),
            kl=_mean(self.kls) if self.kls else None,
            kl_after=kl_after,
            ratio_max=th.stack(self.ratios_max).max(),
            n_epochs=self.n_epochs,
            stopped_at_kl=stopped_at_kl,
            n_skipped=self.n_skipped,
            skipped=self.skipped,
        )


def _mean(values: Iterable[th.Tensor]) -> th.Tensor:
    # SB3 averages Python floats, that is, in double precision.
    return th.stack(list(values)).double().mean()
