"""The reference engine: PyTorch's automatic differentiation, for every SB3 on-policy policy."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, cast

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_clipvf import objectives
from sb3_clipvf.distributions import dist_param_dim, dist_params, kl_from_params, refreshed_dist
from sb3_clipvf.engines.settings import Acted, UpdateCoefficients, UpdateSettings, UpdateStatistics
from sb3_clipvf.rollout import MiniBatch

EVALUATION_BATCH = 4096
"""Transitions in a forward pass that needs no gradient."""


# How many updates run now, and what to restore after the last of them.
_validation_lock = Lock()
_n_unvalidated = 0
_validated_before = True


@contextmanager
def unvalidated_distributions() -> Iterator[None]:
    """
    Leave out torch's checks of distributions, which read the device two or three times a minibatch.

    Parameters that are not finite are still refused: by :func:`check_finite` after the update, and by the same checks
    in the next rollout's first step. The switch is the process's own: the last of several threads turns it back.
    """
    global _n_unvalidated, _validated_before
    with _validation_lock:
        if _n_unvalidated == 0:
            _validated_before = th.distributions.Distribution._validate_args
            th.distributions.Distribution.set_default_validate_args(False)
        _n_unvalidated += 1
    try:
        yield
    finally:
        with _validation_lock:
            _n_unvalidated -= 1
            if _n_unvalidated == 0:
                th.distributions.Distribution.set_default_validate_args(_validated_before)


class AutogradEngine:
    """
    Acts by a policy's own forward pass, and updates it by minibatch gradient steps.

    :param policy: Its parameters and its optimizer are changed in place.
    :param settings: What stays the same over all updates.
    """

    name = "autograd"

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
        stale = getattr(policy.action_dist, "distribution", None) if with_dist_params else None
        actions, values, log_prob = policy(observations)
        row = None
        if with_dist_params:
            dist = refreshed_dist(policy, observations, stale)
            if dist_param_dim(dist) is not None:
                row = dist_params(dist)
        return Acted(actions.cpu().numpy(), values, log_prob, row)

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
        """
        settings = self.settings
        record = _Record()
        shift_scale = self._rollout_shift_scale(buffer)
        for epoch in range(settings.n_epochs):
            measure_kl = settings.measures_kl(epoch, coefficients)
            record.begin_epoch()
            for batch in buffer.get(settings.batch_size):
                loss = self._loss(batch, coefficients, shift_scale, record, measure_kl)
                if settings.target_kl is not None:
                    approx_kl = float(record.approx_kls[-1])
                    if approx_kl > 1.5 * settings.target_kl:
                        return self._finish(record, buffer, stopped_at_kl=approx_kl)
                self._step(loss, record)
        return self._finish(record, buffer, stopped_at_kl=None)

    def _loss(
        self,
        batch: MiniBatch,
        coefficients: UpdateCoefficients,
        shift_scale: tuple[th.Tensor, th.Tensor] | None,
        record: "_Record",
        measure_kl: bool,
    ) -> th.Tensor:
        """The loss of one minibatch; its terms go into the record."""
        actions = batch.actions.long().flatten() if self.settings.discrete_actions else batch.actions
        stale = getattr(self.policy.action_dist, "distribution", None)
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
            kl = self._exact_kl(batch, stale)
            loss = loss + coefficients.kl_coef * kl

        with th.no_grad():
            if kl is None and measure_kl:
                kl = self._exact_kl(batch, stale)
            terms = {"policy_gradient_loss": policy_loss, "value_loss": value_loss, "entropy_loss": entropy_loss}
            if coefficients.clip_range is not None:
                terms["clip_fraction"] = objectives.clip_fraction(ratio, coefficients.clip_range)
            if coefficients.clip_range_vf is not None:
                terms["vf_clip_fraction"] = objectives.vf_clip_fraction(
                    values, batch.old_values, coefficients.clip_range_vf
                )
            record.add(terms, loss, objectives.kl_k3(log_ratio), kl, ratio.max())
        return loss

    def _step(self, loss: th.Tensor, record: "_Record") -> None:
        self.policy.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        record.grad_norms.append(
            th.nn.utils.clip_grad_norm_(self.policy.parameters(), self.settings.max_grad_norm).detach()
        )
        self.policy.optimizer.step()

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

    def _exact_kl(self, batch: MiniBatch, stale: object) -> th.Tensor:
        """Mean KL(pi_old || pi) of a batch that the policy has just evaluated."""
        dist = refreshed_dist(self.policy, batch.observations, stale)
        # ClipPPO asks for the KL only of buffers that store these.
        old_dist_params = cast(th.Tensor, batch.old_dist_params)
        return kl_from_params(dist, old_dist_params).mean()

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

    def _finish(self, record: "_Record", buffer: Any, stopped_at_kl: float | None) -> UpdateStatistics:
        return record.statistics(
            kl_after=self._kl_after(buffer) if self.settings.measure_kl_after else None,
            stopped_at_kl=stopped_at_kl,
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

    def begin_epoch(self) -> None:
        self.n_epochs += 1
        self.approx_kls, self.kls = [], []

    def add(
        self,
        terms: dict[str, th.Tensor],
        loss: th.Tensor,
        approx_kl: th.Tensor,
        kl: th.Tensor | None,
        ratio_max: th.Tensor,
    ) -> None:
        for name, value in terms.items():
            self.terms.setdefault(name, []).append(value.detach())
        # Only the last loss is reported: keeping the graph of earlier ones would keep their activations.
        self.losses = [loss.detach()]
        self.ratios_max.append(ratio_max)
        self.approx_kls.append(approx_kl)
        if kl is not None:
            self.kls.append(kl.detach())

    def statistics(self, kl_after: th.Tensor | None, stopped_at_kl: float | None) -> UpdateStatistics:
        means = {name: _mean(values) for name, values in self.terms.items()}
        if self.grad_norms:
            means["grad_norm"] = _mean(self.grad_norms)
        return UpdateStatistics(
            means=means,
            last_loss=self.losses[-1],
            approx_kl=_mean(self.approx_kls),
            kl=_mean(self.kls) if self.kls else None,
            kl_after=kl_after,
            ratio_max=th.stack(self.ratios_max).max(),
            n_epochs=self.n_epochs,
            stopped_at_kl=stopped_at_kl,
        )


def _mean(values: Iterable[th.Tensor]) -> th.Tensor:
    # SB3 averages Python floats, that is, in double precision.
    return th.stack(list(values)).double().mean()
