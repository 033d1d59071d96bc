"""
SB3's action distributions as tensors: one row of parameters per state, and the exact KL between two such tensors.

The rollout buffer stores the rows of the old distribution, since SB3's policies reuse one mutable distribution object.
"""

from typing import Any, cast

import numpy as np
import torch as th
from gymnasium import spaces
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

# SB3's types, and the type of torch's distribution that each one must hold for its exact KL to be known.
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
    Number of parameters per state.

    :param dist: Action distribution (``policy.action_dist``). Its parameters need not be set yet.
    :return: Width of a row, or None if ``dist`` is of a type other than SB3's and our squashed Gaussian. The exact KL
        of a derived type is not known.
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


def n_outputs(dist: Any) -> int:
    """
    Return how many numbers an actor returns for a known distribution: logits, or the means of SB3's Gaussians.

    A squashed Gaussian's layer also returns stds, which are not counted.
    """
    width = cast(int, dist_param_dim(dist))
    return width // 2 if type(dist) in _GAUSSIANS else width


def n_action_numbers(dist: Any) -> int:
    """Return how many numbers one action of a known distribution has: the columns of the stored actions."""
    if isinstance(dist, CategoricalDistribution):
        return 1
    return len(dist.action_dims) if isinstance(dist, MultiCategoricalDistribution) else n_outputs(dist)


def to_action_space(actions: np.ndarray, space: spaces.Space[Any]) -> np.ndarray:
    """Return actions, float32 ``(n, action_dim)``, with the type and shape that SB3's policies return."""
    dtype = np.int64 if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) else np.float32
    return actions.reshape(-1, *cast(tuple[int, ...], space.shape)).astype(dtype, copy=False)


def category_counts(dist: Any) -> np.ndarray:
    """Return the number of categories of each categorical distribution in a known one, int64; empty for other kinds."""
    if isinstance(dist, CategoricalDistribution):
        return np.array([dist.action_dim], np.int64)
    return np.array(dist.action_dims if isinstance(dist, MultiCategoricalDistribution) else [], np.int64)


def has_exact_kl(dist: object) -> bool:
    """Return whether an action distribution, and torch's distribution in it, are exactly of known types."""
    torch_type = _TORCH_TYPES.get(type(dist))
    inner = getattr(dist, "distribution", None)
    parts = inner if type(dist) is MultiCategoricalDistribution and type(inner) is list else [inner]
    return torch_type is not None and all(type(part) in (torch_type, _LAZY[torch_type]) for part in parts)


def dist_params(dist: Distribution) -> th.Tensor:
    """
    Parameters of a distribution as one differentiable tensor.

    :param dist: Action distribution with its parameters set for ``n`` states.
    :return: Logits, or means followed by log standard deviations (before squashing), shape
        ``(n, dist_param_dim(dist))``.
    :raises TypeError: If the exact KL of ``dist`` is not known.
    """
    if not has_exact_kl(dist):
        inner = type(getattr(dist, "distribution", None)).__name__
        raise TypeError(
            f"`dist` must be one of SB3's action distributions, got {type(dist).__name__} of {inner}. "
            "The exact KL of others is not known: set no `kl_coef` and no KL target."
        )
    known: Any = dist
    if type(dist) in _GAUSSIANS:
        gaussian = known.distribution
        return th.cat([gaussian.loc, gaussian.scale.log()], dim=-1)
    if type(dist) is MultiCategoricalDistribution:
        return th.cat([_finite(categorical.logits) for categorical in known.distribution], dim=-1)
    logits = cast(th.Tensor, known.distribution.logits)
    return _finite(logits) if type(dist) is CategoricalDistribution else logits


def kl_from_params(dist: Distribution, old_params: th.Tensor) -> th.Tensor:
    """
    Exact KL(pi_old || pi), summed over the action dimensions.

    :param dist: Current distribution pi with its parameters set for ``n`` states.
    :param old_params: Parameters of pi_old in the same states, from :func:`dist_params`, shape ``(n, k)``.
    :return: Shape ``(n,)``, nats.
    :raises TypeError: If the exact KL of ``dist`` is not known.
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
    """Return torch's distribution of a policy's last forward pass, or None."""
    return getattr(getattr(policy, "action_dist", None), "distribution", None)


def refreshed_dist(policy: ActorCriticPolicy, observations: Any, stale: object, *, may_recompute: bool = True) -> Any:
    """
    Return the action distribution of the forward pass that a policy has just run for ``observations``.

    SB3's policies leave it in ``policy.action_dist``; ``stale`` is the :func:`current_dist` from before that pass. A
    policy with its own ``forward`` or ``evaluate_actions`` may leave none. Then the result comes from a second forward
    pass, which may draw random numbers or fail, or is None without ``may_recompute``.
    """
    now = current_dist(policy)
    if now is not None and now is not stale:
        return policy.action_dist
    return policy.get_distribution(observations) if may_recompute else None


def lazy_distribution(dist: Any, params: Any) -> Any:
    """
    Return torch's distribution for a step that kernels sampled, or a list of them, for callbacks that read it.

    ``dist`` is the action distribution that will hold it as ``distribution``; ``params`` are its parameters as from
    :func:`dist_params`, not copied. They are read at the first use.
    """
    if type(dist) is not MultiCategoricalDistribution:
        return _LAZY[_TORCH_TYPES[type(dist)]](params)
    parts, first = [], 0
    for n in map(int, dist.action_dims):
        parts.append(_LAZY[Categorical](params[:, first : first + n]))
        first += n
    return parts


class _Lazy:
    """First base of a class whose second one is torch's: its objects become torch's own when they are first read."""

    def __init__(self, params: Any) -> None:
        object.__setattr__(self, "unread", params)

    def __getattribute__(self, name: str) -> Any:
        cls = type(self)
        params = th.as_tensor(object.__getattribute__(self, "__dict__").pop("unread"))
        self.__class__ = cast(Any, cls.__bases__[1])
        if issubclass(cls, Normal):
            mean, log_std = params.chunk(2, dim=-1)
            cast(Any, self).__init__(mean, log_std.exp())
        else:
            cast(Any, self).__init__(logits=params)
        return getattr(self, name)


_LAZY: dict[type[object], Any] = {
    torch_type: type(f"Lazy{torch_type.__name__}", (_Lazy, torch_type), {}) for torch_type in {*_TORCH_TYPES.values()}
}


def _finite(logits: th.Tensor) -> th.Tensor:
    # A masked action (-inf) keeps probability 0. Torch's entropy clamps in the same way.
    return logits.clamp(min=th.finfo(logits.dtype).min)
