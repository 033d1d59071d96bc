"""
SB3's two most common action distributions with fewer operations: those that an update needs.

torch's ``Normal`` computes with a standard deviation for each state, and its derivative takes twenty operations. Here
derivatives are formulas, which tests compare with SB3's. Log-probabilities have the same bits as SB3's, so that the
ratio of an unchanged policy is 1.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch as th
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_clipvf import objectives

_LOG_SQRT_TAU = math.log(math.sqrt(2 * math.pi))


class SharedStdGaussian(DiagGaussianDistribution):
    """Diagonal Gaussians whose standard deviations do not depend on the state."""

    mean: th.Tensor
    log_std: th.Tensor

    def proba_distribution(self, mean_actions: th.Tensor, log_std: th.Tensor) -> Self:
        """Set means ``(n, action_dim)`` and log standard deviations."""
        self.mean, self.log_std = mean_actions, log_std
        return self

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """Return log-probabilities ``(n,)``, nats."""
        log_prob: th.Tensor = _GaussianLogProb.apply(self.mean, self.log_std, actions)  # type: ignore[no-untyped-call]
        return log_prob

    def entropy(self) -> th.Tensor:
        """Return the entropy of all states, nats, as a scalar."""
        return self.log_std.sum() + self.action_dim * (0.5 + _LOG_SQRT_TAU)

    def kl_from(self, old_params: th.Tensor) -> th.Tensor:
        """Return the KL from distributions with these parameters, as ``kl_from_params`` does, shape ``(n,)``."""
        old_mean, old_log_std = old_params.chunk(2, dim=-1)
        return objectives.gaussian_kl(old_mean, old_log_std, self.mean, self.log_std)


class LogProbCategorical(CategoricalDistribution):
    """Categorical distributions that keep their log-probabilities."""

    log_probs: th.Tensor

    def proba_distribution(self, action_logits: th.Tensor) -> Self:
        """Set unnormalised log-probabilities ``(n, n_actions)``."""
        self.log_probs = _LogProbs.apply(action_logits)  # type: ignore[no-untyped-call]
        return self

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """Return log-probabilities of actions ``(n,)``, nats."""
        return self.log_probs.gather(1, actions.unsqueeze(1)).squeeze(1)

    def entropy(self) -> th.Tensor:
        """Return entropies ``(n,)``, nats."""
        entropy: th.Tensor = _CategoricalEntropy.apply(self.log_probs)  # type: ignore[no-untyped-call]
        return entropy

    def kl_from(self, old_params: th.Tensor) -> th.Tensor:
        """Return the KL from distributions with these parameters, as ``kl_from_params`` does, shape ``(n,)``."""
        return objectives.categorical_kl(old_params, _finite(self.log_probs))


_SHORT = {DiagGaussianDistribution: SharedStdGaussian, CategoricalDistribution: LogProbCategorical}


def short_distribution(dist: Any) -> SharedStdGaussian | LogProbCategorical | None:
    """Return a distribution like SB3's with fewer operations; None for other kinds."""
    kind: Any = _SHORT.get(type(dist))
    short: SharedStdGaussian | LogProbCategorical | None = None if kind is None else kind(dist.action_dim)
    return short


@contextmanager
def replaced_distribution(
    policy: ActorCriticPolicy, short: SharedStdGaussian | LogProbCategorical | None
) -> Iterator[None]:
    """Replace the policy's action distribution within the context, if one is given."""
    before = policy.action_dist
    try:
        policy.action_dist = before if short is None else short
        yield
    finally:
        policy.action_dist = before


class _GaussianLogProb(th.autograd.Function):
    """Log-density of diagonal Gaussians: ``sum_d -(a - mu)^2 / (2 sigma^2) - log sigma - log sqrt(2 pi)``."""

    @staticmethod
    def forward(ctx: Any, mean: th.Tensor, log_std: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """Return log-densities ``(n,)``."""
        std, shift = log_std.exp(), actions - mean
        variance = std**2
        terms = shift**2 / (-2 * variance)
        ctx.save_for_backward(shift, variance, terms)
        return (terms - std.log() - _LOG_SQRT_TAU).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, slope: th.Tensor) -> tuple[th.Tensor, th.Tensor, None]:
        """Return the derivatives with respect to means and log standard deviations."""
        shift, variance, terms = ctx.saved_tensors
        return slope.unsqueeze(1) * shift / variance, -th.add(slope.sum(), th.mv(terms.t(), slope), alpha=2), None


class _LogProbs(th.autograd.Function):
    """Normalised log-probabilities: ``logits - logsumexp(logits)``."""

    @staticmethod
    def forward(ctx: Any, logits: th.Tensor) -> th.Tensor:
        """Return log-probabilities ``(n, k)``."""
        log_probs = logits - logits.logsumexp(dim=-1, keepdim=True)
        ctx.save_for_backward(log_probs)
        return log_probs

    @staticmethod
    def backward(ctx: Any, slope: th.Tensor) -> th.Tensor:
        """Return the derivative with respect to the logits."""
        log_probs: th.Tensor = ctx.saved_tensors[0]
        return slope - log_probs.exp() * slope.sum(dim=-1, keepdim=True)


class _CategoricalEntropy(th.autograd.Function):
    """Entropy from normalised log-probabilities: ``-sum_i p_i log p_i``."""

    @staticmethod
    def forward(ctx: Any, log_probs: th.Tensor) -> th.Tensor:
        """Return entropies ``(n,)``."""
        probs = log_probs.exp()
        terms = probs * _finite(log_probs)
        ctx.save_for_backward(probs, terms)
        return -terms.sum(dim=1)

    @staticmethod
    def backward(ctx: Any, slope: th.Tensor) -> th.Tensor:
        """Return the derivative with respect to the log-probabilities."""
        probs, terms = ctx.saved_tensors
        return th.mul(probs + terms, -slope.unsqueeze(1))


def _finite(log_probs: th.Tensor) -> th.Tensor:
    """Return log-probabilities that are finite for impossible actions, too, as in torch's entropy."""
    return log_probs.clamp(min=th.finfo(log_probs.dtype).min)
