"""
PPO's loss for minibatches that run together, in few operations.

On a GPU, an operation on few numbers takes as long as one on thousands. Terms that need no network are therefore
computed for all minibatches at once. The derivative of the surrogate is a formula, without automatic differentiation.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_clipvf import objectives
from sb3_clipvf.distributions import current_dist
from sb3_clipvf.engines.autograd import AutogradUpdate, old_dist_params
from sb3_clipvf.engines.cuda.static_distributions import replaced_distribution, short_distribution
from sb3_clipvf.engines.cuda.static_policy import reduced_precision
from sb3_clipvf.engines.interface import UpdateCoefficients, UpdateSettings
from sb3_clipvf.rollout import MiniBatch

COEFFICIENTS = tuple(UpdateCoefficients.__dataclass_fields__)
# Coefficients, bounds of the ratio, mean and divisor of the rollout's advantages
_N_NUMBERS = len(COEFFICIENTS) + 4

LOGGED = (
    *("policy_loss", "value_loss", "entropy_loss", "kl", "loss", "grad_norm", "approx_kl"),
    *("ratio_max", "clip_fraction", "vf_clip_fraction"),
)
"""Statistics of a minibatch. Those of the first line are known before its step, ``approx_kl`` with ``target_kl``."""


class StaticLoss(AutogradUpdate):
    """The loss of minibatches, whose coefficients are numbers on the device, and its gradients."""

    def __init__(
        self,
        policy: ActorCriticPolicy,
        settings: UpdateSettings,
        coefficients: UpdateCoefficients,
        advantages: th.Tensor,
        autocast: th.dtype | None,
    ) -> None:
        super().__init__(policy, settings, coefficients, SimpleNamespace(advantages=advantages))
        self._autocast = autocast
        self._has_entropy = bool(coefficients.ent_coef)
        self._numbers = th.zeros(_N_NUMBERS, device=policy.device)
        *numbers, low, high, mean, divisor = self._numbers
        given = dict(zip(COEFFICIENTS, numbers, strict=True))
        absent = {name: None for name in COEFFICIENTS if getattr(coefficients, name) is None}
        self.coefficients = UpdateCoefficients(**{**given, **absent})
        self._bounds = low, high
        if self._fixed_moments is not None:
            self._fixed_moments = (mean, divisor)
        self._short_dist = short_distribution(policy.action_dist)
        # Tensors that the latest loss is computed from, and its derivatives with respect to them
        self._roots: list[th.Tensor] = []
        self._slopes: list[th.Tensor] = []
        #: Log-ratios and values of the latest minibatch, shape ``(n,)``.
        self.log_ratio, self.values = th.empty(0), th.empty(0)

    def load(self, coefficients: UpdateCoefficients, moments: tuple[th.Tensor, th.Tensor] | None) -> None:
        """Copy the numbers of an update to the device."""
        clip_range = coefficients.clip_range or 0.0
        numbers = [getattr(coefficients, name) or 0.0 for name in COEFFICIENTS] + [1 - clip_range, 1 + clip_range]
        self._numbers[: len(numbers)].copy_(th.tensor(numbers, dtype=th.float32))
        if moments is not None:
            self._numbers[len(numbers) :].copy_(th.stack(moments))

    @th.no_grad()
    def prepared(self, whole: MiniBatch, sizes: Sequence[int]) -> MiniBatch:
        """Return the transitions of minibatches of these sizes with normalised advantages, and actions for policies."""
        parts = _by_minibatch(self._normalized, sizes, whole.advantages)
        actions = whole.actions.long().flatten() if self.settings.discrete_actions else whole.actions
        return whole._replace(advantages=th.cat([part.flatten() for part in parts]), actions=actions)

    def statistics(self, batch: MiniBatch, measure_kl: bool) -> dict[str, th.Tensor]:
        """Compute the loss of a prepared minibatch, and return it with the other statistics that are known by then."""
        coefficients: Any = self.coefficients
        stale = current_dist(self.policy)
        with replaced_distribution(self.policy, self._short_dist), reduced_precision(self.policy, self._autocast):
            values, log_prob, entropy = self.policy.evaluate_actions(batch.observations, batch.actions)
        values = values.flatten()
        found = {
            "value_loss": self._value_loss(values, batch),
            "entropy_loss": objectives.entropy_loss(entropy, log_prob),
        }
        weights = {"value_loss": coefficients.vf_coef}
        if self._has_entropy:
            weights["entropy_loss"] = coefficients.ent_coef
        if self._has_penalty:
            weights["kl"] = coefficients.kl_coef
        if self._has_penalty or measure_kl:
            kl = self._exact_kl(batch, stale, may_recompute=self._has_penalty or self.settings.needs_kl)
            found |= {} if kl is None else {"kl": kl}
        with th.no_grad():
            # Without its graph, which would stay until the last minibatch
            self.log_ratio, self.values = log_prob - batch.old_log_prob, values.detach()
            loss, slope = self._surrogate_and_slope(self.log_ratio.exp(), batch.advantages)
            self._roots = [log_prob, *(found[name] for name in weights)]
            self._slopes = [slope, *weights.values()]
            found["policy_loss"] = loss
            for name, weight in weights.items():
                loss = th.addcmul(loss, weight, found[name])
            found["loss"] = loss
            if self.settings.target_kl is not None:
                found["approx_kl"] = objectives.kl_k3(self.log_ratio)
        return found

    def gradients(self, leaves: list[th.Tensor]) -> list[th.Tensor | None]:
        """Return the gradients of the last loss with respect to these tensors; None if it does not depend on one."""
        roots, self._roots = self._roots, []
        return list(th.autograd.grad(roots, leaves, self._slopes, allow_unused=True))

    @th.no_grad()
    def write_log(
        self, log: th.Tensor, whole: MiniBatch, sizes: Sequence[int], log_ratio: th.Tensor, values: th.Tensor
    ) -> None:
        """Write the statistics of minibatches that only the log needs into their rows of it."""
        clip_range, clip_range_vf = self.coefficients.clip_range, self.coefficients.clip_range_vf
        none = th.zeros_like(log[0, 0])

        def of_minibatch(log_ratio: th.Tensor, values: th.Tensor, old_values: th.Tensor) -> th.Tensor:
            ratio = th.exp(log_ratio)
            return th.stack(
                [
                    *([objectives.kl_k3(log_ratio)] if self.settings.target_kl is None else []),
                    ratio.max(),
                    none if clip_range is None else objectives.clip_fraction(ratio, clip_range),
                    none if clip_range_vf is None else objectives.vf_clip_fraction(values, old_values, clip_range_vf),
                ]
            )

        found = th.cat(_by_minibatch(of_minibatch, sizes, log_ratio, values, whole.old_values))
        log[: len(sizes), -found.shape[1] :].copy_(found)

    def _exact_kl(self, batch: MiniBatch, stale: object, *, may_recompute: bool) -> th.Tensor | None:
        if self._short_dist is None:
            return super()._exact_kl(batch, stale, may_recompute=may_recompute)
        return self._short_dist.kl_from(old_dist_params(batch)).mean()

    def _surrogate_and_slope(self, ratio: th.Tensor, advantages: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Return the loss of ``objectives.clipped_surrogate``, and its derivative with respect to log pi, shape ``(n,)``.

        The derivative is ``A * ratio`` where ``A * ratio <= A * clip(ratio)``, and 0 elsewhere. Both are divided by -n.
        """
        unclipped = advantages * ratio
        if self.coefficients.clip_range is None:
            return -unclipped.mean(), unclipped * (-1 / len(ratio))
        clipped = advantages * th.clamp(ratio, *self._bounds)
        loss = -th.minimum(unclipped, clipped).mean()
        return loss, unclipped * (unclipped <= clipped) * (-1 / len(ratio))


def _by_minibatch(
    function: Callable[..., th.Tensor], sizes: Sequence[int], *columns: th.Tensor
) -> tuple[th.Tensor, ...]:
    """
    Return a function's results for minibatches of columns ``(n,)``: those of equal ones, then that of a smaller last.

    Minibatches are the first axis of each result.
    """
    n_equal, size = sizes.count(sizes[0]), sizes[0]
    n = n_equal * size
    equal = th.vmap(function)(*(column[:n].view(n_equal, size) for column in columns))
    return (equal,) if n_equal == len(sizes) else (equal, function(*(column[n:] for column in columns))[None])
