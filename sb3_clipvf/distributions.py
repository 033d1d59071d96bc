"""
SB3's action distributions as plain tensors: one row of parameters per state, and the exact KL between such rows.

The rollout buffer stores these rows as the old distribution, since SB3 policies reuse one mutable distribution object.
"""

from typing import Any, cast

import torch as th
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    SquashedDiagGaussianDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.distributions import Bernoulli, Categorical, Normal

from sb3_clipvf.objectives import bernoulli_kl, categorical_kl, gaussian_kl, multi_categorical_kl
from sb3_clipvf.policies import SquashedGaussianDistribution

# Kinds of action distributions, and the type of torch's distribution that each must hold.
_GAUSSIANS = (
    DiagGaussianDistribution,
    SquashedDiagGaussianDistribution,
    StateDependentNoiseDistribution,
    SquashedGaussianDistribution,
)
_TORCH_TYPES: dict[type[object], type[object]] = {
    **dict.fromkeys(_GAUSSIANS, Normal),
    CategoricalDistribution: Categorical,
    MultiCategoricalDistribution: Categorical,
    BernoulliDistribution: Bernoulli,
}


def dist_param_dim(dist: object) -> int | None:
    """
    Width of a distribution's parameter row.

    :param dist: An SB3 action distribution (``policy.action_dist``); its parameters need not be set yet.
    :return: Number of parameters per state, or None where the exact KL of ``dist`` is not known to this package: for
        each type that is not exactly one of SB3's, or our squashed Gaussian.
    """
    known: Any = dist
    if type(dist) in _GAUSSIANS:
        return 2 * int(known.action_dim)
    if type(dist) is CategoricalDistribution:
        return int(known.action_dim)
    if type(dist) is MultiCategoricalDistribution:
        return int(sum(known.action_dims))
    if type(dist) is BernoulliDistribution:
        return int(known.action_dims)
    return None


def has_exact_kl(dist: object) -> bool:
    """
    Return whether the exact KL of a distribution is known.

    :param dist: An action distribution with its parameters set.
    :return: False where it, or torch's distribution in it, is not exactly of a known type.
    """
    torch_type = _TORCH_TYPES.get(type(dist))
    inner = _unwrapped(getattr(dist, "distribution", None))
    inner = inner if type(dist) is MultiCategoricalDistribution and type(inner) is list else [inner]
    return torch_type is not None and all(type(part) is torch_type for part in inner)


def dist_params(dist: Distribution) -> th.Tensor:
    """
    The parameters of a distribution as one tensor.

    :param dist: An SB3 action distribution with its parameters set.
    :return: Shape ``(n, dist_param_dim(dist))``: logits, or the Gaussian's means followed by its log standard
        deviations (before squashing where the distribution squashes). Differentiable.
    :raises TypeError: If the exact KL of ``dist`` is not known to this package.
    """
    if not has_exact_kl(dist):
        inner = type(getattr(dist, "distribution", None)).__name__
        raise TypeError(f"`dist` must be one of SB3's action distributions, got {type(dist).__name__} of {inner}.")
    known: Any = dist
    if type(dist) in _GAUSSIANS:
        gaussian = known.distribution
        return th.cat([gaussian.loc, gaussian.scale.log()], dim=-1)
    if type(dist) is MultiCategoricalDistribution:
        return th.cat([_finite(categorical.logits) for categorical in known.distribution], dim=-1)
    logits = cast(th.Tensor, known.distribution.logits)
    return _finite(logits) if type(dist) is CategoricalDistribution else logits


def _finite(logits: th.Tensor) -> th.Tensor:
    # Actions that a policy masks by -inf have probability 0 either way; torch's entropy does the same.
    return logits.clamp(min=th.finfo(logits.dtype).min)


class LazyDistribution:
    """
    Torch's distribution of a step that kernels have drawn, made when someone looks at it.

    Callbacks of SB3 read ``policy.action_dist``, whose methods then work as after a forward pass of the policy. The
    first use replaces this object by torch's.

    :param dist: One of SB3's action distributions whose exact KL is known; it holds this object.
    :param params: Its parameters in the states of the step, as :func:`dist_params` gives them; not copied.
    """

    __slots__ = ("_dist", "_made", "_params")

    def __init__(self, dist: Any, params: Any) -> None:
        self._dist = dist
        self._params = params
        self._made: Any = None

    def _distribution(self) -> Any:
        if self._made is None:
            params: Any = th.as_tensor(self._params)
            if type(self._dist) is MultiCategoricalDistribution:
                parts = params.split([int(n) for n in self._dist.action_dims], dim=-1)
                self._made = [Categorical(logits=part) for part in parts]
            elif type(self._dist) in _GAUSSIANS:
                mean, log_std = params.chunk(2, dim=-1)
                self._made = Normal(mean, log_std.exp())
            else:
                self._made = cast(Any, _TORCH_TYPES[type(self._dist)])(logits=params)
            if self._dist.distribution is self:
                self._dist.distribution = self._made
        return self._made

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for while it is copied or pickled
            raise AttributeError(name)
        return getattr(self._distribution(), name)

    def __iter__(self) -> Any:
        return iter(self._distribution())

    def __getitem__(self, index: Any) -> Any:
        return self._distribution()[index]

    def __len__(self) -> int:
        return len(self._distribution())

    def __repr__(self) -> str:
        return repr(self._distribution())


def _unwrapped(inner: Any) -> Any:
    return inner._distribution() if type(inner) is LazyDistribution else inner


def kl_from_params(dist: Distribution, old_params: th.Tensor) -> th.Tensor:
    """
    Exact KL(pi_old || pi), summed over the action dimensions.

    :param dist: The current distribution pi, parameters set for ``n`` states.
    :param old_params: Parameters of pi_old in the same states, from :func:`dist_params`, shape ``(n, k)``.
    :return: Shape ``(n,)``, nats.
    :raises TypeError: If the exact KL of ``dist`` is not known to this package.
    """
    params = dist_params(dist)
    if type(dist) in _GAUSSIANS:
        old_mean, old_log_std = old_params.chunk(2, dim=-1)
        mean, log_std = params.chunk(2, dim=-1)
        return gaussian_kl(old_mean, old_log_std, mean, log_std)
    if type(dist) is MultiCategoricalDistribution:
        return multi_categorical_kl(old_params, params, [int(n) for n in dist.action_dims])
    if type(dist) is CategoricalDistribution:
        return categorical_kl(old_params, params)
    return bernoulli_kl(old_params, params)


def current_dist(policy: Any) -> object:
    """
    Return torch's distribution of a policy's last forward pass.

    :param policy: Any policy.
    :return: What SB3's action distribution holds; None where the policy has none, or it holds none.
    """
    return getattr(getattr(policy, "action_dist", None), "distribution", None)


def refreshed_dist(policy: ActorCriticPolicy, observations: Any, stale: object, *, asks: bool = True) -> Any:
    """
    The action distribution of the forward pass that a policy has just made.

    SB3's policies leave it in ``policy.action_dist``. A policy that overrides ``forward`` or ``evaluate_actions`` may
    not; then its ``get_distribution`` can be asked, at the price of a second forward pass. SB3 never makes one: it may
    draw random numbers, or fail.

    :param policy: Has just been called with ``observations``.
    :param observations: As the policy takes them, ``n`` of them.
    :param stale: :func:`current_dist` from before that call.
    :param asks: Whether to ask it.
    :return: Distribution with parameters set for the ``n`` states; None where there is none and nobody asks.
    """
    now = current_dist(policy)
    if now is not None and now is not stale:
        return policy.action_dist
    return policy.get_distribution(observations) if asks else None
